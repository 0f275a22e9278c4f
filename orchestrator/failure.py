"""Failure classes, and what to do about each: pure questions, asked by the driver.

| class | policy |
|---|---|
| configuration, not finite | the trial fails at once: the same settings would fail again |
| out of memory | once more on a fresh worker; twice in a row fails the trial |
| error, lost, hung | the same run elsewhere, from its last checkpoint, a few times in a row; held against the node |
| storage, preempted | the same run again as often as it takes: neither the run's fault nor the worker's |

In a row means from the same checkpoint. Error, lost and hung share a limit, out of memory has its own, storage and
preempted use up nobody's attempts; the wait before the next attempt grows with all of them together.
"""

from __future__ import annotations

import errno
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.errors import RunStorageError
from orchestrator.trial import Failure, FailureKind

# After these the worker goes on with the next run; after the others it is replaced.
SPARES_WORKER = (FailureKind.CONFIGURATION, FailureKind.NOT_FINITE, FailureKind.STORAGE)

_SETTLED = (FailureKind.CONFIGURATION, FailureKind.NOT_FINITE)
_SUSPICIOUS = (FailureKind.ERROR, FailureKind.LOST, FailureKind.HUNG)
_MAX_OUT_OF_MEMORY = 2
_STORAGE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)  # whatever file it was


@dataclass(frozen=True, kw_only=True)
class FailurePolicy:
    """How often a run is tried again and after which wait, when a node is suspect, when a sweep is given up."""

    max_attempts: int = 3  # of one run in a row from the same checkpoint, the first one included
    backoff_s: float = 1.0  # before the second attempt; doubles with each further one
    max_backoff_s: float = 60.0
    quarantine_after: int = 3  # failures on a node within the window
    quarantine_window_s: float = 3600.0
    give_up_after: int = 4  # failed trials while none has succeeded; lost runs in a row for each worker

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts must be >= 1, got {self.max_attempts}; 1 means no retry")
        if not 0 <= self.backoff_s <= self.max_backoff_s:
            raise ValueError(
                f"backoff_s must be >= 0 and at most max_backoff_s, got {self.backoff_s} and {self.max_backoff_s}"
            )
        if self.quarantine_after < 1:
            raise ValueError(f"quarantine_after must be >= 1 failure, got {self.quarantine_after}")
        if self.quarantine_window_s <= 0:
            raise ValueError(f"quarantine_window_s must be > 0, got {self.quarantine_window_s}")
        if self.give_up_after < 1:
            raise ValueError(f"give_up_after must be >= 1 trial, got {self.give_up_after}")

    def retry_after_s(self, kind: FailureKind, *, in_a_row: Mapping[FailureKind, int], draw: float) -> float | None:
        """How long a run that failed so waits for its next attempt; None: its trial fails.

        ``in_a_row`` counts its failures from the same checkpoint, this one included; ``draw`` is uniform in [0, 1).
        """
        if kind in _SETTLED:
            return None
        if kind is FailureKind.OUT_OF_MEMORY and in_a_row[kind] >= min(_MAX_OUT_OF_MEMORY, self.max_attempts):
            return None
        if kind in _SUSPICIOUS and sum(in_a_row.get(other, 0) for other in _SUSPICIOUS) >= self.max_attempts:
            return None
        return self.wait_s(sum(in_a_row.values()), draw)

    def wait_s(self, num_in_a_row: int, draw: float) -> float:
        """Exponential backoff with jitter: between half of it and one and a half of it."""
        doubled_s = self.backoff_s * 2.0 ** min(num_in_a_row - 1, 30)
        return min(doubled_s * (0.5 + draw), self.max_backoff_s)

    def suspects(self, failure: Failure) -> bool:
        """Whether a failure is held against the node that it happened on."""
        return failure.kind in _SUSPICIOUS and bool(failure.node)

    def quarantines(self, failures_s: Sequence[float], now_s: float) -> bool:
        """Whether a node with failures at these times gets no more work."""
        recent = sum(now_s - failed_s <= self.quarantine_window_s for failed_s in failures_s)
        return recent >= self.quarantine_after

    def gives_up(self, *, num_succeeded: int, reasons: Sequence[str]) -> bool:
        """Whether the sweep ends here; ``reasons`` are those of the trials that failed."""
        return num_succeeded == 0 and len(reasons) >= self.give_up_after

    def breaks_circuit(self, losses: Sequence[Failure], *, num_workers: int) -> bool:
        """Whether everybody fails: ``losses`` followed each other, and no run reported anything in between."""
        counted = sum(loss.kind not in (*_SETTLED, FailureKind.PREEMPTED) for loss in losses)
        return counted >= self.give_up_after * max(1, num_workers)


def classify(error: Exception) -> Failure:
    """What an exception in a worker means.

    Python's errors of arithmetic, and torch's refusal to put a number into a narrower type, come from the settings.
    """
    text = "".join(traceback.format_exception(error))
    message = f"{type(error).__name__}: {error}"
    said = str(error) or message
    match error:
        case _ if _is_out_of_memory(error):
            kind = FailureKind.OUT_OF_MEMORY
            device = "GPU" if "CUDA" in str(error) or "HIP" in str(error) else "machine"
            message = f"the {device} is out of memory ({message.splitlines()[0]})"
        case RunStorageError():
            kind, message = FailureKind.STORAGE, said
        case OSError() if error.errno in _STORAGE_ERRNOS:
            kind = FailureKind.STORAGE
        case ArithmeticError():
            kind, message = FailureKind.NOT_FINITE, said
        case RuntimeError() if "overflow" in str(error):
            kind, message = FailureKind.NOT_FINITE, f"a value is too large for its type ({error})"
        case ValueError():
            kind, message = FailureKind.CONFIGURATION, said
        case _:
            kind = FailureKind.ERROR
    return Failure(kind=kind, message=message, traceback=text)


def _is_out_of_memory(error: Exception) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}  # torch's own class, without importing torch
    text = str(error)
    return bool(names & {"OutOfMemoryError", "MemoryError"}) or (
        isinstance(error, RuntimeError)
        and any(sign in text for sign in ("out of memory", "ALLOC_FAILED", "can't allocate memory"))
    )


def describe(losses: Sequence[Failure]) -> str:
    """The evidence in one line: how often what was said on which node, the most frequent first."""
    counts = Counter((loss.message.splitlines()[0], loss.node) for loss in losses)
    return "; ".join(
        f"{count} x {message}" + (f" on {node}" if node else "") for (message, node), count in counts.most_common(3)
    )
