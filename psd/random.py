"""Random numbers from explicit generators, drawn on the generator's device so that a resumed run draws the same."""

from __future__ import annotations

import torch
from torch import Tensor


def forked_devices(device: torch.device) -> list[torch.device]:
    """What ``torch.random.fork_rng`` is to fork beside the CPU: left alone, it wakes every GPU of the machine."""
    return [device] if device.type == "cuda" else []


def uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator, device=generator.device)


def is_pinned(like: Tensor, generator: torch.Generator) -> bool:
    """Whether numbers are drawn into memory that CUDA reads by itself: for others, if they are many, the CPU waits."""
    return like.is_cuda and generator.device.type == "cpu"


def normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers of ``like``'s type and on its device, which is not waited for."""
    drawn = torch.randn(shape, generator=generator, device=generator.device, pin_memory=is_pinned(like, generator))
    return drawn.to(like.device, like.dtype, non_blocking=True)
