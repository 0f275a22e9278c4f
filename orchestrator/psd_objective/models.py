"""Frozen models from their settings: the prior, the rewards, the oracle."""

from __future__ import annotations

from collections.abc import Callable

import torch

from orchestrator.experiment_config.priors import MultiviewPriorConfig, PriorConfig, StableDiffusionPriorConfig
from orchestrator.experiment_config.rewards import (
    AestheticConfig,
    BlipVqaConfig,
    ClipPreferenceConfig,
    ClipScoreConfig,
    EnsembleConfig,
    FunctionConfig,
    ImageRewardConfig,
    Reward3DConfig,
    RewardConfig,
    SingleRewardConfig,
)
from orchestrator.psd_inputs import oracle_folder, prior_folder, reward_folder
from orchestrator.psd_objective.compilation import excuse_compiling
from psd.priors.base import Prior
from psd.priors.multiview import MultiviewPrior
from psd.priors.stable_diffusion import StableDiffusionPrior
from psd.rewards.aesthetic import AestheticReward
from psd.rewards.base import Reward
from psd.rewards.clip_preference import ClipPreferenceReward
from psd.rewards.ensemble import EnsembleMember, EnsembleReward
from psd.rewards.function import FunctionReward
from psd.rewards.image_reward import ImageReward
from psd.rewards.reward3d import Reward3D
from psd.rewards.vqa import BlipVqaReward
from psd.toybox.oracle import Oracle

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build_prior(config: PriorConfig, group_size: int, device: torch.device) -> Prior:
    folder, dtype = prior_folder(config.path), _DTYPES[config.dtype]
    previewer = None if config.previewer is None else prior_folder(config.previewer)
    if config.compile:
        excuse_compiling()
    match config:
        case MultiviewPriorConfig():
            return MultiviewPrior.from_pretrained(
                folder,
                previewer=previewer,
                dtype=dtype,
                device=device,
                group_size=group_size,
                compile_unet=config.compile,
                vae_slicing=config.vae_slicing,
            )
        case StableDiffusionPriorConfig():
            return StableDiffusionPrior.from_pretrained(
                folder,
                previewer=previewer,
                dtype=dtype,
                device=device,
                compile_unet=config.compile,
                vae_slicing=config.vae_slicing,
            )


def build_reward(config: RewardConfig, load: Callable[[SingleRewardConfig], Reward]) -> Reward:
    """``load`` gives the models, so that they stay warm while weights of an ensemble are searched."""
    match config:
        case EnsembleConfig(members=members):
            return EnsembleReward(
                [
                    EnsembleMember(reward=load(member.reward), weight=member.weight, mean=member.mean, std=member.std)
                    for member in members.values()
                ]
            )
        case _:
            return load(config)


def load_reward(config: SingleRewardConfig, device: torch.device) -> Reward:
    if isinstance(config, FunctionConfig):
        return FunctionReward.from_entry_point(config.name)
    folder, dtype = reward_folder(config.path), _DTYPES[config.dtype]
    match config:
        case ClipPreferenceConfig() | ClipScoreConfig():
            return ClipPreferenceReward.from_pretrained(
                folder,
                processor=None if config.processor is None else reward_folder(config.processor),
                scaled=isinstance(config, ClipPreferenceConfig),
                dtype=dtype,
                device=device,
            )
        case ImageRewardConfig():
            return ImageReward.from_pretrained(folder, dtype=dtype, device=device)
        case AestheticConfig():
            return AestheticReward.from_pretrained(folder, config.head, dtype=dtype, device=device)
        case BlipVqaConfig():
            return BlipVqaReward.from_pretrained(folder, dtype=dtype, device=device)
        case Reward3DConfig():
            return Reward3D.from_pretrained(folder, dtype=dtype, device=device)


def build_oracle(path: str) -> Oracle:
    return Oracle.from_pretrained(oracle_folder(path))
