"""What executes a lease, the same in every pool: chunks, rows of metrics, checkpoints, a result.

A pool makes one call at a time, and each call returns the event that it ended in. None of them raises.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from orchestrator.checkpoints import CheckpointStore, step_of
from orchestrator.errors import RunStorageError, SupersededError
from orchestrator.failure import classify
from orchestrator.heartbeat import patience
from orchestrator.objective import Objective, Run
from orchestrator.run_folder import METRICS, RunClaim, RunFolder
from orchestrator.tracking import BackgroundTracking, Tracker
from orchestrator.trial import (
    Event,
    Lease,
    RunFailed,
    RunFinished,
    RunProgressed,
    RunSpec,
    RunStopped,
)

_log = logging.getLogger(__name__)

# How a tracker hears that a run ended: finished, failed, or stopped to be resumed later.
EXIT_FINISHED, EXIT_FAILED, EXIT_STOPPED = 0, 1, 130
TRACKING_DRAIN_S = 10.0  # how long a worker that is closed waits for its trackers; `psd sync` uploads what they lose


@dataclass(frozen=True, kw_only=True)
class WorkerSetup:
    """What a worker is built from; picklable, since a worker may be built on another machine."""

    objective: Callable[[], Objective]  # called once per worker, at its first lease
    runs: Path  # the folder that holds a folder for each run
    checkpoints: CheckpointStore
    tracker: Callable[[RunSpec, Path], Tracker]  # the run and its own folder
    checkpoint_every: int  # steps
    memory_bytes: Callable[[], int] | None = None  # that a worker holds; None: that its process holds

    def __post_init__(self) -> None:
        if self.checkpoint_every < 1:
            raise ValueError(f"checkpoint_every must be >= 1 step, got {self.checkpoint_every}")


@dataclass
class _ActiveRun:
    lease: Lease
    claim: RunClaim
    tracker: Tracker
    run: Run
    step: int
    checkpointed_step: int
    lacks_checkpoint: bool = False  # since the last one that was due could not be written


class Worker:
    """Executes one lease at a time and keeps its objective, with all that it has loaded, between them.

    A worker whose lease is superseded, since it was cut off and taken for lost, notices at its next chunk and lets go.
    """

    def __init__(self, setup: WorkerSetup) -> None:
        self._setup = setup
        self._tracking = BackgroundTracking(setup.tracker)
        self._objective: Objective | None = None
        self._active: _ActiveRun | None = None
        self.step = 0  # of the run that is under way, or was last

    @property
    def is_busy(self) -> bool:
        return self._active is not None

    def start(self, lease: Lease) -> Event:
        """Begin or resume a run and do its first chunk. A run that already has its result is finished at once."""
        assert not self.is_busy, "a worker executes one lease at a time"
        try:
            folder = RunFolder(self._setup.runs, lease.spec.run_id)
            with _on_storage("the run's folder cannot be read"):
                result = folder.result()
                is_finished = result is not None and folder.describes(lease.spec)
            if result is not None and is_finished:
                return RunFinished(lease=lease, metrics=result)
            self._active = self._begin(lease, folder)
        except Exception as error:
            return RunFailed(lease=lease, failure=classify(error))
        return self.advance()

    def advance(self) -> Event:
        """One chunk."""
        active = self._started()
        try:
            return self._advance(active)
        except Exception as error:
            self._end(EXIT_STOPPED if isinstance(error, SupersededError) else EXIT_FAILED)
            return RunFailed(lease=active.lease, failure=classify(error))

    def stop(self) -> Event:
        """Checkpoint where the run stands, and let go of it."""
        active = self._started()
        try:
            if active.step > active.checkpointed_step:
                self._save(active)
        except Exception as error:
            self._end(EXIT_STOPPED if isinstance(error, RunStorageError) else EXIT_FAILED)
            return RunFailed(lease=active.lease, failure=classify(error))
        self._end(EXIT_STOPPED)
        return RunStopped(lease=active.lease, step=active.checkpointed_step)

    def close(self) -> None:
        """Let go of whatever is underway, without a checkpoint, and give tracking a moment to end."""
        if self._active is not None:
            self._end(EXIT_STOPPED)
        self._tracking.drain(TRACKING_DRAIN_S)

    def _begin(self, lease: Lease, folder: RunFolder) -> _ActiveRun:
        if self._objective is None:
            self._objective = self._setup.objective()
        if lease.resume_from is None:
            return self._launch(self._objective, lease, folder, None)
        with _fetched(self._setup.checkpoints, lease.resume_from) as checkpoint:
            return self._launch(self._objective, lease, folder, checkpoint)

    def _launch(self, objective: Objective, lease: Lease, folder: RunFolder, checkpoint: Path | None) -> _ActiveRun:
        with _on_storage("the run's folder cannot be written to"):
            claim = folder.claim(lease, None if checkpoint is None else checkpoint / METRICS)
        try:
            run = objective.start(lease.spec, folder.path, checkpoint)
        except BaseException:
            claim.close()
            raise
        tracker = self._tracking.start(lease.spec, folder.path)
        step = self.step = 0 if lease.resume_from is None else step_of(lease.resume_from)
        return _ActiveRun(lease, claim, tracker, run, step, checkpointed_step=step)

    def _advance(self, active: _ActiveRun) -> Event:
        progress = active.run.advance()
        assert progress.step > active.step, f"a chunk must advance the run, but it stayed at step {progress.step}"
        active.step = self.step = progress.step
        active.claim.check()
        metrics = {name: float(value) for name, value in progress.metrics.items()}
        if metrics:
            with _on_storage(f"no metrics at step {progress.step}"):
                active.claim.append_metrics(progress.step, metrics)
            active.tracker.log(progress.step, metrics)
        if progress.files:
            active.tracker.log_files(progress.step, progress.files)
        if progress.done:
            with _on_storage("no result"):
                active.claim.write_result(progress.step, metrics)
            self._end(EXIT_FINISHED)
            return RunFinished(lease=active.lease, metrics=metrics)
        every = self._setup.checkpoint_every
        if active.step // every > active.checkpointed_step // every:
            self._checkpoint(active)
        return RunProgressed(lease=active.lease, step=active.step, num_steps=progress.num_steps, metrics=metrics)

    def _checkpoint(self, active: _ActiveRun) -> None:
        """Where the storage does not answer, the run goes on, and the next chunk tries again."""
        try:
            self._save(active)
        except RunStorageError as error:
            if not active.lacks_checkpoint:
                _log.warning("%s", error, extra={"run_id": active.lease.spec.run_id})
            active.lacks_checkpoint = True

    def _save(self, active: _ActiveRun) -> None:
        with (
            _on_storage(f"no checkpoint at step {active.step}"),
            patience(),
            self._setup.checkpoints.write(active.lease, active.step) as folder,
        ):
            active.run.save(folder)
            active.claim.copy_metrics(folder / METRICS)
            active.claim.check()
        active.checkpointed_step, active.lacks_checkpoint = active.step, False

    def _started(self) -> _ActiveRun:
        assert self._active is not None, "no lease has been started"
        return self._active

    def _end(self, exit_code: int) -> None:
        active, self._active = self._started(), None
        with suppress(OSError):  # what counts was told before
            active.claim.close()
        active.tracker.close(exit_code)
        with suppress(Exception):  # what the run came to is already decided
            active.run.close()


@contextmanager
def _on_storage(problem: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunStorageError(f"{problem}: {error}") from error


@contextmanager
def _fetched(store: CheckpointStore, location: str) -> Iterator[Path]:
    with ExitStack() as stack:
        with _on_storage("the checkpoint cannot be read"):
            folder = stack.enter_context(store.read(location))
        yield folder
