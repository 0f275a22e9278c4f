"""Distillation: from rendered views to the gradient that moves them to where the prior, and the reward, want them.

One step of every method draws K noises, gets K residuals and, where the weighting asks for them, K rewards:
``grad_z = w(t) sum_k a_k delta_k``. Shapes: k = noise candidates, b = views, g = groups of views, c h w = latents.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from psd.cameras import Cameras
from psd.distillation.denoising import Denoiser
from psd.distillation.gradients import LOSS_SCALE, GivenGradient
from psd.distillation.learned_score import LearnedScore, LearnedScoreConfig
from psd.distillation.negative_embedding import (
    ImplicitReward,
    NegativeEmbedding,
    NegativeEmbeddingConfig,
    NegativeObjective,
)
from psd.distillation.perp_neg import push_away
from psd.distillation.residuals import Candidates, Predictions, Residual, Residuals, guide
from psd.distillation.reward_gradient import RewardGradientConfig, add_reward_loss, reward_loss
from psd.distillation.weightings import RunningSpread, SingleWeighting, Weighting
from psd.phases import phase
from psd.priors.base import AdaptablePrior, Prior
from psd.prompts import PromptEmbeddings
from psd.random import normal, uniform
from psd.rewards.base import Reward
from psd.schedules import Constant, Schedule, Steps

_UNWANTED = "unwanted "  # with a number, names the prediction under a text of ``PromptEmbeddings.unwanted``


@dataclass(frozen=True, eq=False)
class DistillationLoss:
    """``total`` carries the gradient; ``terms`` is for the log."""

    total: Float[Tensor, ""]
    terms: dict[str, Float[Tensor, ""]]
    unet_calls: int  # views denoised, once for each candidate and text: the unit in which methods' costs compare


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """When a weighting that needs rewards gets them, and what they look at.

    On all other steps one noise is taken as it is, which costs a K-th of the UNet calls.
    """

    steps: Steps = Steps()
    num_ddim_steps: int = 0  # that a candidate at pure noise is denoised with; 0 for the one-step estimate

    def __post_init__(self) -> None:
        if self.num_ddim_steps < 0:
            raise ValueError(f"num_ddim_steps must be >= 0, got {self.num_ddim_steps}")


@dataclass(frozen=True)
class _FrozenModels:
    """Keeps the models out of sight of ``nn.Module``, which would put their weights into checkpoints."""

    prior: Prior
    reward: Reward | None


@dataclass(frozen=True, eq=False)
class _Comparison:
    """What the predictions with the moved negative embedding are compared with, and the leaf that they come from."""

    text: Float[Tensor, "k b tokens dim"]
    reference: Float[Tensor, "k b c h w"]


class Distillation(nn.Module):
    """A residual and a weighting, with an optional reward gradient and an optional negative embedding.

    Candidates of a group share a timestep, drawn between ``min_t`` and ``max_t`` (fractions of the prior's timesteps).
    Rewards of a candidate are averaged over its group's views: a group wins or loses as a whole. The state dict is its
    own small state only.

    Raises:
        ValueError: a part needs a reward, a differentiable one, ranked candidates or a prior that can be adapted, which
            are not there.
    """

    def __init__(
        self,
        *,
        prior: Prior,
        residual: Residual,
        weighting: Weighting,
        reward: Reward | None = None,
        ranking: Ranking = Ranking(),
        reward_gradient: RewardGradientConfig | None = None,
        negative_embedding: NegativeEmbeddingConfig | None = None,
        learned_score: LearnedScoreConfig = LearnedScoreConfig(),
        min_t: Schedule = Constant(0.02),
        max_t: Schedule = Constant(0.98),
    ) -> None:
        super().__init__()
        _check_reward(weighting, reward, reward_gradient)
        if negative_embedding is not None:
            _check_negative(weighting, reward, ranking, negative_embedding)
        self.residual = residual
        self.weighting = weighting
        self.ranking = ranking
        self.reward_gradient = reward_gradient
        self.min_t = min_t
        self.max_t = max_t
        self.spread = RunningSpread()
        self.negative_embedding: NegativeEmbedding | None = None
        if negative_embedding is not None:
            self.negative_embedding = NegativeEmbedding(negative_embedding, like=prior.embed([""])[0])
        self.learned_score: LearnedScore | None = None
        if residual.needs_learned_score:
            self.learned_score = LearnedScore(learned_score, _adaptable(prior))
        self._frozen = _FrozenModels(prior, reward)

    def forward(
        self,
        rgb: Float[Tensor, "_b 3 h w"],
        prompt: PromptEmbeddings,
        cameras: Cameras | None,
        step: int,
        generator: torch.Generator,
    ) -> DistillationLoss:
        """``cameras`` is None in 2D, where every image is a group of its own, or one image is all of them: there are
        as many groups as texts.

        Without a reward gradient, the gradient of ``total`` with respect to the latents is ``w(t) sum_k a_k delta_k``
        divided by the number of views: a sum over values and a mean over views, as in threestudio.
        """
        prior = self._frozen.prior
        with phase("encode"):
            latents = prior.encode(rgb)
        if cameras is None:
            latents = latents.expand(len(prompt.positive), -1, -1, -1)
        group_size = 1 if cameras is None else cameras.group_size
        is_ranked = self.weighting.needs_rewards and step in self.ranking.steps
        weighting = self.weighting if is_ranked else SingleWeighting()
        update = self._due_update(step, is_ranked)
        candidates = self._draw(latents.detach(), weighting.num_candidates, group_size, step, generator)
        denoise = Denoiser(prior, cameras)
        predictions, implicit = self._predict(denoise, candidates, prompt, cameras, update, step)
        residuals = self.residual(candidates, predictions, prior.noise_schedule, step)
        rewards = (
            self._score(residuals, candidates, predictions, denoise, prompt, update, step)
            if (is_ranked or update is not None)
            else None
        )
        terms: dict[str, Tensor] = {"t": candidates.t.float().mean() / prior.noise_schedule.num_timesteps}
        if rewards is not None:
            scores = rewards.detach()
            terms["reward"] = scores.mean()
            if is_ranked:
                terms["reward_gap"] = (scores.amax(0) - scores.amin(0)).mean()
        if self.negative_embedding is not None:
            terms |= self._move_negative(update, implicit, rewards, step)
        num_calls = denoise.num_calls
        if self.learned_score is not None:
            with phase("learned score"):
                terms["learned_score_loss"], terms["learned_score_gradient"] = self.learned_score.update(
                    latents.detach(), prompt.positive, cameras, generator
                )
            num_calls += candidates.noise[:, :, 0, 0, 0].numel() + len(latents)
        ranks = rewards.detach() if is_ranked and rewards is not None else None
        pull = self._combine(weighting, candidates, residuals, ranks, step)
        value = pull.square().sum() / (2 * len(pull))  # that of MVDream's loss
        total: Tensor = GivenGradient.apply(latents, pull / len(pull), value)  # type: ignore[no-untyped-call]
        terms["distillation"] = value
        total, direct = self._add_reward_gradient(total, rgb, latents, residuals, candidates, prompt.prompt, step)
        return DistillationLoss(total, terms | direct, num_calls)

    def _due_update(self, step: int, is_ranked: bool) -> NegativeEmbedding | None:
        """The negative embedding, if this step updates it: an implicit reward needs ranked candidates."""
        negative = self.negative_embedding
        if negative is None or not negative.is_due(step):
            return None
        ascends = negative.config.objective is NegativeObjective.REWARD_ASCENT
        return negative if ascends or is_ranked else None

    def _draw(
        self,
        latents: Float[Tensor, "b c h w"],
        num_candidates: int,
        group_size: int,
        step: int,
        generator: torch.Generator,
    ) -> Candidates:
        schedule, k = self._frozen.prior.noise_schedule, num_candidates
        drawn_t = self._draw_t(len(latents) // group_size, step, generator)
        t = drawn_t.repeat_interleave(group_size).to(latents.device, non_blocking=True)
        noise = normal((k, *latents.shape), latents, generator)
        noised = schedule.add_noise(latents.repeat(k, 1, 1, 1), noise.flatten(0, 1), t.repeat(k)).view_as(noise)
        return Candidates(latents, t, drawn_t, noise, noised, group_size)

    def _draw_t(self, num_groups: int, step: int, generator: torch.Generator) -> Int[Tensor, " g"]:
        low, high = self.min_t(step), self.max_t(step)
        if not 0 <= low <= high <= 1:
            raise ValueError(f"need 0 <= min_t <= max_t <= 1, got {low:.4g} and {high:.4g} at step {step}")
        last = self._frozen.prior.noise_schedule.num_timesteps - 1
        first_t, last_t = int(low * last), int(high * last)
        return uniform((num_groups,), first_t, last_t + 1, generator).long().clamp(max=last_t)

    def _predict(
        self,
        denoise: Denoiser,
        candidates: Candidates,
        prompt: PromptEmbeddings,
        cameras: Cameras | None,
        update: NegativeEmbedding | None,
        step: int,
    ) -> tuple[Predictions, ImplicitReward | None]:
        """Predictions, and what the implicit reward makes of them if it is due.

        The negative prediction carries a graph only where the embedding climbs a reward: that of the implicit reward is
        gone by now, before anything is decoded.
        """
        with phase("unet"):
            predictions, comparison = self._ask(denoise, candidates, prompt, cameras, update)
        if comparison is None:
            return predictions, None
        with phase("negative"):
            implicit = ImplicitReward.measure(
                positive=predictions.positive,
                moved=predictions.negative,
                reference=comparison.reference,
                noise=candidates.noise,
                text=comparison.text,
                guidance_scale=self.residual.guidance_scale(step),
                group_size=candidates.group_size,
            )
        return replace(predictions, negative=predictions.negative.detach()), implicit

    def _ask(
        self,
        denoise: Denoiser,
        candidates: Candidates,
        prompt: PromptEmbeddings,
        cameras: Cameras | None,
        update: NegativeEmbedding | None,
    ) -> tuple[Predictions, _Comparison | None]:
        noised, t = candidates.noised, candidates.t
        learned = None
        if self.learned_score is not None:
            learned = self.learned_score.predict(noised, t, prompt.positive, cameras)
        texts = {"positive": prompt.positive}
        if self.residual.needs_null and (self.negative_embedding is not None or prompt.null is not prompt.negative):
            texts["null"] = prompt.null
        if prompt.unwanted is not None:
            texts |= {f"{_UNWANTED}{i}": text for i, text in enumerate(prompt.unwanted.texts)}
        if update is None:
            texts["negative"] = self._negative(prompt)
        predicted = dict(zip(texts, denoise(noised, t, *texts.values()), strict=True))
        comparison = None
        if update is not None and update.config.objective is NegativeObjective.REWARD_ASCENT:
            (predicted["negative"],) = denoise(noised, t, prompt.negative + update.offset)
        elif update is not None:
            # Two calls of one shape: where the texts are equal, so are the predictions, whatever the precision; unless
            # the UNet is compiled, for each of the two by itself.
            (reference,) = denoise(noised, t, prompt.negative)
            moved = self._negative(prompt).repeat(len(noised), 1, 1, 1).requires_grad_()
            (predicted["negative"],) = denoise(noised, t, moved)
            comparison = _Comparison(moved, reference)
        return Predictions(**_away_from_other_views(predicted, prompt), learned=learned), comparison

    def _negative(self, prompt: PromptEmbeddings) -> Float[Tensor, "b tokens dim"]:
        """The negative prompt's embedding as it is now."""
        negative = self.negative_embedding
        return prompt.negative if negative is None else prompt.negative + negative.offset.detach()

    def _score(
        self,
        residuals: Residuals,
        candidates: Candidates,
        predictions: Predictions,
        denoise: Denoiser,
        prompt: PromptEmbeddings,
        update: NegativeEmbedding | None,
        step: int,
    ) -> Float[Tensor, "k g"]:
        """The candidates' rewards, with a graph where the negative embedding climbs them.

        Otherwise they are decoded and scored one after another, so that their number adds nothing to the memory.
        """
        prior, reward = self._frozen.prior, self._frozen.reward
        assert reward is not None
        denoised = residuals.denoised
        if self.ranking.num_ddim_steps:
            scale = self.residual.guidance_scale(step)
            with phase("unet"):
                denoised = denoise.follow_ddim(
                    candidates,
                    guide(predictions.positive, predictions.negative, scale).detach(),
                    prompt.positive,
                    self._negative(prompt),
                    guidance_scale=scale,
                    num_steps=self.ranking.num_ddim_steps,
                )
        ascends = update is not None and update.config.objective is NegativeObjective.REWARD_ASCENT
        scores = []
        with torch.set_grad_enabled(ascends):
            for part in [denoised.flatten(0, 1)] if ascends else denoised:
                with phase("decode"):
                    rgb = prior.decode(part) if ascends else prior.preview(part)
                with phase("reward"):
                    scores.append(reward(rgb, [prompt.prompt] * len(rgb)))
        return torch.cat(scores).view(len(denoised), -1, candidates.group_size).mean(-1)

    def _move_negative(
        self,
        update: NegativeEmbedding | None,
        implicit: ImplicitReward | None,
        rewards: Float[Tensor, "k g"] | None,
        step: int,
    ) -> dict[str, Float[Tensor, ""]]:
        """The terms of the negative embedding, which has been updated if that is due."""
        assert self.negative_embedding is not None
        if update is None:
            return {"negative_drift": self.negative_embedding.drift}
        assert rewards is not None
        with phase("negative"):
            if implicit is None:
                value = -rewards.mean()
                gradient = torch.autograd.grad(LOSS_SCALE * value, update.offset)[0] / LOSS_SCALE
                terms = {"negative_loss": value.detach()}
            else:
                loss = implicit.loss(rewards, update.config.beta)
                gradient = loss.gradient
                terms = {"negative_loss": loss.value, "negative_factor": loss.factor}
            update.update(gradient, step)
        return terms | {"negative_drift": update.drift}

    @torch.no_grad()
    def _combine(
        self,
        weighting: Weighting,
        candidates: Candidates,
        residuals: Residuals,
        rewards: Float[Tensor, "k g"] | None,
        step: int,
    ) -> Float[Tensor, "b c h w"]:
        num_groups = len(candidates.latents) // candidates.group_size

        def weighted(coefficients: Tensor, parts: Float[Tensor, "k b c h w"]) -> Float[Tensor, "b c h w"]:
            per_group = coefficients.to(parts.device, parts.dtype, non_blocking=True).expand(-1, num_groups)
            per_view = per_group.repeat_interleave(candidates.group_size, dim=1)[..., None, None, None]
            return (per_view * parts).sum(0)

        coefficients = weighting.coefficients(rewards, self.spread, step)
        pull = weighted(coefficients.delta, residuals.delta)
        if coefficients.unguided is not None:
            pull = pull + weighted(coefficients.unguided, residuals.unguided)
        if coefficients.reference is not None:
            pull = pull + weighted(coefficients.reference, residuals.reference)
        return self.residual.weight(self._frozen.prior.noise_schedule, candidates.t) * pull

    def _add_reward_gradient(
        self,
        distillation: Float[Tensor, ""],
        rgb: Float[Tensor, "_b 3 h w"],
        latents: Float[Tensor, "b c lh lw"],
        residuals: Residuals,
        candidates: Candidates,
        prompt: str,
        step: int,
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        config, reward = self.reward_gradient, self._frozen.reward
        if config is None or step not in config.steps:
            return distillation, {}
        assert reward is not None
        found = reward_loss(
            config,
            reward=reward,
            prior=self._frozen.prior,
            prompt=prompt,
            rgb=rgb,
            latents=latents,
            denoised=residuals.denoised,
            candidates=candidates,
        )
        total, factor = add_reward_loss(config, distillation, found.loss, rgb, step)
        return total, {"direct_reward": found.mean, "direct_loss": found.loss.detach(), "direct_factor": factor}


def _away_from_other_views(
    predicted: dict[str, Float[Tensor, "k b c h w"]], prompt: PromptEmbeddings
) -> dict[str, Float[Tensor, "k b c h w"]]:
    """The predictions, with those under unwanted texts worked into the positive one."""
    if prompt.unwanted is None:
        return predicted
    kept = {name: value for name, value in predicted.items() if not name.startswith(_UNWANTED)}
    unwanted = torch.stack([value for name, value in predicted.items() if name.startswith(_UNWANTED)])
    positive = push_away(predicted["positive"], predicted["negative"].detach(), unwanted, prompt.unwanted.weights)
    return kept | {"positive": positive}


def _check_reward(weighting: Weighting, reward: Reward | None, gradient: RewardGradientConfig | None) -> None:
    if weighting.needs_rewards and reward is None:
        raise ValueError(f"{type(weighting).__name__} compares candidates by a reward; give one")
    if gradient is not None and (reward is None or not reward.differentiable):
        raise ValueError("the reward gradient needs a differentiable reward; give one, or a method that only ranks")


def _check_negative(
    weighting: Weighting, reward: Reward | None, ranking: Ranking, negative: NegativeEmbeddingConfig
) -> None:
    match negative.objective:
        case NegativeObjective.IMPLICIT_REWARD:
            if not weighting.needs_rewards:
                raise ValueError(
                    "the negative embedding's implicit reward needs a winner and a loser: "
                    "use a weighting that ranks candidates, or the objective reward_ascent"
                )
        case NegativeObjective.REWARD_ASCENT:
            if reward is None or not reward.differentiable:
                raise ValueError("the negative embedding's reward ascent needs a differentiable reward; give one")
            if ranking.num_ddim_steps:
                raise ValueError(
                    "the negative embedding's reward ascent goes through the one-step estimate; set num_ddim_steps to 0"
                )


def _adaptable(prior: Prior) -> AdaptablePrior:
    if not isinstance(prior, AdaptablePrior):
        raise ValueError(f"{type(prior).__name__} cannot learn the renders' score; choose a residual other than VSD's")
    return prior
