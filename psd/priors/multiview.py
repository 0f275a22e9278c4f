"""Multi-view diffusion in MVDream's form, from a checkpoint folder in diffusers' format.

The network is diffusers' own UNet: cameras enter as class embeddings, and self-attention runs across the views of a
group (MVDream, arXiv 2308.16512, section 3.1).
"""

from __future__ import annotations

import os

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from jaxtyping import Float, Int
from torch import Tensor, nn

from psd.cameras import Cameras
from psd.priors.latent_diffusion import LatentDiffusionParts, LatentDiffusionPrior


class MultiviewPrior(LatentDiffusionPrior):
    """A frozen camera-conditioned latent diffusion model that denoises ``group_size`` views together.

    Without cameras it is an ordinary single-image model, as MVDream is in its 2D mode. Sets the UNet's attention
    processors and wraps its class embedding.
    """

    def __init__(
        self, parts: LatentDiffusionParts, *, group_size: int = 4, compile_unet: bool = False, vae_slicing: bool = False
    ) -> None:
        parts.unet.set_attn_processor(CrossViewAttention())
        parts.unet.class_embedding = OptionalCameraEmbedding(parts.unet.class_embedding)
        super().__init__(parts, group_size=group_size, compile_unet=compile_unet, vae_slicing=vae_slicing)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        previewer: str | os.PathLike[str] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        group_size: int = 4,
        compile_unet: bool = False,
        vae_slicing: bool = False,
    ) -> MultiviewPrior:
        """Loads safetensors from a local folder; never from the network.

        ``previewer`` is a folder with a tiny autoencoder for the same latents, such as TAESD.

        Raises:
            ValueError: the folder, a file in it or its weights are missing, or it holds another kind of model.
        """
        parts = LatentDiffusionParts.from_pretrained(
            folder, "multiview", previewer=previewer, dtype=dtype, device=device
        )
        return cls(parts, group_size=group_size, compile_unet=compile_unet, vae_slicing=vae_slicing)

    def predict_noise(
        self,
        z_t: Float[Tensor, "b c lh lw"],
        t: Int[Tensor, " b"],
        text: Float[Tensor, "b tokens dim"],
        cameras: Cameras | None,
    ) -> Float[Tensor, "b c lh lw"]:
        """Raises:
        ValueError: the cameras do not come in groups of ``group_size``.
        """
        if cameras is not None and (cameras.group_size != self.group_size or len(cameras) % self.group_size):
            raise ValueError(
                f"this prior denoises {self.group_size} views together, got {len(cameras)} cameras in groups of "
                f"{cameras.group_size}; set group_size={self.group_size} in the camera sampler"
            )
        return self._denoise(
            z_t,
            t,
            text,
            class_labels=z_t.new_empty(len(z_t), 0) if cameras is None else cameras.conditioning().to(z_t.device),
            cross_attention_kwargs={"num_views": 1 if cameras is None else self.group_size},
        )


class CrossViewAttention:
    """diffusers' attention, with self-attention joined over ``num_views`` consecutive images of the batch."""

    def __init__(self) -> None:
        self._attend = AttnProcessor2_0()

    def __call__(
        self,
        attn: Attention,
        hidden_states: Float[Tensor, "b l c"],
        encoder_hidden_states: Float[Tensor, "b tokens dim"] | None = None,
        attention_mask: Tensor | None = None,
        num_views: int = 1,
    ) -> Float[Tensor, "b l c"]:
        joins = encoder_hidden_states is None
        queries = hidden_states.unflatten(0, (-1, num_views)).flatten(1, 2) if joins else hidden_states
        attended: Tensor = self._attend(attn, queries, encoder_hidden_states, attention_mask)
        return attended.reshape(hidden_states.shape)


class OptionalCameraEmbedding(nn.Module):
    """The camera's embedding, or zero for labels of width 0, which stand for "no camera".

    diffusers insists on class labels once a model has a class embedding; a zero leaves the time embedding as it is.
    """

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, labels: Float[Tensor, "b camera"]) -> Float[Tensor, "b dim"] | Float[Tensor, "b 1"]:
        embedding: Tensor = self.projection(labels) if labels.shape[1] else labels.new_zeros(len(labels), 1)
        return embedding
