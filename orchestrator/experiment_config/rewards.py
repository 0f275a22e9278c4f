"""The settings of `rewards`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ClipPreferenceConfig:
    """A CLIP-style preference reward, in transformers' folder layout."""

    kind: Literal["clip_preference"] = "clip_preference"
    path: str


RewardConfig = ClipPreferenceConfig
