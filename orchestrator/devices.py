"""The GPUs of this machine, without torch, which takes seconds to load."""

from __future__ import annotations

import shutil
import subprocess


def gpu_names() -> tuple[str, ...]:
    """As the driver names them; empty where there is no GPU or no driver."""
    if shutil.which("nvidia-smi") is None:
        return ()
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return tuple(line.strip() for line in done.stdout.splitlines()) if done.returncode == 0 else ()
