"""The settings of `distillation`: which residual, which weighting, and the negative embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from orchestrator.experiment_config.schedules import ScheduleConfig, check_within, ends
from orchestrator.schema import ConfigError, Count, Fraction, Positive, Range, WholeNumber

LearningDecay = Annotated[float, Range(above=0, high=1)]


@dataclass(frozen=True, kw_only=True)
class NoiseResidualConfig:
    """Score distillation sampling: predicted minus added noise."""

    kind: Literal["noise"] = "noise"


@dataclass(frozen=True, kw_only=True)
class X0ReconstructionConfig:
    """MVDream's residual: latents minus the prior's one-step estimate of the clean ones."""

    kind: Literal["x0_reconstruction"] = "x0_reconstruction"
    rescale: Fraction = 0.5


ResidualConfig = NoiseResidualConfig | X0ReconstructionConfig


@dataclass(frozen=True, kw_only=True)
class SingleWeightingConfig:
    """One noise candidate: plain SDS or MVDream."""

    kind: Literal["single"] = "single"


@dataclass(frozen=True, kw_only=True)
class PreferenceWeightingConfig:
    """Two noise candidates, the winner's residual favoured: PSD."""

    kind: Literal["preference"] = "preference"
    scale: ScheduleConfig = 1.0
    scaling: Literal["constant", "bradley_terry", "gap", "normalized"] = "normalized"
    temperature: Positive = 1.0

    def __post_init__(self) -> None:
        if (least := min(ends(self.scale))) < 0:
            raise ConfigError("scale", f"must be >= 0; got {least:g}; 0 turns preference guidance off")


WeightingConfig = SingleWeightingConfig | PreferenceWeightingConfig


@dataclass(frozen=True, kw_only=True)
class NegativeEmbeddingConfig:
    """When and how fast the negative text embedding is optimised."""

    enabled: bool = False
    objective: Literal["implicit_reward", "reward_ascent"] = "implicit_reward"
    start: WholeNumber = 0
    interval: Count = 1
    stop: WholeNumber | None = None
    lr: Positive = 1e-3
    lr_decay: LearningDecay = 1.0  # per update
    max_norm: Positive = 8.0
    beta: Positive = 5000.0

    def __post_init__(self) -> None:
        if self.stop is not None and self.stop <= self.start:
            raise ConfigError("stop", f"must be > start ({self.start}) or null; got {self.stop}")


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    guidance_scale: ScheduleConfig = 7.5
    residual: ResidualConfig = X0ReconstructionConfig()
    weighting: WeightingConfig = PreferenceWeightingConfig()
    negative_embedding: NegativeEmbeddingConfig = NegativeEmbeddingConfig()
    min_t: ScheduleConfig = 0.02  # both as fractions of the prior's number of timesteps
    max_t: ScheduleConfig = 0.98

    def __post_init__(self) -> None:
        for name in ("min_t", "max_t"):
            check_within(name, ends(getattr(self, name)), Range(low=0, high=1))
        if isinstance(self.min_t, float) and isinstance(self.max_t, float) and self.min_t > self.max_t:
            raise ConfigError("min_t", f"must be <= max_t ({self.max_t:g}); got {self.min_t:g}")
        negative, weighting = self.negative_embedding, self.weighting
        if negative.enabled and negative.objective == "implicit_reward" and weighting.kind != "preference":
            raise ConfigError(
                "negative_embedding.objective",
                "implicit_reward needs winners and losers; set weighting.kind to preference, or use reward_ascent",
            )
