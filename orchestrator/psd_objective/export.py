"""A finished run's scene, exported again."""

from __future__ import annotations

import json
from pathlib import Path

from orchestrator.errors import UserError
from orchestrator.experiment_config.experiment import experiment
from orchestrator.psd_objective.evaluator import SCENE_FILE
from orchestrator.psd_objective.scenes import build_scene
from orchestrator.schema import ConfigError
from psd.export import field_to_mesh, save_mesh
from psd.scenes.files import load_scene


def export_mesh(run: Path, *, suffix: str, resolution: int) -> Path:
    """Writes ``mesh.SUFFIX`` into a run's folder.

    Raises:
        UserError: no folder of a finished run, a scene without a mesh.
    """
    try:
        spec = json.loads((run / "spec.json").read_text(encoding="utf-8"))
        config, seed = experiment(spec["config"]), int(spec["seed"])
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{run} is no run's folder: there is no spec.json; name one as OUTPUT/runs/RUN") from None
    except (ConfigError, ValueError, KeyError) as error:
        raise UserError(f"{run / 'spec.json'} cannot be read: {error}") from None
    if not (run / SCENE_FILE).exists():
        raise UserError(f"{run} has no {SCENE_FILE}, which a run writes at its end; finish it with psd resume")
    scene = build_scene(config, seed).eval()
    try:
        load_scene(scene, run / SCENE_FILE)
        field = scene.field()
        if field is None:
            raise UserError(f"{run} is a 2D run: image.png is what it made, and there is no mesh")
        path = run / f"mesh.{suffix}"
        save_mesh(field_to_mesh(field, resolution=resolution), path)
    except ValueError as error:
        raise UserError(f"{run}: {error}") from None
    return path
