"""The negative text embedding, optimised online beside the scene: PSD's stand-in for updating the frozen prior.

Everything here is a reconstruction from the abstract of arXiv 2603.01594. Shapes: k = noise candidates, b = views,
g = groups of views.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from psd.distillation.weightings import choose_pair
from psd.schedules import Steps


class NegativeObjective(Enum):
    IMPLICIT_REWARD = "implicit_reward"  # the denoiser's error should fall on winners and rise on losers
    REWARD_ASCENT = "reward_ascent"  # the decoded estimate should have a high reward


@dataclass(frozen=True, kw_only=True)
class NegativeEmbeddingConfig:
    """When and how the negative embedding moves. ``stop`` None goes on to the end."""

    objective: NegativeObjective = NegativeObjective.IMPLICIT_REWARD
    start: int = 0
    interval: int = 1
    stop: int | None = None
    lr: float = 1e-3  # Adam's: how far each value moves in an update
    lr_decay: float = 1.0  # per update
    max_norm: float = 8.0  # trust region: how far the embedding may get from where it started
    beta: float = 5000.0  # strength of the implicit reward, on mean squared errors

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError(f"interval must be >= 1, got {self.interval}")
        if self.lr < 0 or self.max_norm < 0 or self.beta <= 0:
            raise ValueError(f"need lr, max_norm >= 0 and beta > 0, got {self.lr}, {self.max_norm} and {self.beta}")
        if not 0 < self.lr_decay <= 1:
            raise ValueError(f"lr_decay must be in (0, 1], got {self.lr_decay}")


class NegativeEmbedding(nn.Module):
    """An offset that is added to the embedding of whatever the negative prompt is, and so shared by all of them.

    It owns its optimiser, whose state is part of the state dict.
    """

    def __init__(self, config: NegativeEmbeddingConfig, *, like: Float[Tensor, "tokens dim"]) -> None:
        super().__init__()
        self.config = config
        self.offset = nn.Parameter(torch.zeros_like(like))
        self._optimizer = torch.optim.Adam([self.offset], lr=config.lr, betas=(0.9, 0.99), eps=1e-15)
        self._decay = torch.optim.lr_scheduler.ExponentialLR(self._optimizer, config.lr_decay)

    def is_due(self, step: int) -> bool:
        config = self.config
        return step in Steps(start=config.start, interval=config.interval, stop=config.stop)

    def update(self, loss: Float[Tensor, ""]) -> None:
        """One step down the loss, then back into the trust region."""
        self.offset.grad = torch.autograd.grad(loss, self.offset)[0]
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._decay.step()
        with torch.no_grad():
            self.offset.mul_((self.config.max_norm / self.drift.clamp(min=1e-12)).clamp(max=1))

    @property
    def drift(self) -> Float[Tensor, ""]:
        """How far the embedding is from where it started."""
        norm: Tensor = torch.linalg.vector_norm(self.offset.detach())
        return norm

    def get_extra_state(self) -> dict[str, Any]:
        return {"optimizer": self._optimizer.state_dict(), "decay": self._decay.state_dict()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state["optimizer"])
        self._decay.load_state_dict(state["decay"])


def implicit_reward_loss(
    *,
    predicted: Float[Tensor, "k b c h w"],
    reference: Float[Tensor, "k b c h w"],
    noise: Float[Tensor, "k b c h w"],
    rewards: Float[Tensor, "k g"],
    beta: float,
) -> Float[Tensor, ""]:
    """``-log sigmoid(-beta (gain_w - gain_l))``, with ``gain`` the rise of the denoising error over the reference's.

    Winner and loser are the best and the worst of the candidates.
    Diffusion-DPO's loss (arXiv 2311.12908, equation 14) with the negative embedding as the only parameter.
    """

    def group_error(prediction: Tensor) -> Float[Tensor, "k g"]:
        squared = (noise - prediction).square()
        error: Tensor = squared.unflatten(1, (rewards.shape[1], -1)).mean(dim=(2, 3, 4, 5))
        return error

    gain = group_error(predicted) - group_error(reference)
    sign = choose_pair(rewards).sign.to(gain)
    log_likelihood: Tensor = F.logsigmoid(-beta * (sign * gain).sum(0))
    mean: Tensor = log_likelihood.mean()
    return -mean
