"""Frozen models from their settings: the prior, the rewards, the oracle."""

from __future__ import annotations

import torch

from orchestrator.experiment_config.priors import PriorConfig
from orchestrator.experiment_config.rewards import RewardConfig
from orchestrator.psd_inputs import oracle_folder, prior_folder, reward_folder
from psd.priors.base import Prior
from psd.priors.multiview import MultiviewPrior
from psd.rewards.base import Reward
from psd.rewards.clip_preference import ClipPreferenceReward
from psd.toybox.oracle import Oracle


def build_prior(config: PriorConfig, group_size: int, device: torch.device) -> Prior:
    return MultiviewPrior.from_pretrained(prior_folder(config.path), device=device, group_size=group_size)


def build_reward(config: RewardConfig, device: torch.device) -> Reward:
    return ClipPreferenceReward.from_pretrained(reward_folder(config.path), device=device)


def build_oracle(path: str) -> Oracle:
    return Oracle.from_pretrained(oracle_folder(path))
