"""The settings of `prior`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class MultiviewPriorConfig:
    """A camera-conditioned diffusion model with attention across views, in diffusers' folder layout."""

    kind: Literal["multiview"] = "multiview"
    path: str


PriorConfig = MultiviewPriorConfig
