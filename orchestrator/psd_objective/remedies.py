"""What a run's settings can do about the errors that a step ends in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from orchestrator.experiment_config.experiment import ExperimentConfig
from orchestrator.experiment_config.rewards import FunctionConfig, single_rewards


@contextmanager
def with_remedies(config: ExperimentConfig) -> Iterator[None]:
    """Lets errors through with the settings that avert them added: numbers that overflow, memory that is not there."""
    dtypes = _dtypes(config)
    try:
        yield
    except FloatingPointError as error:
        half = [f"{key}=bfloat16" for key, dtype in dtypes.items() if dtype == "float16"]
        if not half:
            raise
        raise FloatingPointError(f"{error}; float16 overflows where bfloat16 does not: set {' '.join(half)}") from error
    except torch.OutOfMemoryError as error:
        wish = str(error).partition(". GPU")[0]
        wide = [f"{key}=bfloat16 ({dtype} now)" for key, dtype in dtypes.items() if _is_wide(key, dtype)]
        cameras = config.cameras
        remedies = [
            *wide,
            f"prior.vae_slicing=true ({str(config.prior.vae_slicing).lower()} now)",
            f"fewer cameras.num_groups ({cameras.num_groups} now)",
            f"smaller cameras.height and cameras.width ({cameras.height} and {cameras.width} now)",
        ]
        raise torch.OutOfMemoryError(f"{wish}; what lowers it: {', '.join(remedies)}") from error


def _is_wide(key: str, dtype: str) -> bool:
    """Whether bfloat16 would take less: beside a network in float16, too, a prior's autoencoder is in float32."""
    return dtype == "float32" or (key == "prior.dtype" and dtype == "float16")


def _dtypes(config: ExperimentConfig) -> dict[str, str]:
    """The precision of every network, by the setting that says it."""
    found: dict[str, str] = {"prior.dtype": config.prior.dtype}
    for name, reward in config.rewards.items():
        for key, single in single_rewards(reward, f"rewards.{name}").items():
            if not isinstance(single, FunctionConfig):
                found[f"{key}.dtype"] = single.dtype
    return found
