"""The settings of `rewards`: docs/rewards.md says which published checkpoint is which kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orchestrator.schema import ConfigError, Positive


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What every reward from a checkpoint is told."""

    path: str  # a local folder, or the id of a model in the Hugging Face cache
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the networks; heads and scores are float32


@dataclass(frozen=True, kw_only=True)
class ClipPreferenceConfig(CheckpointConfig):
    """A CLIPModel whose cosine is scaled by its learned temperature: PickScore, and the built-in rewards."""

    kind: Literal["clip_preference"] = "clip_preference"
    processor: str | None = None  # a folder with tokenizer and preprocessor_config.json, where `path` has none


@dataclass(frozen=True, kw_only=True)
class ClipScoreConfig(CheckpointConfig):
    """A CLIPModel's cosine as it is: HPSv2.1, CLIP score."""

    kind: Literal["clip_score"] = "clip_score"
    processor: str | None = None


@dataclass(frozen=True, kw_only=True)
class ImageRewardConfig(CheckpointConfig):
    kind: Literal["image_reward"] = "image_reward"


@dataclass(frozen=True, kw_only=True)
class AestheticConfig(CheckpointConfig):
    """LAION's predictor: a head on a CLIPModel's embedding of the image."""

    kind: Literal["aesthetic"] = "aesthetic"
    head: str  # the published file


@dataclass(frozen=True, kw_only=True)
class BlipVqaConfig(CheckpointConfig):
    kind: Literal["blip_vqa"] = "blip_vqa"


@dataclass(frozen=True, kw_only=True)
class Reward3DConfig(CheckpointConfig):
    """Judges the four views of a camera group together."""

    kind: Literal["reward3d"] = "reward3d"


@dataclass(frozen=True, kw_only=True)
class FunctionConfig:
    """A function that an installed package offers as an entry point; it cannot be differentiated."""

    kind: Literal["function"] = "function"
    name: str

    def __post_init__(self) -> None:
        if ":" in self.name or "." in self.name:
            raise ConfigError(
                "name",
                f"must be an entry point's name, not where code is (a sweep file imports nothing); got {self.name!r}",
            )


SingleRewardConfig = (
    ClipPreferenceConfig
    | ClipScoreConfig
    | ImageRewardConfig
    | AestheticConfig
    | BlipVqaConfig
    | Reward3DConfig
    | FunctionConfig
)


@dataclass(frozen=True, kw_only=True)
class EnsembleMemberConfig:
    reward: SingleRewardConfig
    weight: Positive = 1.0
    mean: float = 0.0  # with `std`, what makes its scores comparable with the others'
    std: Positive = 1.0


@dataclass(frozen=True, kw_only=True)
class EnsembleConfig:
    """The weighted mean of standardised rewards."""

    kind: Literal["ensemble"] = "ensemble"
    members: dict[str, EnsembleMemberConfig]

    def __post_init__(self) -> None:
        if not self.members:
            raise ConfigError("members", "must name at least one reward")


RewardConfig = SingleRewardConfig | EnsembleConfig


def single_rewards(config: RewardConfig, key: str) -> dict[str, SingleRewardConfig]:
    """The rewards that a reward is made of, by where their settings stand."""
    if isinstance(config, EnsembleConfig):
        return {f"{key}.members.{name}.reward": member.reward for name, member in config.members.items()}
    return {key: config}


def is_differentiable(config: RewardConfig) -> bool:
    return not any(isinstance(reward, FunctionConfig) for reward in single_rewards(config, "").values())


def views_together(config: RewardConfig) -> int:
    """How many views of an object it judges together."""
    return 4 if any(isinstance(reward, Reward3DConfig) for reward in single_rewards(config, "").values()) else 1
