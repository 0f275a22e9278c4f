"""Distillations from their settings."""

from __future__ import annotations

from orchestrator.experiment_config.distillation import (
    DistillationConfig,
    NegativeEmbeddingConfig,
    NoiseResidualConfig,
    PreferenceWeightingConfig,
    ResidualConfig,
    SingleWeightingConfig,
    WeightingConfig,
    X0ReconstructionConfig,
)
from orchestrator.experiment_config.schedules import CosineConfig, LinearConfig, PiecewiseConfig, ScheduleConfig
from psd.distillation import negative_embedding as negative
from psd.distillation.distillation import Distillation
from psd.distillation.residuals import NoiseResidual, Residual, X0Reconstruction
from psd.distillation.weightings import PreferenceWeighting, RewardScaling, SingleWeighting, Weighting
from psd.priors.base import Prior
from psd.rewards.base import Reward
from psd.schedules import Constant, Cosine, Linear, Piecewise, Schedule


def build_distillation(config: DistillationConfig, prior: Prior, reward: Reward) -> Distillation:
    return Distillation(
        prior=prior,
        residual=_residual(config.residual, _schedule(config.guidance_scale)),
        weighting=_weighting(config.weighting),
        reward=reward,
        negative_embedding=_negative_embedding(config.negative_embedding),
        min_t=_schedule(config.min_t),
        max_t=_schedule(config.max_t),
    )


def _residual(config: ResidualConfig, guidance_scale: Schedule) -> Residual:
    match config:
        case NoiseResidualConfig():
            return NoiseResidual(guidance_scale=guidance_scale)
        case X0ReconstructionConfig(rescale=rescale):
            return X0Reconstruction(guidance_scale=guidance_scale, rescale=rescale)


def _weighting(config: WeightingConfig) -> Weighting:
    match config:
        case SingleWeightingConfig():
            return SingleWeighting()
        case PreferenceWeightingConfig(scale=scale, scaling=scaling, temperature=temperature):
            return PreferenceWeighting(scale=_schedule(scale), scaling=RewardScaling(scaling), temperature=temperature)


def _negative_embedding(config: NegativeEmbeddingConfig) -> negative.NegativeEmbeddingConfig | None:
    if not config.enabled:
        return None
    settings = {name: value for name, value in vars(config).items() if name not in ("enabled", "objective")}
    return negative.NegativeEmbeddingConfig(objective=negative.NegativeObjective(config.objective), **settings)


def _schedule(config: ScheduleConfig) -> Schedule:
    match config:
        case LinearConfig(start=start, end=end, start_step=start_step, end_step=end_step):
            return Linear(start=start, end=end, start_step=start_step, end_step=end_step)
        case CosineConfig(start=start, end=end, start_step=start_step, end_step=end_step):
            return Cosine(start=start, end=end, start_step=start_step, end_step=end_step)
        case PiecewiseConfig(knots=knots):
            return Piecewise(knots)
        case float(value):
            return Constant(value)
