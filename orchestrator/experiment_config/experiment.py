"""One optimisation as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.experiment_config.cameras import CamerasConfig
from orchestrator.experiment_config.distillation import DistillationConfig
from orchestrator.experiment_config.priors import MultiviewPriorConfig, PriorConfig
from orchestrator.experiment_config.rewards import RewardConfig, is_differentiable, views_together
from orchestrator.experiment_config.scenes import (
    BackgroundConfig,
    FlatBackgroundConfig,
    ImageConfig,
    SceneConfig,
    VoxelGridConfig,
)
from orchestrator.experiment_config.schedules import check_order
from orchestrator.schema import ConfigError, Count, parse


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    num_steps: Count = 200
    log_every: Count = 10  # steps between two rows of metrics.jsonl


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
    perp_neg: bool = False

    def __post_init__(self) -> None:
        if self.perp_neg and not self.view_dependent:
            raise ConfigError("perp_neg", "needs view_dependent: true; it is about the prompts of different views")


RESERVED_NAMES = ("reward", "gap", "agreement", "floaters", "fog", "color", "shape", "seconds")


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """One optimisation, apart from its prompt and its seed."""

    prior: PriorConfig
    rewards: dict[str, RewardConfig]  # `train` is optimised; the others are held out and only asked
    scene: SceneConfig = VoxelGridConfig()
    background: BackgroundConfig = FlatBackgroundConfig()
    cameras: CamerasConfig = CamerasConfig()
    distillation: DistillationConfig = DistillationConfig()
    optimization: OptimizationConfig = OptimizationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    prompting: PromptingConfig = PromptingConfig()

    def __post_init__(self) -> None:
        if "train" not in self.rewards:
            raise ConfigError("rewards.train", "is missing; it is the reward that preference guidance listens to")
        if self.prompting.perp_neg and isinstance(self.prior, MultiviewPriorConfig):
            raise ConfigError(
                "prompting.perp_neg", "must be false with prior.kind multiview, which is told the cameras"
            )
        if isinstance(self.scene, ImageConfig):
            self._check_2d(self.scene)
        self._check_prior()
        self._check_rewards()
        min_t, max_t = self.distillation.min_t, self.distillation.max_t
        check_order("distillation.min_t", min_t, "max_t", max_t, self.optimization.num_steps)
        if self.evaluation.num_views % self.cameras.group_size:
            size, views = self.cameras.group_size, self.evaluation.num_views
            raise ConfigError("evaluation.num_views", f"must be a multiple of cameras.group_size ({size}); got {views}")

        for name in self.rewards:
            if name in RESERVED_NAMES:
                raise ConfigError(f"rewards.{name}", "is the name of a metric already; choose another")
        every, log_every = self.evaluation.every, self.optimization.log_every
        if every % log_every:
            raise ConfigError(
                "evaluation.every",
                f"must be a multiple of optimization.log_every ({log_every}), at which steps alone "
                f"evaluations are made; got {every}",
            )

    @property
    def curve_metrics(self) -> tuple[str, ...]:
        """The short names of what every evaluation measures; `gap` is `reward` minus the mean of the held-out ones."""
        held_out = [name for name in self.rewards if name != "train"]
        oracle = ["color", "shape"] if self.evaluation.oracle else []
        return ("reward", *held_out, *(["gap"] if held_out else []), *oracle)

    @property
    def metrics(self) -> dict[str, str]:
        """What a run ends with: the short name that `objective.metric` uses, and the name in the logs."""
        geometry = () if isinstance(self.scene, ImageConfig) else ("agreement", "floaters", "fog")
        names = [*self.curve_metrics, *geometry]
        return {name: f"eval/{name}" for name in names} | {"seconds": "seconds"}

    def _check_prior(self) -> None:
        if self.prior.compile and self.distillation.residual.kind == "variational":
            message = "must be false with distillation.residual.kind variational, which trains within the network"
            raise ConfigError("prior.compile", message)

    def _check_rewards(self) -> None:
        size = self.cameras.group_size
        for name, reward in self.rewards.items():
            if (views := views_together(reward)) not in (1, size):
                message = f"judges {views} views together, those of a camera group; set cameras.group_size to {views}"
                raise ConfigError(f"rewards.{name}", f"{message}, got {size}")
        distillation = self.distillation
        ascends = distillation.negative_embedding.enabled
        ascends = ascends and distillation.negative_embedding.objective == "reward_ascent"
        if (ascends or distillation.reward_gradient.enabled) and not is_differentiable(self.rewards["train"]):
            needs = "negative_embedding.objective reward_ascent" if ascends else "distillation.reward_gradient"
            raise ConfigError("rewards.train", f"is a function, which has no gradient; {needs} needs one")

    def _check_2d(self, scene: ImageConfig) -> None:
        """A picture has no sides, and nothing shows behind it."""
        smallest = min(self.cameras.height, self.cameras.width)
        if smallest < 2**scene.num_levels:
            message = f"must be at most log2 of cameras.height and cameras.width ({smallest}); got {scene.num_levels}"
            raise ConfigError("scene.num_levels", message)
        if self.cameras.group_size != 1:
            message = (
                f"must be 1 with scene.kind image, where every picture stands alone; got {self.cameras.group_size}"
            )
            raise ConfigError("cameras.group_size", message)
        if self.prompting.view_dependent:
            raise ConfigError("prompting.view_dependent", "must be false with scene.kind image: a picture has no sides")
        if self.background.kind == "learned":
            message = "must be flat or none with scene.kind image: nothing shows behind a picture; got learned"
            raise ConfigError("background.kind", message)


def experiment(config: Mapping[str, Any]) -> ExperimentConfig:
    """The experiment of a RunSpec's plain config."""
    return parse(ExperimentConfig, config)
