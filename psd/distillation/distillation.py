"""Distillation: from rendered views to the gradient that moves them to where the prior, and the reward, want them.

One step of every method draws K noises, gets K residuals and, where the weighting asks for them, K rewards:
``grad_z = w(t) sum_k a_k delta_k``. Shapes: k = noise candidates, b = views, g = groups of views, c h w = latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from psd.cameras import Cameras
from psd.distillation.negative_embedding import (
    NegativeEmbedding,
    NegativeEmbeddingConfig,
    NegativeObjective,
    implicit_reward_loss,
)
from psd.distillation.residuals import Candidates, Predictions, Residual, Residuals, guide
from psd.distillation.weightings import RunningSpread, Weighting
from psd.phases import phase
from psd.priors.base import Prior
from psd.prompts import PromptEmbeddings
from psd.random import uniform
from psd.rewards.base import Reward
from psd.schedules import Constant, Schedule


@dataclass(frozen=True, eq=False)
class DistillationLoss:
    """``total`` carries the gradient; ``terms`` is for the log."""

    total: Float[Tensor, ""]
    terms: dict[str, Float[Tensor, ""]]
    unet_calls: int  # views denoised, once for each candidate and text: the unit in which methods' costs compare


@dataclass(frozen=True)
class _FrozenModels:
    """Keeps the models out of sight of ``nn.Module``, which would put their weights into checkpoints."""

    prior: Prior
    reward: Reward | None


class Distillation(nn.Module):
    """A residual and a weighting, with an optional negative embedding. Its state dict is its own small state only.

    Candidates of a group share a timestep, drawn between ``min_t`` and ``max_t`` (fractions of the prior's timesteps).
    Rewards of a candidate are averaged over its group's views: a group wins or loses as a whole.

    Raises:
        ValueError: the weighting or the negative embedding needs a reward, or pairs, that are not there.
    """

    def __init__(
        self,
        *,
        prior: Prior,
        residual: Residual,
        weighting: Weighting,
        reward: Reward | None = None,
        negative_embedding: NegativeEmbeddingConfig | None = None,
        min_t: Schedule = Constant(0.02),
        max_t: Schedule = Constant(0.98),
    ) -> None:
        super().__init__()
        _check(weighting, reward, negative_embedding)
        self.residual = residual
        self.weighting = weighting
        self.min_t = min_t
        self.max_t = max_t
        self.spread = RunningSpread()
        self.negative_embedding: NegativeEmbedding | None = None
        if negative_embedding is not None:
            self.negative_embedding = NegativeEmbedding(negative_embedding, like=prior.embed([""])[0])
        self._frozen = _FrozenModels(prior, reward)

    def forward(
        self,
        rgb: Float[Tensor, "b 3 h w"],
        prompt: PromptEmbeddings,
        cameras: Cameras | None,
        step: int,
        generator: torch.Generator,
    ) -> DistillationLoss:
        """``cameras`` is None in 2D, where every image is a group of its own.

        The gradient of ``total`` with respect to the latents is ``w(t) sum_k a_k delta_k`` divided by the number of
        views: a sum over values and a mean over views, as in threestudio.
        """
        prior = self._frozen.prior
        with phase("encode"):
            latents = prior.encode(rgb)
        group_size = 1 if cameras is None else cameras.group_size
        candidates = self._draw(latents.detach(), group_size, step, generator)
        denoise = _Denoiser(prior, candidates, cameras)
        negative = self.negative_embedding
        update = negative if negative is not None and negative.is_due(step) else None
        with phase("unet"):
            predictions, reference = self._predict(denoise, prompt, update)
        residuals = self.residual(candidates, predictions, prior.noise_schedule, step)
        rewards = self._score(residuals, prompt.prompt, group_size, update)
        terms: dict[str, Tensor] = {"t": candidates.t.float().mean() / prior.noise_schedule.num_timesteps}
        if update is not None:
            loss = self._negative_loss(update, candidates, predictions, reference, rewards, step)
            with phase("negative"):
                update.update(loss)
            terms["negative_loss"] = loss.detach()
        if negative is not None:
            terms["negative_drift"] = negative.drift
        scores = None if rewards is None else rewards.detach()
        if scores is not None:
            terms |= {"reward": scores.mean(), "reward_gap": (scores.amax(0) - scores.amin(0)).mean()}
        pull = self._combine(candidates, residuals, scores, step)
        total: Tensor = _Pull.apply(latents, pull)  # type: ignore[no-untyped-call]
        terms["distillation"] = total.detach()
        return DistillationLoss(total, terms, denoise.num_calls)

    def _draw(
        self, latents: Float[Tensor, "b c h w"], group_size: int, step: int, generator: torch.Generator
    ) -> Candidates:
        schedule, k = self._frozen.prior.noise_schedule, self.weighting.num_candidates
        t = self._draw_t(len(latents) // group_size, step, generator).repeat_interleave(group_size).to(latents.device)
        noise = torch.randn((k, *latents.shape), generator=generator, device=generator.device).to(latents)
        noised = schedule.add_noise(latents.repeat(k, 1, 1, 1), noise.flatten(0, 1), t.repeat(k)).view_as(noise)
        return Candidates(latents, t, noise, noised, group_size)

    def _draw_t(self, num_groups: int, step: int, generator: torch.Generator) -> Int[Tensor, " g"]:
        low, high = self.min_t(step), self.max_t(step)
        if not 0 <= low <= high <= 1:
            raise ValueError(f"need 0 <= min_t <= max_t <= 1, got {low:.4g} and {high:.4g} at step {step}")
        last = self._frozen.prior.noise_schedule.num_timesteps - 1
        first_t, last_t = int(low * last), int(high * last)
        return uniform((num_groups,), first_t, last_t + 1, generator).long().clamp(max=last_t)

    def _predict(
        self, denoise: _Denoiser, prompt: PromptEmbeddings, update: NegativeEmbedding | None
    ) -> tuple[Predictions, Float[Tensor, "k b c h w"] | None]:
        """Predictions, and those with the original negative embedding where its update compares with them.

        The negative prediction carries a graph exactly when the embedding is updated.
        """
        offset = None if self.negative_embedding is None else self.negative_embedding.offset
        if offset is None or update is None:
            shifted = prompt.negative if offset is None else prompt.negative + offset.detach()
            positive, negative = denoise(prompt.positive, shifted)
            return Predictions(positive, negative), None
        compares = update.config.objective is NegativeObjective.IMPLICIT_REWARD
        frozen = denoise(prompt.positive, prompt.negative) if compares else denoise(prompt.positive)
        (negative,) = denoise(prompt.negative + offset)
        return Predictions(frozen[0], negative), frozen[1] if compares else None

    def _score(
        self, residuals: Residuals, prompt: str, group_size: int, update: NegativeEmbedding | None
    ) -> Float[Tensor, "k g"] | None:
        ascends = update is not None and update.config.objective is NegativeObjective.REWARD_ASCENT
        if not (self.weighting.needs_rewards or ascends):
            return None
        prior, reward = self._frozen.prior, self._frozen.reward
        assert reward is not None
        with torch.set_grad_enabled(ascends):
            with phase("decode"):
                rgb = prior.decode(residuals.denoised.flatten(0, 1))
            with phase("reward"):
                scores = reward(rgb, [prompt] * len(rgb))
        return scores.view(len(residuals.denoised), -1, group_size).mean(-1)

    def _negative_loss(
        self,
        update: NegativeEmbedding,
        candidates: Candidates,
        predictions: Predictions,
        reference: Float[Tensor, "k b c h w"] | None,
        rewards: Float[Tensor, "k g"] | None,
        step: int,
    ) -> Float[Tensor, ""]:
        assert rewards is not None
        if reference is None:
            return -rewards.mean()
        scale = self.residual.guidance_scale(step)
        return implicit_reward_loss(
            predicted=guide(predictions.positive, predictions.negative, scale),
            reference=guide(predictions.positive, reference, scale),
            noise=candidates.noise,
            rewards=rewards,
            beta=update.config.beta,
        )

    @torch.no_grad()
    def _combine(
        self, candidates: Candidates, residuals: Residuals, rewards: Float[Tensor, "k g"] | None, step: int
    ) -> Float[Tensor, "b c h w"]:
        num_groups = len(candidates.latents) // candidates.group_size
        coefficients = self.weighting.coefficients(rewards, self.spread, step).to(residuals.delta)
        per_group = coefficients.expand(-1, num_groups)
        per_view = per_group.repeat_interleave(candidates.group_size, dim=1)[..., None, None, None]
        weight = self.residual.weight(self._frozen.prior.noise_schedule, candidates.t)
        return weight * (per_view * residuals.delta).sum(0)


class _Denoiser:
    """Asks the prior about all candidates under several texts in one batched call, and counts what that costs."""

    def __init__(self, prior: Prior, candidates: Candidates, cameras: Cameras | None) -> None:
        self._prior = prior
        self._candidates = candidates
        self._cameras = cameras
        self.num_calls = 0

    def __call__(self, *texts: Float[Tensor, "b tokens dim"]) -> list[Float[Tensor, "k b c h w"]]:
        noised, k = self._candidates.noised, len(self._candidates.noised)
        times = k * len(texts)
        predicted = self._prior.predict_noise(
            noised.flatten(0, 1).repeat(len(texts), 1, 1, 1),
            self._candidates.t.repeat(times),
            torch.cat([text.repeat(k, 1, 1) for text in texts]),
            None if self._cameras is None else self._cameras.repeat(times),
        )
        self.num_calls += len(predicted)
        return list(predicted.view(len(texts), *noised.shape))


class _Pull(torch.autograd.Function):
    """A loss whose gradient is a given one over the number of views; its value is that of MVDream's loss,
    ``0.5 |pull|^2`` over the number of views."""

    @staticmethod
    def forward(ctx: Any, latents: Float[Tensor, "b c h w"], pull: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
        ctx.save_for_backward(pull)
        return pull.square().sum() / (2 * len(latents))

    @staticmethod
    def backward(ctx: Any, outer: Float[Tensor, ""]) -> tuple[Tensor, None]:
        (pull,) = ctx.saved_tensors
        return outer * pull / len(pull), None


def _check(weighting: Weighting, reward: Reward | None, negative: NegativeEmbeddingConfig | None) -> None:
    if weighting.needs_rewards and reward is None:
        raise ValueError(f"{type(weighting).__name__} compares candidates by a reward; give one")
    if negative is None:
        return
    match negative.objective:
        case NegativeObjective.IMPLICIT_REWARD:
            if weighting.num_candidates != 2 or not weighting.needs_rewards:
                raise ValueError(
                    "the negative embedding's implicit reward needs a winner and a loser: "
                    "use the preference weighting, or the objective reward_ascent"
                )
        case NegativeObjective.REWARD_ASCENT:
            if reward is None or not reward.differentiable:
                raise ValueError("the negative embedding's reward ascent needs a differentiable reward; give one")
