"""The settings of `prior`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class LatentDiffusionConfig:
    """What every prior from a diffusers folder is told."""

    path: str  # a local folder, or the id of a model in the Hugging Face cache
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the networks; see psd.priors.latent_diffusion
    compile: bool = False
    vae_slicing: bool = False
    previewer: str | None = None  # a tiny autoencoder that decodes what rewards only rank; None: the prior's own does


@dataclass(frozen=True, kw_only=True)
class MultiviewPriorConfig(LatentDiffusionConfig):
    """A camera-conditioned diffusion model with attention across views: MVDream's form."""

    kind: Literal["multiview"] = "multiview"


@dataclass(frozen=True, kw_only=True)
class StableDiffusionPriorConfig(LatentDiffusionConfig):
    """Stable Diffusion 1.x or 2.x: each view on its own."""

    kind: Literal["stable_diffusion"] = "stable_diffusion"


PriorConfig = MultiviewPriorConfig | StableDiffusionPriorConfig
