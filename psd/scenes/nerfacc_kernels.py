"""nerfacc's CUDA kernels, which march through an occupancy grid: whether they can be had."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from filelock import FileLock


@functools.cache
def has_kernels(device: torch.device) -> bool:
    """Whether they run there: on a GPU, if they are compiled or can be, which takes minutes and the CUDA toolkit.

    Warns where they cannot. One process of a user tries at a time, since nerfacc deletes the folder of a build that
    another process has just begun.
    """
    if device.type != "cuda":
        return False
    with FileLock(Path(tempfile.gettempdir()) / f"psd-nerfacc-{os.getuid()}.lock"):
        problem = _build_problem()
    if problem:
        warnings.warn(
            f"nerfacc's kernels cannot be had: {problem}; hash grids are marched through in torch, which takes longer",
            stacklevel=2,
        )
    return not problem


def _build_problem() -> str:
    """Why they cannot be loaded; empty if they have been."""
    path = os.environ.get("PATH", "")
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{path}"  # where pip puts ninja
    try:
        from nerfacc.cuda._backend import _C
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        return str(error).partition("\n")[0].rstrip(".") or type(error).__name__
    finally:
        os.environ["PATH"] = path
    return "" if _C is not None else "there is no CUDA toolkit (nvcc)"
