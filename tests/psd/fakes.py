"""Small stand-ins: a scene that is its pictures, rewards with known answers, a prior that keeps a record."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from psd.cameras import Cameras
from psd.priors.gaussian import GaussianPrior
from psd.scenes.base import ParamGroup, Render, Scene


class ImageScene(Scene):
    """One picture a view, whatever the cameras; jittered from torch's global generator, as nerfacc's samples are."""

    def __init__(self, num_views: int = 4, image_size: int = 4, lr: float = 0.05, jitter: float = 0.0) -> None:
        super().__init__()
        self.images = nn.Parameter(torch.full((num_views, 3, image_size, image_size), 0.5))
        self.register_buffer("steps_seen", torch.zeros(()))
        self.lr = lr
        self.jitter = jitter

    def render(self, cameras: Cameras, background: Tensor) -> Render:
        jitter = self.jitter * torch.rand(self.images.shape)
        opacity = torch.ones_like(self.images[:, :1])
        return Render(rgb=self.images + jitter, opacity=opacity, depth=opacity)

    def param_groups(self) -> list[ParamGroup]:
        return [ParamGroup(name="images", params=[self.images], lr=self.lr)]

    def regularization(self, render: Render, step: int) -> dict[str, Tensor]:
        return {"size": 1e-3 * self.images.square().mean()}

    def on_step(self, step: int) -> None:
        self.steps_seen.fill_(step + 1)


class RecordingPrior(GaussianPrior):
    """Keeps what it was asked."""

    def __init__(self, *, image_size: int = 4, group_size: int = 4, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(image_size=image_size, group_size=group_size, dtype=dtype)
        self.asked: list[tuple[Tensor, Tensor, Tensor]] = []
        self.decoded: list[Tensor] = []

    def predict_noise(self, z_t: Tensor, t: Tensor, text: Tensor, cameras: Cameras | None) -> Tensor:
        assert cameras is None or len(cameras) == len(z_t)
        self.asked.append((z_t, t, text))
        return super().predict_noise(z_t, t, text, cameras)

    def decode(self, z: Tensor) -> Tensor:
        self.decoded.append(z)
        return super().decode(z)


class BrightnessReward:
    """The mean pixel, ``slope`` times; the same for every prompt."""

    differentiable = True
    group_size = 1

    def __init__(self, slope: float = 1.0) -> None:
        self.slope = slope

    def __call__(self, rgb: Tensor, prompts: Sequence[str]) -> Tensor:
        assert len(rgb) == len(prompts)
        return self.slope * rgb.mean(dim=(1, 2, 3))


class TableReward:
    """Given numbers, image by image; from the first one again after the last."""

    differentiable = False
    group_size = 1

    def __init__(self, scores: Sequence[float]) -> None:
        self.scores = torch.tensor(scores)

    def __call__(self, rgb: Tensor, prompts: Sequence[str]) -> Tensor:
        asked, self.scores = self.scores[: len(rgb)], self.scores.roll(-len(rgb))
        return asked
