"""Pictures straight from the prior: DDIM samples for its evaluation, one-step guesses as losers for the rewards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DDIMScheduler
from jaxtyping import Float
from torch import Tensor

from psd.cameras import Cameras
from psd.priors.multiview import MultiviewPrior
from psd.toybox.train.preferences import Guesses
from psd.toybox.train.prior import Latents


@torch.inference_mode()
def ddim_sample(
    prior: MultiviewPrior,
    scheduler: DDIMScheduler,
    prompts: Sequence[str],
    phrase: str,
    cameras: Cameras,
    generator: torch.Generator,
    guidance_scale: float = 5.0,
    num_inference_steps: int = 30,
) -> Float[Tensor, "v 3 h w"]:
    """One group of views a prompt, all denoised at once; ``cameras`` holds ``group_size`` views for each prompt."""
    size = cameras.group_size
    text = torch.cat([prior.embed([phrase] * len(prompts)), prior.embed([f"{p}, {phrase}" for p in prompts])])
    text = text.repeat_interleave(size, dim=0)
    twice = Cameras(
        c2w=cameras.c2w.repeat(2, 1, 1),
        fov_deg=cameras.fov_deg.repeat(2),
        height=cameras.height,
        width=cameras.width,
        group_size=size,
    )
    z = torch.randn((len(cameras), *prior.encode(torch.zeros(1, 3, 32, 32)).shape[1:]), generator=generator)
    scheduler.set_timesteps(num_inference_steps)
    for step in scheduler.timesteps:
        t = step.repeat(len(z))
        negative, positive = prior.predict_noise(z.repeat(2, 1, 1, 1), t.repeat(2), text, twice).chunk(2)
        noise = negative + guidance_scale * (positive - negative)
        previous = int(step) - scheduler.config.num_train_timesteps // num_inference_steps
        z_0 = prior.noise_schedule.denoised(z, noise, t)
        if previous < 0:
            return prior.decode(z_0)
        z = prior.noise_schedule.add_noise(z_0, noise, t.new_full(t.shape, previous))
    raise AssertionError("the last step of a DDIM schedule lies at t = 0")


@torch.inference_mode()
def one_step_guesses(prior: MultiviewPrior, data: Latents, num_scenes: int, seed: int) -> Guesses:
    """For each of ``num_scenes`` scenes three noise levels: the guided one-step estimate of z_0, decoded."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(data.z), generator=generator)[:num_scenes]
    pictures, levels, owners = [], [], []
    for index in chosen.tolist():
        z = data.z[index]
        t = (150 + 840 * torch.rand(3, generator=generator)).long().repeat_interleave(len(z))
        guidance = float(1 + 9 * torch.rand((), generator=generator))
        noise = torch.randn((3 * len(z), *z.shape[1:]), generator=generator)
        z_t = prior.noise_schedule.add_noise(z.repeat(3, 1, 1, 1), noise, t)
        phrase = data.phrases[index]
        text = prior.embed([phrase, f"{data.descriptions[index]}, {phrase}"]).repeat_interleave(len(z_t), dim=0)
        predicted = prior.predict_noise(
            z_t.repeat(2, 1, 1, 1), t.repeat(2), text, _conditioned(data.cameras[index].repeat(6, 1))
        )
        negative, positive = predicted.chunk(2)
        z_0 = prior.noise_schedule.denoised(z_t, negative + guidance * (positive - negative), t)
        pictures.append((prior.decode(z_0) * 255).round().to(torch.uint8))
        levels.append(t.float())
        owners += [index] * len(z_t)
    return Guesses(torch.cat(pictures), torch.cat(levels), tuple(owners))


def _conditioned(conditioning: Float[Tensor, "b 16"]) -> Cameras:
    """Cameras with a given conditioning; their pictures' size and field of view play no part in it."""
    return Cameras(
        c2w=conditioning.unflatten(1, (4, 4)),
        fov_deg=torch.full((len(conditioning),), 40.0),
        height=32,
        width=32,
        group_size=4,
    )
