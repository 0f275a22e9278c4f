"""What the driver names and the worker calls. Light, since both import it: torch and its like come with the call."""

from __future__ import annotations

from orchestrator.objective import Objective
from orchestrator.worker_process import resident_bytes


def make_objective() -> Objective:
    from orchestrator.psd_objective.objective import PsdObjective

    return PsdObjective()


def measure_memory() -> int:
    """What a worker holds between runs."""
    from orchestrator.psd_objective.device import held_gpu_bytes

    return held_gpu_bytes() or resident_bytes()
