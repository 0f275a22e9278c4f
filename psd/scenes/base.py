"""What a scene is: parameters that can be rendered from cameras."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypedDict, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from psd.cameras import Cameras


@dataclass(frozen=True, eq=False)
class Render:
    rgb: Float[Tensor, "v 3 h w"]  # composited on the background, in [0, 1]
    opacity: Float[Tensor, "v 1 h w"]
    depth: Float[Tensor, "v 1 h w"]  # expected distance along the ray; the far plane where nothing is
    normals: Float[Tensor, "v 3 h w"] | None = (
        None  # of unit length times opacity, in the world's axes; None: not asked
    )
    orientation: Float[Tensor, "v 1 h w"] | None = None  # how much of what is seen faces away: sum of w max(0, n·d)^2


@runtime_checkable
class Field(Protocol):
    """A density (per unit of length) and a colour at every point of the scene's sphere."""

    @property
    def device(self) -> torch.device: ...

    def density(self, points: Float[Tensor, "p 3"]) -> Float[Tensor, " p"]: ...

    def color(self, points: Float[Tensor, "p 3"]) -> Float[Tensor, "p 3"]: ...


class ParamGroup(TypedDict):
    name: str
    params: list[nn.Parameter]
    lr: float


class Scene(nn.Module, ABC):
    """What is optimised. Its state dict is everything that a checkpoint must hold of it."""

    num_dimensions: ClassVar[int] = 3  # 2: cameras give the size and the number of pictures, and nothing else

    @abstractmethod
    def render(self, cameras: Cameras, background: Float[Tensor, "3"] | Float[Tensor, "v 3 h w"]) -> Render: ...

    @abstractmethod
    def param_groups(self) -> list[ParamGroup]: ...

    @abstractmethod
    def regularization(self, render: Render, step: int) -> dict[str, Tensor]:
        """Weighted scalar losses on the last render and the parameters (sparsity, smoothness), by name."""

    @abstractmethod
    def on_step(self, step: int) -> None:
        """Called after every optimiser step: coarse-to-fine, occupancy updates."""

    def field(self) -> Field | None:
        """What fills space at this moment, for meshes and measures of geometry; None where nothing does."""
        return None


@torch.no_grad()
def render_still(scene: Scene, cameras: Cameras, background: Float[Tensor, "3"] | Float[Tensor, "v 3 h w"]) -> Render:
    """A render for pictures and evaluations: no gradient, no jitter, and the scene's random state as it was."""
    training = scene.training
    scene.eval()
    try:
        return scene.render(cameras, background)
    finally:
        scene.train(training)
