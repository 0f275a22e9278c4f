"""What a prior is: a frozen diffusion model behind one meaning, "predict the noise in z_t"."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from psd.cameras import Cameras


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A variance-preserving forward process: ``z_t = alpha_t z + sigma_t eps`` with ``alpha_t^2 + sigma_t^2 = 1``."""

    alphas_cumprod: Float[Tensor, " timesteps"]
    _copies: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)  # one for each device

    @classmethod
    def scaled_linear(
        cls, beta_start: float = 0.00085, beta_end: float = 0.012, num_timesteps: int = 1000
    ) -> NoiseSchedule:
        """Stable Diffusion's schedule."""
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64) ** 2
        return cls((1 - betas).cumprod(0).float())

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def alpha(self, t: Int[Tensor, " b"]) -> Float[Tensor, "b 1 1 1"]:
        return self._alphas_cumprod(t).sqrt()[:, None, None, None]

    def sigma(self, t: Int[Tensor, " b"]) -> Float[Tensor, "b 1 1 1"]:
        return (1 - self._alphas_cumprod(t)).sqrt()[:, None, None, None]

    def add_noise(
        self, z: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], t: Int[Tensor, " b"]
    ) -> Float[Tensor, "b c h w"]:
        return self.alpha(t) * z + self.sigma(t) * noise

    def denoised(
        self, z_t: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], t: Int[Tensor, " b"]
    ) -> Float[Tensor, "b c h w"]:
        """The one-step estimate of z_0 that a noise prediction implies."""
        return (z_t - self.sigma(t) * noise) / self.alpha(t)

    def _alphas_cumprod(self, t: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        if t.device not in self._copies:
            self._copies[t.device] = self.alphas_cumprod.to(t.device)
        return self._copies[t.device][t]


@runtime_checkable
class Prior(Protocol):
    """Frozen, and a plain object: never make it an attribute of an ``nn.Module``, or it lands in checkpoints."""

    noise_schedule: NoiseSchedule
    group_size: int  # views that the model denoises together; 1 for a single-view model

    def embed(self, prompts: Sequence[str]) -> Float[Tensor, "b tokens dim"]: ...

    def overflow(self, prompt: str) -> str:
        """The end of a prompt that the text encoder has no room for; empty where all of it fits."""
        ...

    def encode(self, rgb: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c lh lw"]:
        """Differentiable; ``rgb`` in [0, 1], resized to the model's resolution."""
        ...

    def decode(self, z: Float[Tensor, "b c lh lw"]) -> Float[Tensor, "b 3 h w"]:
        """Differentiable; returns values in [0, 1]."""
        ...

    def preview(self, z: Float[Tensor, "b c lh lw"]) -> Float[Tensor, "b 3 h w"]:
        """What rewards see that only rank: as ``decode``, or something quicker that looks alike. Without gradient."""
        ...

    def predict_noise(
        self,
        z_t: Float[Tensor, "b c lh lw"],
        t: Int[Tensor, " b"],
        text: Float[Tensor, "b tokens dim"],
        cameras: Cameras | None,
    ) -> Float[Tensor, "b c lh lw"]:
        """Always epsilon, whatever the network was trained to predict. ``cameras`` holds b views, or is None in 2D.

        Differentiable in ``text`` where that requires a gradient, and in nothing else.
        """
        ...


class Adapter(nn.Module, ABC):
    """Small trainable weights beside a frozen prior's network. Its state dict is these weights alone."""

    @abstractmethod
    def forward(
        self,
        z_t: Float[Tensor, "b c lh lw"],
        t: Int[Tensor, " b"],
        text: Float[Tensor, "b tokens dim"],
        cameras: Cameras | None,
    ) -> Float[Tensor, "b c lh lw"]:
        """The noise that the adapted prior predicts. Differentiable in the adapter's weights and in nothing else."""


@runtime_checkable
class AdaptablePrior(Prior, Protocol):
    """A prior beside whose network weights can be trained, for variational score distillation."""

    def make_adapter(self, rank: int) -> Adapter:
        """A new one, which predicts what the prior does. Draws its weights from torch's global generator."""
        ...
