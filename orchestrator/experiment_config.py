"""What one optimisation is made of, as plain frozen dataclasses: the schema of `experiment` files.

The classes of ``psd`` are built from these in ``psd_objective`` by ``match`` on the config's type; nothing here imports
torch. A setting that a file leaves out has the default that stands here; docs/sweep-files.md explains each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from orchestrator.schema import ConfigError, Count, Fraction, NonNegative, Positive, Range, WholeNumber, parse

GridSize = Annotated[int, Range(low=2)]
LearningDecay = Annotated[float, Range(above=0, high=1)]


@dataclass(frozen=True, kw_only=True)
class MultiviewPriorConfig:
    """A camera-conditioned diffusion model with attention across views, in diffusers' folder layout."""

    kind: Literal["multiview"] = "multiview"
    path: str


@dataclass(frozen=True, kw_only=True)
class ClipPreferenceConfig:
    """A CLIP-style preference reward, in transformers' folder layout."""

    kind: Literal["clip_preference"] = "clip_preference"
    path: str


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    kind: Literal["linear"] = "linear"
    start: float
    end: float
    start_step: WholeNumber = 0
    end_step: Count

    def __post_init__(self) -> None:
        _check_steps(self.start_step, self.end_step)


@dataclass(frozen=True, kw_only=True)
class CosineConfig:
    kind: Literal["cosine"] = "cosine"
    start: float
    end: float
    start_step: WholeNumber = 0
    end_step: Count

    def __post_init__(self) -> None:
        _check_steps(self.start_step, self.end_step)


@dataclass(frozen=True, kw_only=True)
class PiecewiseConfig:
    """Straight lines between ``(step, value)`` knots."""

    kind: Literal["piecewise"] = "piecewise"
    knots: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        steps = [step for step, _ in self.knots]
        if not steps or sorted(set(steps)) != steps:
            raise ConfigError("knots", f"must be [step, value] pairs with rising steps; got the steps {steps}")


ScheduleConfig = float | LinearConfig | CosineConfig | PiecewiseConfig


def _ends(schedule: ScheduleConfig) -> tuple[float, ...]:
    """Values between which a schedule stays."""
    match schedule:
        case LinearConfig(start=start, end=end) | CosineConfig(start=start, end=end):
            return (start, end)
        case PiecewiseConfig(knots=knots):
            return tuple(value for _, value in knots)
        case float(value):
            return (value,)


def _check_within(key: str, values: tuple[float, ...], allowed: Range) -> None:
    for value in values:
        if value not in allowed:
            raise ConfigError(key, f"must be {allowed}; got {value:g}")


@dataclass(frozen=True, kw_only=True)
class VoxelGridConfig:
    """See ``psd.scenes.voxel_grid.VoxelGridConfig``, which has the same settings and defaults."""

    kind: Literal["voxel_grid"] = "voxel_grid"
    resolution: GridSize = 40
    coarse_resolution: GridSize = 20
    coarse_steps: WholeNumber = 50
    num_samples: GridSize = 48
    density_scale: Positive = 10.0
    blob_density: Positive = 10.0
    blob_radius: Positive = 0.2
    lr_density: Positive = 0.2
    lr_color: Positive = 0.1
    sparsity: NonNegative = 0.0
    opacity_entropy: NonNegative = 0.0
    smoothness: NonNegative = 0.0
    ramp_steps: WholeNumber = 100

    def __post_init__(self) -> None:
        if self.coarse_resolution > self.resolution:
            raise ConfigError(
                "coarse_resolution", f"must be <= resolution ({self.resolution}); got {self.coarse_resolution}"
            )


@dataclass(frozen=True, kw_only=True)
class FlatBackgroundConfig:
    """White, grey or black, drawn each step and named in the prompt."""

    kind: Literal["flat"] = "flat"


@dataclass(frozen=True, kw_only=True)
class LearnedBackgroundConfig:
    """An MLP on the ray direction, replaced by one random colour half of the time (MVDream's recipe)."""

    kind: Literal["learned"] = "learned"
    lr: Positive = 1e-3


