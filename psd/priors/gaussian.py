"""A prior whose optimal denoiser is known in closed form: the oracle of the tests, and a world without weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from psd.cameras import Cameras
from psd.priors.base import Adapter, NoiseSchedule


class GaussianPrior:
    """Images are distributed as ``x ~ N(mu(text), std^2 I)``, with ``mu`` linear in the mean token; latents are pixels.

    A prompt's embedding is random but fixed by its letters.
    """

    def __init__(
        self,
        *,
        image_size: int = 4,
        std: float = 0.5,
        num_tokens: int = 3,
        text_dim: int = 8,
        group_size: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.noise_schedule = NoiseSchedule.scaled_linear()
        self.group_size = group_size
        self.std = std
        self._latent_shape = (3, image_size, image_size)
        self._text_shape = (num_tokens, text_dim)
        generator = torch.Generator().manual_seed(0)
        self._to_mean = torch.randn(text_dim, 3 * image_size**2, generator=generator, dtype=dtype) / text_dim**0.5

    def embed(self, prompts: Sequence[str]) -> Float[Tensor, "b tokens dim"]:
        return torch.stack([self._embed(prompt) for prompt in prompts])

    def overflow(self, prompt: str) -> str:
        return ""

    def encode(self, rgb: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        return rgb

    def decode(self, z: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        return z

    def preview(self, z: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        return self.decode(z).detach()

    def mean(self, text: Float[Tensor, "b tokens dim"]) -> Float[Tensor, "b 3 h w"]:
        flat: Tensor = text.mean(1) @ self._to_mean
        return flat.view(-1, *self._latent_shape)

    def predict_noise(
        self,
        z_t: Float[Tensor, "b 3 h w"],
        t: Int[Tensor, " b"],
        text: Float[Tensor, "b tokens dim"],
        cameras: Cameras | None,
    ) -> Float[Tensor, "b 3 h w"]:
        return self.posterior_noise(z_t, t, self.mean(text))

    def posterior_noise(
        self, z_t: Float[Tensor, "b 3 h w"], t: Int[Tensor, " b"], mean: Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, "b 3 h w"]:
        """``E[eps | z_t] = sigma (z_t - alpha mu) / (alpha^2 std^2 + sigma^2)``."""
        alpha, sigma = self.noise_schedule.alpha(t), self.noise_schedule.sigma(t)
        return sigma * (z_t - alpha * mean) / (alpha**2 * self.std**2 + sigma**2)

    def make_adapter(self, rank: int) -> GaussianAdapter:
        return GaussianAdapter(self)

    def _embed(self, prompt: str) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:7])
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self._text_shape, generator=generator, dtype=self._to_mean.dtype)


class GaussianAdapter(Adapter):
    """A shift of the mean, whatever the rank: all that the prior leaves to be learned about one scene."""

    def __init__(self, prior: GaussianPrior) -> None:
        super().__init__()
        self._prior = prior
        self.shift = nn.Parameter(torch.zeros_like(prior.mean(prior.embed([""]))[0]))

    def forward(
        self,
        z_t: Float[Tensor, "b 3 h w"],
        t: Int[Tensor, " b"],
        text: Float[Tensor, "b tokens dim"],
        cameras: Cameras | None,
    ) -> Float[Tensor, "b 3 h w"]:
        return self._prior.posterior_noise(z_t, t, self._prior.mean(text) + self.shift)
