"""`psd export RUN_FOLDER`: the mesh of a finished run, in another format or resolution."""

from __future__ import annotations

from pathlib import Path

from orchestrator.psd_objective.export import export_mesh


def export_command(run: Path, *, suffix: str, resolution: int) -> int:
    print(export_mesh(run, suffix=suffix, resolution=resolution))
    return 0
