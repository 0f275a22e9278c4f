"""A picture as the thing that is optimised: score distillation in 2D, the simplest case of every method.

It is a picture of pixels, not of latents, so that the gradient passes the prior's encoder as it does in 3D, and rewards
see what is really there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from psd.cameras import Cameras
from psd.scenes.base import ParamGroup, Render, Scene


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    height: int  # pixels
    width: int
    num_levels: int = 4  # each half as fine as the one before, the first has a value for every pixel
    lr: float = 0.1  # of the coarsest level; each finer one learns half as fast
    smoothness: float = 0.0  # weight of the mean squared difference between neighbouring pixels

    def __post_init__(self) -> None:
        if self.num_levels < 1:
            raise ValueError(f"num_levels must be >= 1, got {self.num_levels}; 1 is pixels alone")
        smallest = 2**self.num_levels
        if min(self.height, self.width) < smallest:
            raise ValueError(
                f"height and width must be >= {smallest} pixels for {self.num_levels} levels, "
                f"got {self.height} and {self.width}"
            )
        if self.lr <= 0:
            raise ValueError(f"lr must be > 0, got {self.lr}")
        if self.smoothness < 0:
            raise ValueError(f"smoothness must be >= 0, got {self.smoothness}; 0 turns it off")


class ImageScene(Scene):
    """One opaque picture, grey at first: the sigmoid of a sum of levels, coarse to fine, so that it stays in [0, 1].

    Pixels alone learn the speckles to which an encoder answers most; Adam gives them the same rate as what is seen.
    Every camera sees all of the picture, in the camera's own resolution, and nothing of the background.
    """

    num_dimensions: ClassVar[int] = 2

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.config = config
        sizes = [(-(-config.height // 2**k), -(-config.width // 2**k)) for k in range(config.num_levels)]
        self.levels = nn.ParameterList(nn.Parameter(torch.zeros(1, 3, *size)) for size in sizes)

    @property
    def rgb(self) -> Float[Tensor, "1 3 h w"]:
        size = self.levels[0].shape[-2:]
        resized = [F.interpolate(level, size, mode="bilinear", align_corners=False) for level in self.levels]
        return torch.sigmoid(torch.stack(resized).sum(0))

    def render(self, cameras: Cameras, background: Float[Tensor, "3"] | Float[Tensor, "v 3 h w"]) -> Render:
        rgb, size = self.rgb, (cameras.height, cameras.width)
        if rgb.shape[-2:] != size:
            rgb = F.interpolate(rgb, size, mode="bilinear", antialias=True)
        opaque = rgb.new_ones(len(cameras), 1, *size)
        return Render(rgb=rgb.expand(len(cameras), -1, -1, -1), opacity=opaque, depth=opaque)

    def param_groups(self) -> list[ParamGroup]:
        coarsest = self.config.num_levels - 1
        return [
            ParamGroup(name=f"level_{k}", params=[level], lr=self.config.lr / 2 ** (coarsest - k))
            for k, level in enumerate(self.levels)
        ]

    def regularization(self, render: Render, step: int) -> dict[str, Tensor]:
        if not self.config.smoothness:
            return {}
        rgb = self.rgb
        roughness = torch.stack([rgb.diff(dim=axis).square().mean() for axis in (2, 3)]).sum()
        return {"smoothness": self.config.smoothness * roughness}

    def on_step(self, step: int) -> None:
        pass
