"""`psd export`: the mesh of a finished run's scene, and what each mistake is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trimesh

from orchestrator.cli import main
from orchestrator.experiment_config.experiment import experiment
from orchestrator.psd_objective.scenes import build_scene
from psd.scenes.files import save_scene

VOXELS = {"kind": "voxel_grid", "resolution": 8, "coarse_resolution": 4, "blob_density": 50, "blob_radius": 0.4}


def run_folder(folder: Path, scene: dict[str, Any], *, finished: bool = True, **experiment_keys: Any) -> Path:
    config = {"prior": {"kind": "multiview", "path": "toybox"}, "scene": scene, **experiment_keys}
    config["rewards"] = {"train": {"kind": "clip_preference", "path": "toybox/reward"}}
    folder.mkdir()
    (folder / "spec.json").write_text(json.dumps({"seed": 3, "config": config}))
    if finished:
        save_scene(build_scene(experiment(config), 0), folder / "scene.safetensors")
    return folder


@pytest.mark.parametrize("suffix", ["glb", "ply", "obj"])
def test_a_mesh_comes_in_every_format(tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folder(tmp_path / "run", VOXELS)
    assert main(["export", str(run), "--format", suffix, "--resolution", "24"]) == 0
    assert capsys.readouterr().out.strip() == str(run / f"mesh.{suffix}")
    assert trimesh.load(run / f"mesh.{suffix}", force="mesh").is_volume


def test_mistakes_are_told_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = run_folder(tmp_path / "empty", {**VOXELS, "blob_density": 0.01})
    half = run_folder(tmp_path / "half", VOXELS, finished=False)
    flat = run_folder(tmp_path / "flat", {"kind": "image"}, cameras={"group_size": 1, "height": 16, "width": 16})
    for folder, line in [
        (tmp_path / "nothing", "is no run's folder"),
        (half, "has no scene.safetensors, which a run writes at its end; finish it with psd resume"),
        (flat, "is a 2D run: image.png is what it made, and there is no mesh"),
        (empty, "the scene is empty"),
    ]:
        assert main(["export", str(folder)]) == 2
        assert line in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", str(half), "--resolution", "4"])
    assert "must be a whole number from 8 to 1024, got 4" in capsys.readouterr().err
