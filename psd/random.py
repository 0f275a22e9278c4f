"""Random numbers from explicit generators, drawn on the generator's device so that a resumed run draws the same."""

from __future__ import annotations

import torch
from torch import Tensor


def forked_devices(device: torch.device) -> list[torch.device]:
    """What ``torch.random.fork_rng`` is to fork beside the CPU: left alone, it wakes every GPU of the machine."""
    return [device] if device.type == "cuda" else []


def uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator, device=generator.device)


def normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers of ``like``'s type and on its device, which is not waited for."""
    drawn = torch.randn(shape, generator=generator, device=generator.device)
    return drawn.to(like.device, like.dtype, non_blocking=True)
