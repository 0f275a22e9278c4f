"""Results on their way to the disk: a worker begins its next run while what it finished is being made to last."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from orchestrator.run_folder import RunFolder
from orchestrator.trial import Event, Failure, FailureKind, RunFailed, RunFinished

_MAX_AT_ONCE = 4  # waits for the disk, which a file system may answer together


class Settling:
    """Hands on the last events of finished runs, from threads of its own, once their results outlast a power cut."""

    def __init__(self, runs: Path, hand_on: Callable[[Event], None]) -> None:
        self._runs = runs
        self._hand_on = hand_on
        self._threads = ThreadPoolExecutor(_MAX_AT_ONCE, thread_name_prefix="settling")

    def add(self, event: RunFinished) -> None:
        """Hands on ``event``, or in its place a failure of the storage."""
        self._threads.submit(self._settle, event)

    def close(self, *, at_once: bool = False) -> None:
        """After what was added is settled, or without waiting for it."""
        self._threads.shutdown(wait=not at_once, cancel_futures=at_once)

    def _settle(self, event: RunFinished) -> None:
        self._hand_on(settled(self._runs, event))


def settled(runs: Path, event: RunFinished) -> Event:
    """The event, once its result outlasts a power cut; in its place a failure of the storage if it cannot."""
    try:
        RunFolder(runs, event.lease.spec.run_id).make_lasting()
    except OSError as error:
        message = f"the disk did not take the result: {error}"
        return RunFailed(lease=event.lease, failure=Failure(kind=FailureKind.STORAGE, message=message))
    return event
