"""Frozen models from their settings: the prior, the rewards, the oracle."""

from __future__ import annotations

import torch

from orchestrator.experiment_config.priors import MultiviewPriorConfig, PriorConfig, StableDiffusionPriorConfig
from orchestrator.experiment_config.rewards import RewardConfig
from orchestrator.psd_inputs import oracle_folder, prior_folder, reward_folder
from psd.priors.base import Prior
from psd.priors.multiview import MultiviewPrior
from psd.priors.stable_diffusion import StableDiffusionPrior
from psd.rewards.base import Reward
from psd.rewards.clip_preference import ClipPreferenceReward
from psd.toybox.oracle import Oracle

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build_prior(config: PriorConfig, group_size: int, device: torch.device) -> Prior:
    folder, dtype = prior_folder(config.path), _DTYPES[config.dtype]
    match config:
        case MultiviewPriorConfig():
            return MultiviewPrior.from_pretrained(
                folder,
                dtype=dtype,
                device=device,
                group_size=group_size,
                compile_unet=config.compile,
                vae_slicing=config.vae_slicing,
            )
        case StableDiffusionPriorConfig():
            return StableDiffusionPrior.from_pretrained(
                folder, dtype=dtype, device=device, compile_unet=config.compile, vae_slicing=config.vae_slicing
            )


def build_reward(config: RewardConfig, device: torch.device) -> Reward:
    return ClipPreferenceReward.from_pretrained(reward_folder(config.path), device=device)


def build_oracle(path: str) -> Oracle:
    return Oracle.from_pretrained(oracle_folder(path))
