"""The renders' own score, learned beside the frozen prior: what variational score distillation compares with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from psd.cameras import Cameras
from psd.priors.base import AdaptablePrior
from psd.random import normal


@dataclass(frozen=True, kw_only=True)
class LearnedScoreConfig:
    """Low-rank weights beside the prior's network; the defaults are those of threestudio's ProlificDreamer."""

    rank: int = 4
    lr: float = 1e-4  # AdamW's

    def __post_init__(self) -> None:
        if self.rank < 1 or self.lr < 0:
            raise ValueError(f"need rank >= 1 and lr >= 0, got {self.rank} and {self.lr}")


class LearnedScore(nn.Module):
    """An adapter of the prior, trained on every step's renders to predict the noise in them.

    ProlificDreamer (arXiv 2305.16213, equation 9), with one scene. It owns its optimiser, whose state is part of the
    state dict; the prior's own weights are not.
    """

    def __init__(self, config: LearnedScoreConfig, prior: AdaptablePrior) -> None:
        super().__init__()
        self._noise_schedule = prior.noise_schedule
        self.adapter = prior.make_adapter(config.rank)
        self._optimizer = torch.optim.AdamW(self.adapter.parameters(), lr=config.lr, betas=(0.9, 0.99), eps=1e-15)

    @torch.no_grad()
    def predict(
        self,
        noised: Float[Tensor, "k b c h w"],
        t: Int[Tensor, " b"],
        text: Float[Tensor, "b tokens dim"],
        cameras: Cameras | None,
    ) -> Float[Tensor, "k b c h w"]:
        k = len(noised)
        repeated = None if cameras is None else cameras.repeat(k)
        predicted: Tensor = self.adapter(noised.flatten(0, 1), t.repeat(k), text.repeat(k, 1, 1), repeated)
        return predicted.view_as(noised)

    def update(
        self,
        latents: Float[Tensor, "b c h w"],
        text: Float[Tensor, "b tokens dim"],
        cameras: Cameras | None,
        generator: torch.Generator,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """One step down the denoising error of the renders, at a timestep of each group's own.

        Returns the mean squared error and the norm of its gradient. What goes back is the gradient of the sum: the
        mean's is lost in float16, and Adam does not mind.
        """
        group_size = 1 if cameras is None else cameras.group_size
        num_timesteps, num_groups = self._noise_schedule.num_timesteps, len(latents) // group_size
        drawn = torch.randint(num_timesteps, (num_groups,), generator=generator, device=generator.device)
        t = drawn.repeat_interleave(group_size).to(latents.device, non_blocking=True)
        noise = normal(latents.shape, latents, generator)
        with torch.enable_grad():
            predicted = self.adapter(self._noise_schedule.add_noise(latents, noise, t), t, text, cameras)
            loss = F.mse_loss(predicted, noise, reduction="sum")
            loss.backward()
        norm = torch.nn.utils.get_total_norm([each.grad for each in self.adapter.parameters() if each.grad is not None])
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach() / noise.numel(), norm / noise.numel()

    def get_extra_state(self) -> dict[str, Any]:
        return self._optimizer.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state)
