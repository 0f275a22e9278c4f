"""What must be there before psd can start: prompts that its prior understands, checkpoint folders with weights.

Loads no torch, so that a slip is told within a second, and before any worker starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.experiment_config.experiment import ExperimentConfig
from orchestrator.experiment_config.rewards import (
    AestheticConfig,
    BlipVqaConfig,
    ClipPreferenceConfig,
    ClipScoreConfig,
    FunctionConfig,
    ImageRewardConfig,
    Reward3DConfig,
    SingleRewardConfig,
    single_rewards,
)
from orchestrator.published_weights import PublishedWeights, published
from orchestrator.schema import ConfigError
from psd import toybox
from psd.checkpoint_files import check_file, check_folder, check_weights, find_folder
from psd.priors.diffusers_folder import check_previewer_folder, check_prior_folder
from psd.rewards.entry_points import find_function
from psd.rewards.reward_folder import check_processor_folder, check_reward_folder
from psd.toybox import grammar

TOYBOX = "toybox"
_ARCHITECTURES: dict[type, str] = {
    ClipPreferenceConfig: "CLIPModel",
    ClipScoreConfig: "CLIPModel",
    AestheticConfig: "CLIPModel",
    ImageRewardConfig: "ImageReward",
    BlipVqaConfig: "BlipForQuestionAnswering",
    Reward3DConfig: "Reward3D",
}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that an experiment names, and whether it can be used."""

    key: str  # where the experiment names it
    path: str  # as it is named there
    folder: Path  # where that is on this machine
    problem: str  # what is wrong with it; empty for nothing

    @property
    def published(self) -> PublishedWeights | None:
        return published(self.path)


def check_inputs(experiment: ExperimentConfig, prompts: Sequence[str]) -> None:
    """Raises:
    ConfigError: a prompt outside the built-in grammar, checkpoints that are missing, incomplete or of the wrong kind.
    """
    is_built_in = _is_built_in(experiment.prior.path)
    if is_built_in or experiment.evaluation.oracle is not None:
        for i, prompt in enumerate(prompts):
            try:
                grammar.parse(prompt)
            except ValueError as error:
                remedy = "" if is_built_in else "; evaluation.oracle=null takes any prompt"
                raise ConfigError(f"prompts[{i}]", f"{error}{remedy}") from None
    broken = [checkpoint for checkpoint in checkpoints(experiment) if checkpoint.problem]
    if broken:
        raise ConfigError(broken[0].key, _report(broken))


def checkpoints(experiment: ExperimentConfig) -> Iterator[Checkpoint]:
    """All checkpoints that an experiment names, each looked at."""
    prior = experiment.prior
    folder = prior_folder(prior.path)
    yield _look_at("prior.path", prior.path, folder, lambda folder: check_prior_folder(folder, prior.kind))
    if prior.previewer is not None:
        tiny = prior_folder(prior.previewer)
        yield _look_at("prior.previewer", prior.previewer, tiny, lambda tiny: check_previewer_folder(tiny, folder))
    for name, reward in experiment.rewards.items():
        for key, single in single_rewards(reward, f"rewards.{name}").items():
            yield from _reward_checkpoints(key, single)
    oracle = experiment.evaluation.oracle
    if oracle is not None:
        yield _look_at("evaluation.oracle", oracle, oracle_folder(oracle), _check_oracle)


def prior_folder(path: str) -> Path:
    """Where a prior's checkpoint is; ``toybox`` is the one that ships with psd."""
    return _folder(path, "prior")


def reward_folder(path: str) -> Path:
    return _folder(path, "reward")


def oracle_folder(path: str) -> Path:
    return _folder(path, "classifier")


def _is_built_in(path: str) -> bool:
    return path.split("/")[0] == TOYBOX and not Path(path).exists()


def _folder(path: str, default: str) -> Path:
    if not _is_built_in(path):
        return find_folder(path)
    shipped = Path(toybox.__file__).parent / "checkpoints"
    return shipped / (path.partition("/")[2] or default)


def _look_at(key: str, path: str, folder: Path, check: Callable[[Path], object]) -> Checkpoint:
    try:
        check(folder)
    except ValueError as error:
        return Checkpoint(key=key, path=path, folder=folder, problem=str(error))
    return Checkpoint(key=key, path=path, folder=folder, problem="")


def _reward_checkpoints(key: str, reward: SingleRewardConfig) -> Iterator[Checkpoint]:
    """What a reward is loaded from; for a function, the package that offers it."""
    if isinstance(reward, FunctionConfig):
        yield _look_at(f"{key}.name", reward.name, Path(reward.name), lambda name: _check_function(str(name)))
        return
    folder, has_processor = reward_folder(reward.path), True
    if isinstance(reward, ClipPreferenceConfig | ClipScoreConfig) and reward.processor is not None:
        has_processor = False
        yield _look_at(f"{key}.processor", reward.processor, reward_folder(reward.processor), check_processor_folder)
    if isinstance(reward, AestheticConfig):
        yield _look_at(f"{key}.head", reward.head, Path(reward.head).expanduser(), check_file)
    architecture, reads_text = _ARCHITECTURES[type(reward)], not isinstance(reward, AestheticConfig)
    yield _look_at(
        f"{key}.path",
        reward.path,
        folder,
        lambda folder: check_reward_folder(folder, architecture, has_processor=has_processor, reads_text=reads_text),
    )


def _check_function(name: str) -> None:
    find_function(name)


def _check_oracle(folder: Path) -> None:
    check_folder(folder, kind="classifier of the built-in world")
    check_weights(folder, "model.safetensors")


def _report(broken: Sequence[Checkpoint]) -> str:
    """What is wrong with each, and how to get those that somebody has published."""
    lines = [broken[0].problem, *(f"{checkpoint.key}: {checkpoint.problem}" for checkpoint in broken[1:])]
    known = {entry.path: entry for checkpoint in broken if (entry := checkpoint.published) is not None}
    for entry in known.values():
        lines += ["", *how_to_get(entry)]
    return "\n".join(lines)


def how_to_get(entry: PublishedWeights) -> list[str]:
    """A published checkpoint's id, size and mirrors, and the commands that fetch it."""
    mirrors = f"; the same at {', '.join(entry.mirrors)}" if entry.mirrors else ""
    return [f"{entry.title}: {entry.hub_id}, {entry.size_gb:g} GB{mirrors}", *(f"  {line}" for line in entry.commands)]
