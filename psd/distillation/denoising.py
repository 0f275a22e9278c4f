"""Asking the prior: noise predictions of many candidates under several texts, and their denoising in a few steps.

Shapes: k = noise candidates, b = views, g = groups of views, c h w = latents.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from psd.cameras import Cameras
from psd.distillation.residuals import Candidates, guide
from psd.priors.base import Prior


class Denoiser:
    """Asks the prior about all candidates under several texts in one batched call, and counts what that costs."""

    def __init__(self, prior: Prior, cameras: Cameras | None) -> None:
        self._prior = prior
        self._cameras = cameras
        self.num_calls = 0

    def __call__(
        self,
        noised: Float[Tensor, "k b c h w"],
        t: Int[Tensor, " b"],
        *texts: Float[Tensor, "b tokens dim"] | Float[Tensor, "k b tokens dim"],
    ) -> list[Float[Tensor, "k b c h w"]]:
        """A text is one for all candidates, or each has its own."""
        k = len(noised)
        times = k * len(texts)
        predicted = self._prior.predict_noise(
            noised.flatten(0, 1).repeat(len(texts), 1, 1, 1),
            t.repeat(times),
            torch.cat([text.expand(k, *text.shape[-3:]).flatten(0, 1) for text in texts]),
            None if self._cameras is None else self._cameras.repeat(times),
        )
        self.num_calls += len(predicted)
        return list(predicted.view(len(texts), *noised.shape))

    @torch.no_grad()
    def follow_ddim(
        self,
        candidates: Candidates,
        guided: Float[Tensor, "k b c h w"],
        positive: Float[Tensor, "b tokens dim"],
        negative: Float[Tensor, "b tokens dim"],
        *,
        guidance_scale: float,
        num_steps: int,
    ) -> Float[Tensor, "k b c h w"]:
        """The candidates' clean latents by deterministic DDIM (arXiv 2010.02502, equation 12), from where they are.

        ``num_steps`` would be those from pure noise; a candidate at timestep ``t`` gets its share of them, evenly
        spaced down to 0. ``guided``, the prediction that the residual needs anyway, makes the first one free.
        """
        schedule, k = self._prior.noise_schedule, len(guided)
        share = int(candidates.drawn_t.max()) / schedule.num_timesteps
        num_own = max(math.ceil(num_steps * share), 1)
        clean = candidates.denoised(guided, schedule)
        for num_left in range(num_own - 1, 0, -1):
            t = candidates.t * num_left // num_own
            z_t = schedule.add_noise(clean.flatten(0, 1), guided.flatten(0, 1), t.repeat(k))
            good, bad = self(z_t.view_as(clean), t, positive, negative)
            guided = guide(good, bad, guidance_scale)
            clean = schedule.denoised(z_t, guided.flatten(0, 1), t.repeat(k)).view_as(clean)
        return clean
