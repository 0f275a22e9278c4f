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

from psd.distillation.residuals import guide
from psd.distillation.weightings import choose_pair


class NegativeObjective(Enum):
    IMPLICIT_REWARD = "implicit_reward"  # the denoiser's error should fall on winners and rise on losers
    REWARD_ASCENT = "reward_ascent"  # the decoded estimate should have a high reward


@dataclass(frozen=True, kw_only=True)
class NegativeEmbeddingConfig:
    """When and how the negative embedding moves. ``stop`` None goes on to the end.

    At least ``interval`` steps lie between two updates: more, where a step that could make one comes later.
    """

    objective: NegativeObjective = NegativeObjective.IMPLICIT_REWARD
    start: int = 0
    interval: int = 1
    stop: int | None = None
    lr: float = 1e-3  # Adam's: how far each value moves in an update
    lr_decay: float = 1.0  # per update
    max_norm: float = 8.0  # trust region: how far the embedding may get from where it started
    beta: float = 5000.0  # strength of the implicit reward, on mean squared errors of unguided predictions

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
        self._last_update: int | None = None

    def is_due(self, step: int) -> bool:
        """Whether ``step`` makes an update if it can."""
        config, last = self.config, self._last_update
        running = step >= config.start and (config.stop is None or step < config.stop)
        return running and (last is None or step - last >= config.interval)

    def update(self, gradient: Float[Tensor, "tokens dim"], step: int) -> None:
        """One step against the gradient, then back into the trust region."""
        self.offset.grad = gradient
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._decay.step()
        self._last_update = step
        with torch.no_grad():
            self.offset.mul_((self.config.max_norm / self.drift.clamp(min=1e-12)).clamp(max=1))

    @property
    def drift(self) -> Float[Tensor, ""]:
        """How far the embedding is from where it started."""
        norm: Tensor = torch.linalg.vector_norm(self.offset.detach())
        return norm

    def get_extra_state(self) -> dict[str, Any]:
        return {
            "optimizer": self._optimizer.state_dict(),
            "decay": self._decay.state_dict(),
            "last_update": self._last_update,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state["optimizer"])
        self._decay.load_state_dict(state["decay"])
        self._last_update = state["last_update"]


@dataclass(frozen=True, eq=False)
class ImplicitReward:
    """What the moved embedding changes, before anybody knows who wins: no prediction's graph is kept for that.

    ``gain`` is the rise of the denoising error over that of the embedding's start, in units of unguided predictions:
    of what guidance multiplies by ``s - 1``, squares are divided by ``max(1, |s - 1|)^2``.
    """

    gain: Float[Tensor, "k g"]
    slope: Float[Tensor, "k g tokens dim"]  # the gain's gradient

    @classmethod
    def measure(
        cls,
        *,
        positive: Float[Tensor, "k b c h w"],
        moved: Float[Tensor, "k b c h w"],
        reference: Float[Tensor, "k b c h w"],
        noise: Float[Tensor, "k b c h w"],
        text: Float[Tensor, "k b tokens dim"],
        guidance_scale: float,
        group_size: int,
    ) -> ImplicitReward:
        """``moved`` and ``reference`` are predictions with the negative prompt; ``text`` is the leaf that ``moved``
        comes from, of its own for each candidate and view. Frees the graph between the two."""
        rise = _rise(positive, moved, reference, noise, guidance_scale).unflatten(1, (-1, group_size))
        num_values = rise[0, 0].numel()
        # No candidate and no group sees another one, so the gradient of the sum is that of each of them. It is a sum
        # over values, too: a mean's is too small for float16.
        (slope,) = torch.autograd.grad(rise.sum(), text)
        per_group = slope.unflatten(1, (-1, group_size)).sum(2) / num_values
        return cls(rise.detach().mean(dim=(2, 3, 4, 5)), per_group)

    def loss(self, rewards: Float[Tensor, "k g"], beta: float) -> ImplicitRewardLoss:
        """``-log sigmoid(-beta (gain_w - gain_l))``, winner and loser being the best and the worst of the candidates.

        Diffusion-DPO's loss (arXiv 2311.12908, equation 14) with the negative embedding as the only parameter.
        """
        sign = choose_pair(rewards).sign.to(self.gain)
        margin = beta * (sign * self.gain).sum(0)
        factor = margin.sigmoid()
        gradient = (beta * factor * sign)[..., None, None] * self.slope
        return ImplicitRewardLoss(-F.logsigmoid(-margin).mean(), gradient.sum((0, 1)) / len(factor), factor.mean())


@dataclass(frozen=True, eq=False)
class ImplicitRewardLoss:
    value: Float[Tensor, ""]
    gradient: Float[Tensor, "tokens dim"]
    factor: Float[Tensor, ""]  # what the gradient is multiplied with: 1/2 at first, 0 where there is nothing to learn


def _rise(
    positive: Float[Tensor, "k b c h w"],
    moved: Float[Tensor, "k b c h w"],
    reference: Float[Tensor, "k b c h w"],
    noise: Float[Tensor, "k b c h w"],
    guidance_scale: float,
) -> Float[Tensor, "k b c h w"]:
    """``(g - e)^2 - (r - e)^2``, of the guided predictions with the moved embedding and with its start.

    As a product, ``(g - r)(g + r - 2 e)``: the squares are large under guidance, and their difference is small.
    """
    moves = (1 - guidance_scale) * (moved - reference)
    error = guide(positive, moved, guidance_scale) + guide(positive, reference, guidance_scale) - 2 * noise
    return moves * error / max(1.0, abs(guidance_scale - 1)) ** 2
