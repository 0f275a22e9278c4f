"""What a run is judged by, and what people look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from orchestrator.experiment_config.experiment import EvaluationConfig
from orchestrator.heartbeat import beat
from psd.cameras import Cameras, CameraSampler, turntable
from psd.evaluation.held_out import geometry_scores, held_out_cameras, mean_rewards
from psd.export import contact_sheet, field_to_mesh, save_image, save_mesh, save_turntable
from psd.optimization import Optimization
from psd.rewards.base import Reward
from psd.scenes.backgrounds import Background
from psd.scenes.base import Field, Render, Scene, render_still
from psd.scenes.files import save_scene
from psd.scenes.image import ImageScene
from psd.scenes.volume_rendering import SCENE_RADIUS
from psd.toybox.oracle import Oracle

TURNTABLE_FRAMES = 24
SCENE_FILE = "scene.safetensors"


class Evaluator:
    """Judges a scene from held-out views, and makes the pictures and the mesh that people look at.

    The pictures are taken from a little farther away than the views that are judged, so that nothing is cut off.
    A 2D scene looks the same from everywhere: it is judged by one view, and saved as a picture.
    """

    def __init__(
        self,
        prompt: str,
        sampler: CameraSampler,
        rewards: Mapping[str, Reward],
        oracle: Oracle | None,
        config: EvaluationConfig,
        output: Path,
        device: torch.device,
    ) -> None:
        self._prompt = prompt
        self._cameras = held_out_cameras(sampler, config.num_views).to(device)
        shown = replace(sampler.framing(SCENE_RADIUS), height=config.picture_size, width=config.picture_size)
        self._picture_cameras = held_out_cameras(shown, config.num_views).to(device)
        self._turntable = turntable(shown, TURNTABLE_FRAMES, sum(shown.elevation_deg) / 2).to(device)
        self._rewards = rewards
        self._oracle = oracle
        self._output = output

    @torch.no_grad()
    def __call__(self, optimization: Optimization, *, final: bool) -> tuple[dict[str, float], dict[str, Path]]:
        """The scores, and the files it wrote."""
        scene, background = optimization.scene, optimization.background
        num_views = 1 if scene.num_dimensions == 2 else len(self._cameras)
        cameras = self._cameras[:num_views]
        render = _render(scene, background, cameras)
        scores = mean_rewards(render, self._prompt, self._rewards)
        held_out = [score for name, score in scores.items() if name != "eval/reward"]
        if held_out:  # what optimising the train reward gained on it and not on the others
            scores["eval/gap"] = scores["eval/reward"] - sum(held_out) / len(held_out)
        if self._oracle is not None:
            verdict = self._oracle.judge(render.rgb, self._prompt)
            scores |= {f"eval/{name}": share for name, share in verdict.items()}
        files = {"contact_sheet": self._save_contact_sheet(scene, background, num_views)}
        field = scene.field()
        beat()
        if final and field is not None:
            scores |= geometry_scores(render, cameras, field)
        if final:
            save_scene(scene, self._output / SCENE_FILE)
            files |= self._save_asset(scene, background, field)
        return scores, files

    def _save_contact_sheet(self, scene: Scene, background: Background, num_views: int) -> Path:
        cameras = self._picture_cameras[:num_views]
        rgb = _render(scene, background, cameras).rgb
        captions = [f"{azimuth:.0f}°" if num_views > 1 else "" for azimuth in cameras.azimuth_deg.tolist()]
        order = cameras.azimuth_deg.argsort()
        sheet = contact_sheet(
            rgb[order], [captions[i] for i in order.tolist()], columns=min(4, num_views), title=self._prompt
        )
        path = self._output / "contact_sheet.png"
        sheet.save(path)
        return path

    def _save_asset(self, scene: Scene, background: Background, field: Field | None) -> dict[str, Path]:
        if isinstance(scene, ImageScene):
            path = self._output / "image.png"
            save_image(scene.rgb[0], path)
            return {"image": path}
        files = {"turntable": self._output / "turntable.gif"}
        save_turntable(_render(scene, background, self._turntable).rgb, files["turntable"])
        if field is None:
            return files
        try:
            beat()
            mesh = field_to_mesh(field)
        except ValueError:  # nothing is solid: the scores say how bad that is, and there is no surface to save
            return files
        files["mesh"] = self._output / "mesh.glb"
        save_mesh(mesh, files["mesh"])
        return files


def _render(scene: Scene, background: Background, cameras: Cameras) -> Render:
    beat()
    return render_still(scene, cameras, background.fixed(cameras).rgb)
