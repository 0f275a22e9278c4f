"""Stable Diffusion 1.x, 2.x and models of the same form, from a checkpoint folder in diffusers' format."""

from __future__ import annotations

import os

import torch
from jaxtyping import Float, Int
from torch import Tensor

from psd.cameras import Cameras
from psd.priors.latent_diffusion import LatentDiffusionParts, LatentDiffusionPrior


class StableDiffusionPrior(LatentDiffusionPrior):
    """A frozen text-to-image latent diffusion model that denoises each view on its own and knows no cameras."""

    def __init__(self, parts: LatentDiffusionParts, *, compile_unet: bool = False, vae_slicing: bool = False) -> None:
        super().__init__(parts, group_size=1, compile_unet=compile_unet, vae_slicing=vae_slicing)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        previewer: str | os.PathLike[str] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        compile_unet: bool = False,
        vae_slicing: bool = False,
    ) -> StableDiffusionPrior:
        """Loads safetensors from a local folder; never from the network.

        ``previewer`` is a folder with a tiny autoencoder for the same latents, such as TAESD.

        Raises:
            ValueError: the folder, a file in it or its weights are missing, or it holds another kind of model.
        """
        parts = LatentDiffusionParts.from_pretrained(
            folder, "stable_diffusion", previewer=previewer, dtype=dtype, device=device
        )
        return cls(parts, compile_unet=compile_unet, vae_slicing=vae_slicing)

    def predict_noise(
        self,
        z_t: Float[Tensor, "b c lh lw"],
        t: Int[Tensor, " b"],
        text: Float[Tensor, "b tokens dim"],
        cameras: Cameras | None,
    ) -> Float[Tensor, "b c lh lw"]:
        """``cameras`` may be there, and is not looked at: views differ by their texts alone."""
        return self._denoise(z_t, t, text)
