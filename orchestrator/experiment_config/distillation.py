"""The settings of `distillation`: which residual, which weighting, and what comes on top of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from orchestrator.experiment_config.schedules import ScheduleConfig, check_within, ends
from orchestrator.schema import ConfigError, Count, Fraction, NonNegative, Positive, Range, WholeNumber

LearningDecay = Annotated[float, Range(above=0, high=1)]
NoiseWeight = Literal["variance", "uniform", "reconstruction"]
NumCandidates = Annotated[int, Range(low=2)]


@dataclass(frozen=True, kw_only=True)
class NoiseResidualConfig:
    """Score distillation sampling: predicted minus added noise."""

    kind: Literal["noise"] = "noise"
    weight: NoiseWeight = "variance"


@dataclass(frozen=True, kw_only=True)
class ClassifierResidualConfig:
    """Classifier score distillation: what the prompt adds to the prediction."""

    kind: Literal["classifier"] = "classifier"
    weight: NoiseWeight = "variance"
    negative_weight: ScheduleConfig = 1.0

    def __post_init__(self) -> None:
        check_within("negative_weight", ends(self.negative_weight), Range(low=0, high=1))


@dataclass(frozen=True, kw_only=True)
class VariationalResidualConfig:
    """Variational score distillation: predicted noise minus that of a score learned from the renders."""

    kind: Literal["variational"] = "variational"
    weight: NoiseWeight = "variance"
    rank: Count = 4
    lr: Positive = 1e-4


@dataclass(frozen=True, kw_only=True)
class X0ReconstructionConfig:
    """MVDream's residual: latents minus the prior's one-step estimate of the clean ones."""

    kind: Literal["x0_reconstruction"] = "x0_reconstruction"
    rescale: Fraction = 0.5


ResidualConfig = NoiseResidualConfig | ClassifierResidualConfig | VariationalResidualConfig | X0ReconstructionConfig


@dataclass(frozen=True, kw_only=True)
class SingleWeightingConfig:
    """One noise candidate: SDS, MVDream, CSD and VSD."""

    kind: Literal["single"] = "single"


@dataclass(frozen=True, kw_only=True)
class PreferenceWeightingConfig:
    """The best of some noise candidates, and what sets it apart from the worst: PSD."""

    kind: Literal["preference"] = "preference"
    num_candidates: NumCandidates = 2
    base: Literal["winner", "mean"] = "winner"
    scale: ScheduleConfig = 1.0
    scaling: Literal["constant", "bradley_terry", "gap", "normalized"] = "normalized"
    temperature: Positive = 1.0

    def __post_init__(self) -> None:
        if (least := min(ends(self.scale))) < 0:
            raise ConfigError("scale", f"must be >= 0; got {least:g}; 0 turns preference guidance off")


@dataclass(frozen=True, kw_only=True)
class DreamDpoWeightingConfig:
    """Two noise candidates, the loser's residual subtracted from the winner's unless they are close: DreamDPO."""

    kind: Literal["dreamdpo"] = "dreamdpo"
    threshold: NonNegative = 0.0
    variant: Literal["published", "code"] = "published"


@dataclass(frozen=True, kw_only=True)
class SoftmaxWeightingConfig:
    """All candidates, each by the softmax of its reward: RewardSDS."""

    kind: Literal["softmax"] = "softmax"
    num_candidates: NumCandidates = 7
    temperature: Positive = 1.0


@dataclass(frozen=True, kw_only=True)
class BestWeightingConfig:
    """The best candidates only: RewardSDS."""

    kind: Literal["best"] = "best"
    num_candidates: NumCandidates = 7
    num_best: Count = 1

    def __post_init__(self) -> None:
        if self.num_best > self.num_candidates:
            raise ConfigError("num_best", f"must be <= num_candidates ({self.num_candidates}); got {self.num_best}")


@dataclass(frozen=True, kw_only=True)
class MinMaxWeightingConfig:
    """The best candidates less the worst: RewardSDS."""

    kind: Literal["min_max"] = "min_max"
    num_candidates: NumCandidates = 7
    num_best: Count = 2
    num_worst: Count = 2
    best_weight: NonNegative = 0.9
    worst_weight: NonNegative = 0.1

    def __post_init__(self) -> None:
        if (chosen := self.num_best + self.num_worst) > self.num_candidates:
            raise ConfigError(
                "num_candidates", f"must be >= num_best + num_worst ({chosen}); got {self.num_candidates}"
            )


WeightingConfig = (
    SingleWeightingConfig
    | PreferenceWeightingConfig
    | DreamDpoWeightingConfig
    | SoftmaxWeightingConfig
    | BestWeightingConfig
    | MinMaxWeightingConfig
)


@dataclass(frozen=True, kw_only=True)
class RankingConfig:
    """When candidates are ranked by their rewards, and on what; on other steps one noise is taken as it is."""

    interval: Count = 1
    stop_fraction: Fraction = 1.0  # of the run's steps
    ddim_steps: WholeNumber = 0


@dataclass(frozen=True, kw_only=True)
class RewardGradientConfig:
    """The reward's own gradient, beside the distillation's. Fractions are of the run's steps."""

    enabled: bool = False
    weight: ScheduleConfig = 1.0
    image: Literal["render", "denoised", "latents"] = "render"
    balance: Literal["none", "losses", "gradients"] = "gradients"
    margin: float | None = None
    max_t: Fraction = 1.0
    start_fraction: Fraction = 0.0
    alone_fraction: Fraction = 1.0

    def __post_init__(self) -> None:
        check_within("weight", ends(self.weight), Range(low=0))


@dataclass(frozen=True, kw_only=True)
class NegativeEmbeddingConfig:
    """When and how fast the negative text embedding is optimised."""

    enabled: bool = False
    objective: Literal["implicit_reward", "reward_ascent"] = "implicit_reward"
    start: WholeNumber = 0
    interval: Count = 1  # or more, until a step comes that can update it
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
    ranking: RankingConfig = RankingConfig()
    reward_gradient: RewardGradientConfig = RewardGradientConfig()
    negative_embedding: NegativeEmbeddingConfig = NegativeEmbeddingConfig()
    min_t: ScheduleConfig = 0.02  # both as fractions of the prior's number of timesteps
    max_t: ScheduleConfig = 0.98

    def __post_init__(self) -> None:
        for name in ("min_t", "max_t"):
            check_within(name, ends(getattr(self, name)), Range(low=0, high=1))
        if self.negative_embedding.enabled:
            self._check_objective()

    def _check_objective(self) -> None:
        key = "negative_embedding.objective"
        match self.negative_embedding.objective:
            case "implicit_reward":
                if self.weighting.kind == "single":
                    raise ConfigError(
                        key, "implicit_reward needs winners and losers; set another weighting.kind, or reward_ascent"
                    )
            case "reward_ascent":
                if self.ranking.ddim_steps:
                    raise ConfigError(key, "reward_ascent looks at one-step estimates; set ranking.ddim_steps to 0")
