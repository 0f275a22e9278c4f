"""Distillations from their settings."""

from __future__ import annotations

from orchestrator.experiment_config.distillation import (
    BestWeightingConfig,
    ClassifierResidualConfig,
    DistillationConfig,
    DreamDpoWeightingConfig,
    MinMaxWeightingConfig,
    NegativeEmbeddingConfig,
    NoiseResidualConfig,
    PreferenceWeightingConfig,
    RankingConfig,
    ResidualConfig,
    RewardGradientConfig,
    SingleWeightingConfig,
    SoftmaxWeightingConfig,
    VariationalResidualConfig,
    WeightingConfig,
    X0ReconstructionConfig,
)
from orchestrator.experiment_config.schedules import build_schedule
from psd.distillation import negative_embedding as negative
from psd.distillation import reward_gradient as direct
from psd.distillation.distillation import Distillation, Ranking
from psd.distillation.learned_score import LearnedScoreConfig
from psd.distillation.residuals import (
    ClassifierResidual,
    NoiseResidual,
    NoiseWeight,
    Residual,
    VariationalResidual,
    X0Reconstruction,
)
from psd.distillation.weightings import (
    BestWeighting,
    DreamDpoVariant,
    DreamDpoWeighting,
    MinMaxWeighting,
    PreferenceBase,
    PreferenceWeighting,
    RewardScaling,
    SingleWeighting,
    SoftmaxWeighting,
    Weighting,
)
from psd.priors.base import Prior
from psd.rewards.base import Reward
from psd.schedules import Schedule, Steps


def build_distillation(config: DistillationConfig, prior: Prior, reward: Reward, num_steps: int) -> Distillation:
    """``num_steps`` are the run's. The weights of a learned score are drawn from torch's global generator.

    Raises:
        ValueError: the reward has no gradient and the method needs one, or the prior cannot be adapted.
    """
    return Distillation(
        prior=prior,
        residual=_residual(config.residual, build_schedule(config.guidance_scale)),
        weighting=_weighting(config.weighting),
        reward=reward,
        ranking=_ranking(config.ranking, num_steps),
        reward_gradient=_reward_gradient(config.reward_gradient, num_steps),
        negative_embedding=_negative_embedding(config.negative_embedding),
        learned_score=_learned_score(config.residual),
        min_t=build_schedule(config.min_t),
        max_t=build_schedule(config.max_t),
    )


def _residual(config: ResidualConfig, guidance_scale: Schedule) -> Residual:
    match config:
        case NoiseResidualConfig(weight=weight):
            return NoiseResidual(guidance_scale=guidance_scale, noise_weight=NoiseWeight(weight))
        case ClassifierResidualConfig(weight=weight, negative_weight=negative_weight):
            return ClassifierResidual(
                guidance_scale=guidance_scale,
                negative_weight=build_schedule(negative_weight),
                noise_weight=NoiseWeight(weight),
            )
        case VariationalResidualConfig(weight=weight):
            return VariationalResidual(guidance_scale=guidance_scale, noise_weight=NoiseWeight(weight))
        case X0ReconstructionConfig(rescale=rescale):
            return X0Reconstruction(guidance_scale=guidance_scale, rescale=rescale)


def _learned_score(config: ResidualConfig) -> LearnedScoreConfig:
    match config:
        case VariationalResidualConfig(rank=rank, lr=lr):
            return LearnedScoreConfig(rank=rank, lr=lr)
        case _:
            return LearnedScoreConfig()


def _weighting(config: WeightingConfig) -> Weighting:
    settings = {name: value for name, value in vars(config).items() if name != "kind"}
    match config:
        case SingleWeightingConfig():
            return SingleWeighting()
        case PreferenceWeightingConfig(scale=scale, scaling=scaling, base=base):
            converted = {
                "scale": build_schedule(scale),
                "scaling": RewardScaling(scaling),
                "base": PreferenceBase(base),
            }
            return PreferenceWeighting(**settings | converted)
        case DreamDpoWeightingConfig(threshold=threshold, variant=variant):
            return DreamDpoWeighting(threshold=threshold, variant=DreamDpoVariant(variant))
        case SoftmaxWeightingConfig():
            return SoftmaxWeighting(**settings)
        case BestWeightingConfig():
            return BestWeighting(**settings)
        case MinMaxWeightingConfig():
            return MinMaxWeighting(**settings)


def _ranking(config: RankingConfig, num_steps: int) -> Ranking:
    stop = round(config.stop_fraction * num_steps)
    return Ranking(steps=Steps(interval=config.interval, stop=stop), num_ddim_steps=config.ddim_steps)


def _reward_gradient(config: RewardGradientConfig, num_steps: int) -> direct.RewardGradientConfig | None:
    if not config.enabled:
        return None
    return direct.RewardGradientConfig(
        weight=build_schedule(config.weight),
        image=direct.RewardImage(config.image),
        balance=direct.RewardBalance(config.balance),
        margin=config.margin,
        max_t=config.max_t,
        steps=Steps(start=round(config.start_fraction * num_steps)),
        alone_from=round(config.alone_fraction * num_steps),
    )


def _negative_embedding(config: NegativeEmbeddingConfig) -> negative.NegativeEmbeddingConfig | None:
    if not config.enabled:
        return None
    settings = {name: value for name, value in vars(config).items() if name not in ("enabled", "objective")}
    return negative.NegativeEmbeddingConfig(objective=negative.NegativeObjective(config.objective), **settings)
