"""What torch computes on here."""

from __future__ import annotations

import torch


def describe_device() -> str:
    """What torch would compute on here."""
    if torch.cuda.is_available():
        return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return f"no GPU (torch {torch.__version__}, {torch.get_num_threads()} threads)"


def held_gpu_bytes() -> int:
    """What this process's tensors hold of its GPU; 0 without one."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
