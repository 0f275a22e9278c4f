"""What torch computes on here."""

from __future__ import annotations

import torch


def held_gpu_bytes() -> int:
    """What this process's tensors hold of its GPU; 0 without one."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