@dataclass(frozen=True, kw_only=True)
class CamerasConfig:
    height: Count = 32
    width: Count = 32
    num_groups: Count = 1
    group_size: Count = 4  # views that the prior denoises together
    elevation_deg: tuple[float, float] = (10.0, 35.0)
    fov_deg: tuple[float, float] = (40.0, 40.0)
    distance_scale: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        for name in ("elevation_deg", "fov_deg", "distance_scale"):
            low, high = getattr(self, name)
            if low > high:
                raise ConfigError(name, f"must be [low, high] with low <= high; got [{low:g}, {high:g}]")
        _check_within("elevation_deg", self.elevation_deg, Range(low=-90, high=90))
        if self.fov_deg[0] <= 0 or self.fov_deg[1] >= 180:
            raise ConfigError("fov_deg", f"must lie between 0 and 180; got {list(self.fov_deg)}")
        _check_within("distance_scale", self.distance_scale, Range(above=0))


@dataclass(frozen=True, kw_only=True)
class NoiseResidualConfig:
    """Score distillation sampling: predicted minus added noise."""

    kind: Literal["noise"] = "noise"


@dataclass(frozen=True, kw_only=True)
class X0ReconstructionConfig:
    """MVDream's residual: latents minus the prior's one-step estimate of the clean ones."""

    kind: Literal["x0_reconstruction"] = "x0_reconstruction"
    rescale: Fraction = 0.5


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
        if (least := min(_ends(self.scale))) < 0:
            raise ConfigError("scale", f"must be >= 0; got {least:g}; 0 turns preference guidance off")


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
    residual: NoiseResidualConfig | X0ReconstructionConfig = X0ReconstructionConfig()
    weighting: SingleWeightingConfig | PreferenceWeightingConfig = PreferenceWeightingConfig()
    negative_embedding: NegativeEmbeddingConfig = NegativeEmbeddingConfig()
    min_t: ScheduleConfig = 0.02  # both as fractions of the prior's number of timesteps
    max_t: ScheduleConfig = 0.98

    def __post_init__(self) -> None:
        for name in ("min_t", "max_t"):
            _check_within(name, _ends(getattr(self, name)), Range(low=0, high=1))
        if isinstance(self.min_t, float) and isinstance(self.max_t, float) and self.min_t > self.max_t:
            raise ConfigError("min_t", f"must be <= max_t ({self.max_t:g}); got {self.min_t:g}")
        negative, weighting = self.negative_embedding, self.weighting
        if negative.enabled and negative.objective == "implicit_reward" and weighting.kind != "preference":
            raise ConfigError(
                "negative_embedding.objective",
                "implicit_reward needs winners and losers; set weighting.kind to preference, or use reward_ascent",
            )


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    num_steps: Count = 200
    log_every: Count = 10  # steps a worker does before it reports


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    num_views: Count = 8
    every: Count = 100
    picture_size: Count = 96  # of the views in contact sheets and turntables
    oracle: str | None = None  # the built-in world's judge of colour and shape


@dataclass(frozen=True, kw_only=True)
class PromptingConfig:
    negative: str = ""
    view_dependent: bool = False


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """One optimisation, apart from its prompt and its seed."""

    prior: MultiviewPriorConfig
    rewards: dict[str, ClipPreferenceConfig]  # `train` is optimised; the others are held out and only asked
    scene: VoxelGridConfig = VoxelGridConfig()
    background: FlatBackgroundConfig | LearnedBackgroundConfig = FlatBackgroundConfig()
    cameras: CamerasConfig = CamerasConfig()
    distillation: DistillationConfig = DistillationConfig()
    optimization: OptimizationConfig = OptimizationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    prompting: PromptingConfig = PromptingConfig()
    checkpoint_every: Count = 50

    def __post_init__(self) -> None:
        if "train" not in self.rewards:
            raise ConfigError("rewards.train", "is missing; it is the reward that preference guidance listens to")

        if self.evaluation.num_views % self.cameras.group_size:
            size, views = self.cameras.group_size, self.evaluation.num_views
            raise ConfigError("evaluation.num_views", f"must be a multiple of cameras.group_size ({size}); got {views}")

    @property
    def metrics(self) -> dict[str, str]:
        """What a run ends with: the short name that `objective.metric` uses, and the name in the logs."""
        names = ["reward", *(name for name in self.rewards if name != "train"), "agreement", "floaters", "fog"]
        names += ["color", "shape"] if self.evaluation.oracle else []
        return {name: f"eval/{name}" for name in names} | {"seconds": "seconds"}


def experiment(config: Mapping[str, Any]) -> ExperimentConfig:
    """The experiment of a RunSpec's plain config."""
    return parse(ExperimentConfig, config)


def _check_steps(start_step: int, end_step: int) -> None:
    if end_step <= start_step:
        raise ConfigError("end_step", f"must be > start_step ({start_step}); got {end_step}")
