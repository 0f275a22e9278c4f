"""How long a worker may be silent before it is taken for one that hangs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Deadlines:
    """Two of them: a run's first chunk loads models and compiles kernels, for minutes, with nothing to report."""

    hung_after_s: float = 20.0  # without a beat, a step or a report; up to 6 s later its run is at work elsewhere
    loading_timeout_s: float = 600.0  # from a run's start to its first sign of life

    def __post_init__(self) -> None:
        if not 0 < self.hung_after_s <= self.loading_timeout_s:
            raise ValueError(
                f"hung_after_s must be > 0 and at most loading_timeout_s, got {self.hung_after_s} and "
                f"{self.loading_timeout_s}"
            )


class Watch:
    """A worker's signs of life since it was called: the count of its beats, asked for from outside, must move.

    The time from one look to the next counts up to half of `hung_after_s`: a driver that was kept from looking, by a
    storage that did not answer or by a machine that slept, does not take its own silence for the worker's.
    ``num_beats`` is the count when it was called, where that is known; else the first one heard is where it starts.
    """

    def __init__(self, deadlines: Deadlines, now_s: float, *, is_loading: bool, num_beats: int | None = None) -> None:
        self._deadlines = deadlines
        self._is_loading = is_loading
        self._asks_patience = False
        self._num_beats = num_beats
        self._looked_s = now_s
        self.silent_s = 0.0

    def hear(self, num_beats: int, now_s: float, *, asks_patience: bool = False) -> None:
        self._look(now_s)
        self._asks_patience = asks_patience
        if self._num_beats is not None and num_beats > self._num_beats:
            self._is_loading = False
            self.silent_s = 0.0
        self._num_beats = max(num_beats, self._num_beats or 0)  # an answer from before the call may come late

    def is_over(self, now_s: float) -> bool:
        self._look(now_s)
        may_take_long = self._is_loading or self._asks_patience
        allowed_s = self._deadlines.loading_timeout_s if may_take_long else self._deadlines.hung_after_s
        return self.silent_s > allowed_s

    def _look(self, now_s: float) -> None:
        self.silent_s += min(now_s - self._looked_s, self._deadlines.hung_after_s / 2)
        self._looked_s = now_s
