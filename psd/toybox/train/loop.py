"""A training loop's frame: how long it runs, how its learning rate falls, how its weights are averaged."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Clock:
    """Iterates until the minutes are used up and yields the fraction that is; prints reported means now and then."""

    def __init__(self, name: str, minutes: float, report_every_s: float = 30.0):
        self.name, self.minutes, self.report_every_s = name, minutes, report_every_s
        self.step = 0
        self._sums: dict[str, float] = {}
        self._since = 0

    def __iter__(self) -> Iterator[float]:
        start = reported = time.monotonic()
        while (elapsed := time.monotonic() - start) < self.minutes * 60:
            yield elapsed / (self.minutes * 60)
            self.step += 1
            if time.monotonic() - reported > self.report_every_s:
                reported = time.monotonic()
                means = "  ".join(f"{name} {total / max(self._since, 1):.4f}" for name, total in self._sums.items())
                print(f"{self.name}: {elapsed / 60:.1f} min  step {self.step}  {means}", flush=True)
                self._sums, self._since = {}, 0

    def report(self, **values: Tensor) -> None:
        self._since += 1
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value.detach())


def cosine_lr(
    optimizer: torch.optim.Optimizer, peak: float, fraction: float, *, final: float = 0.02, warmup: float = 0.02
) -> None:
    """Linear warm-up, then half a cosine down to ``final`` times the peak."""
    rising = min(fraction / warmup, 1.0)
    falling = final + (1 - final) * 0.5 * (1 + math.cos(math.pi * fraction))
    for group in optimizer.param_groups:
        group["lr"] = peak * rising * falling


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int, horizon: float) -> None:
    """Exponential moving average whose window grows with the steps up to ``horizon``."""
    decay = min(1 - 1 / horizon, (1 + step) / (10 + step))
    for target, source in zip(average.parameters(), model.parameters(), strict=True):
        target.lerp_(source, 1 - decay)
