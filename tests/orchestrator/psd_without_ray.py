"""`psd` whose workers take turns in its own process, on runs that need no torch: whole drivers, cheap enough for tests.

    python psd_without_ray.py FOLDER NUM_DRIVERS NUM_FREE [psd's own arguments]

Before its first run a driver waits until ``NUM_DRIVERS`` of them have come to theirs; before the run after ``NUM_FREE``
of them it waits until there is a file ``go`` in ``FOLDER``. Everything else is psd's own: configuration, locks, claims,
study, budgets, tables.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from orchestrator import cli
from orchestrator.cli import sweep as sweep_command
from orchestrator.local_pool import LocalPool
from orchestrator.objective import Progress
from orchestrator.trial import RunSpec
from orchestrator.worker import WorkerSetup

TIMEOUT_S = 400.0


class MeetingObjective:
    def __init__(self, folder: Path, num_drivers: int, num_free: int) -> None:
        self._folder, self._num_drivers, self._num_free = folder, num_drivers, num_free
        self._num_runs = 0

    def start(self, spec: RunSpec, output: Path, resume_from: Path | None) -> QuickRun:
        (self._folder / f"came-{os.getpid()}").touch()
        _wait_for(lambda: len(list(self._folder.glob("came-*"))) >= self._num_drivers)
        self._num_runs += 1
        if self._num_runs > self._num_free:
            (self._folder / f"waits-{os.getpid()}").touch()
            _wait_for((self._folder / "go").exists)
        return QuickRun(spec)


class QuickRun:
    """Two steps; the judge likes a guidance scale of 7."""

    def __init__(self, spec: RunSpec) -> None:
        self._spec, self._step = spec, 0

    def advance(self) -> Progress:
        self._step += 1
        score = -abs(self._spec.config["distillation"]["guidance_scale"] - 7.0)
        metrics = {"eval/judge": score, "eval/reward": score}
        return Progress(step=self._step, num_steps=2, metrics=metrics, done=self._step == 2)

    def save(self, directory: Path) -> None:
        (directory / "step").write_text(str(self._step))

    def close(self) -> None:
        pass


class TurnPool(LocalPool):
    """One worker; says how many it was asked to have."""

    def __init__(self, setup: WorkerSetup, **options: Any) -> None:
        super().__init__(setup)

    def resize(self, num_workers: int | str, most_useful: int) -> None:
        print(f"resized to {num_workers} of {most_useful}", flush=True)

    def withdraw_wish(self) -> None:
        pass

    def close(self, timeout_s: float | None = None) -> None:
        super().close()


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.02)


def main() -> int:
    folder, num_drivers, num_free = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    without_ray: Any = ModuleType("orchestrator.ray_pool")
    without_ray.RayPool = TurnPool
    sys.modules["orchestrator.ray_pool"] = without_ray
    sweep_command.make_objective = lambda: MeetingObjective(folder, num_drivers, num_free)  # type: ignore[assignment]
    return cli.main(sys.argv[4:])


if __name__ == "__main__":
    sys.exit(main())
