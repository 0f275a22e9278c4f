"""Judging a scene from views that no optimisation step has drawn."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from psd.cameras import Cameras, CameraSampler
from psd.evaluation.consistency import agreement
from psd.evaluation.floaters import floater_share, fog
from psd.rewards.base import Reward
from psd.scenes.base import Field, Render


def held_out_cameras(sampler: CameraSampler, num_views: int = 8) -> Cameras:
    """A full turn at the middle of the sampler's elevations."""
    return sampler.evenly(num_views, sum(sampler.elevation_deg) / 2)


@torch.no_grad()
def mean_rewards(render: Render, prompt: str, rewards: Mapping[str, Reward]) -> dict[str, float]:
    """``eval/NAME`` for every reward: its mean over the views."""
    prompts = [prompt] * len(render.rgb)
    return {f"eval/{name}": float(reward(render.rgb, prompts).mean()) for name, reward in rewards.items()}


def geometry_scores(render: Render, cameras: Cameras, field: Field) -> dict[str, float]:
    """``eval/agreement`` between views, ``eval/floaters`` and ``eval/fog``, each in [0, 1]."""
    return {
        "eval/agreement": agreement(render, cameras),
        "eval/floaters": floater_share(field),
        "eval/fog": fog(render.opacity),
    }
