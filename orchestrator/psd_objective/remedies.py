"""What a run's settings can do about the errors that a step ends in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from orchestrator.experiment_config.experiment import ExperimentConfig


@contextmanager
def with_remedies(config: ExperimentConfig) -> Iterator[None]:
    """Lets errors through with the settings that avert them added: numbers that overflow, memory that is not there."""
    try:
        yield
    except FloatingPointError as error:
        if config.prior.dtype != "float16":
            raise
        raise FloatingPointError(
            f"{error}; float16 overflows where bfloat16 does not: set prior.dtype=bfloat16"
        ) from error
    except torch.OutOfMemoryError as error:
        wish = str(error).partition(". GPU")[0]
        raise torch.OutOfMemoryError(
            f"{wish}; what lowers it: prior.dtype=bfloat16 ({config.prior.dtype} now), prior.vae_slicing=true "
            f"({str(config.prior.vae_slicing).lower()} now), fewer cameras.num_groups ({config.cameras.num_groups} "
            f"now), smaller cameras.height and cameras.width ({config.cameras.height} and {config.cameras.width} now)"
        ) from error
