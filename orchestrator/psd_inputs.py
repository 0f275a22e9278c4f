"""What must be there before psd can start: prompts that its prior understands, checkpoint folders with weights.

Loads no torch, so that a slip is told within a second, and before any worker starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from orchestrator.experiment_config.experiment import ExperimentConfig
from orchestrator.schema import ConfigError
from psd import toybox
from psd.checkpoint_files import check_folder, check_weights
from psd.toybox import grammar

TOYBOX = "toybox"


def check_inputs(experiment: ExperimentConfig, prompts: Sequence[str]) -> None:
    """Raises:
    ConfigError: a prompt outside the built-in grammar, a checkpoint that is missing or incomplete.
    """
    if _is_built_in(experiment.prior.path):
        for i, prompt in enumerate(prompts):
            try:
                grammar.parse(prompt)
            except ValueError as error:
                raise ConfigError(f"prompts[{i}]", str(error)) from None
    _check_prior(prior_folder(experiment.prior.path))
    for name, reward in experiment.rewards.items():
        _check_model(reward_folder(reward.path), f"rewards.{name}.path", "reward in transformers' layout")
    if experiment.evaluation.oracle is not None:
        folder = oracle_folder(experiment.evaluation.oracle)
        _check_model(folder, "evaluation.oracle", "classifier of the built-in world")


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
        return Path(path).expanduser()
    shipped = Path(toybox.__file__).parent / "checkpoints"
    return shipped / (path.partition("/")[2] or default)


def _check_prior(folder: Path) -> None:
    try:
        check_folder(folder, kind="multi-view prior in diffusers' layout")
        for part, weights in (
            ("unet", "diffusion_pytorch_model.safetensors"),
            ("vae", "diffusion_pytorch_model.safetensors"),
            ("text_encoder", "model.safetensors"),
        ):
            check_weights(folder / part, weights)
    except ValueError as error:
        raise ConfigError("prior.path", str(error)) from None


def _check_model(folder: Path, key: str, kind: str) -> None:
    try:
        check_folder(folder, kind=kind)
        check_weights(folder, "model.safetensors")
    except ValueError as error:
        raise ConfigError(key, str(error)) from None
