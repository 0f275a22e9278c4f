"""What the runs of a sweep have left in their folders, for those who look at it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.run_folder import RunFolder
from orchestrator.trial import RunSpec

PICTURES = ("turntable.gif", "image.png", "contact_sheet.png")  # the first that is there stands for the run


@dataclass(frozen=True, kw_only=True)
class RunView:
    """A run that has begun: its rows of metrics, its final ones, and its files."""

    run_id: str
    trial: int
    prompt: str
    seed: int
    rows: Sequence[Mapping[str, float]]  # each with its ``step``
    result: Mapping[str, float] | None  # None: not finished
    files: Sequence[str]  # names in its folder

    @property
    def picture(self) -> str | None:
        return next((name for name in PICTURES if name in self.files), None)


def view_run(runs: Path, spec: RunSpec) -> RunView | None:
    """None where the folder is nobody's or another run's: not begun, or on another driver's disk."""
    folder = RunFolder(runs, spec.run_id)
    if not folder.describes(spec):
        return None
    return RunView(
        run_id=spec.run_id,
        trial=spec.trial,
        prompt=spec.prompt,
        seed=spec.seed,
        rows=folder.metrics(),
        result=folder.result(),
        files=sorted(path.name for path in folder.path.iterdir() if path.is_file()),
    )
