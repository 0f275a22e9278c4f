from __future__ import annotations

import errno
import pickle
from collections import Counter
from pathlib import Path

import pytest
import torch

from orchestrator.budget import Budget, Spent
from orchestrator.clock import ManualClock
from orchestrator.errors import RunStorageError, SweepAbortedError, UserError
from orchestrator.failure import FailurePolicy, classify, describe
from orchestrator.goals import Frontier, Goal
from orchestrator.trial import Failure, FailureKind, TrialSpec


def failure(kind: FailureKind, node: str = "") -> Failure:
    return Failure(kind=kind, message="it broke", node=node)


@pytest.mark.parametrize(
    ("kind", "attempts"),
    [
        (FailureKind.CONFIGURATION, 1),
        (FailureKind.NOT_FINITE, 1),
        (FailureKind.OUT_OF_MEMORY, 2),
        (FailureKind.ERROR, 3),
        (FailureKind.LOST, 3),
        (FailureKind.HUNG, 3),
        (FailureKind.STORAGE, 99),
        (FailureKind.PREEMPTED, 99),
    ],
)
def test_each_class_of_failures_has_its_number_of_attempts(kind: FailureKind, attempts: int) -> None:
    policy = FailurePolicy(max_attempts=3)
    again = [policy.retry_after_s(kind, in_a_row={kind: number}, draw=0.5) for number in range(1, 99)]
    assert [wait_s is not None for wait_s in again] == [number < attempts for number in range(1, 99)]


@pytest.mark.parametrize(
    ("before", "last", "is_retried"),
    [
        ({FailureKind.PREEMPTED: 2}, FailureKind.LOST, True),
        ({FailureKind.STORAGE: 10}, FailureKind.OUT_OF_MEMORY, True),
        ({FailureKind.LOST: 2}, FailureKind.OUT_OF_MEMORY, True),
        ({FailureKind.OUT_OF_MEMORY: 1, FailureKind.LOST: 1}, FailureKind.HUNG, True),
        ({FailureKind.ERROR: 1, FailureKind.LOST: 1}, FailureKind.HUNG, False),
        ({FailureKind.OUT_OF_MEMORY: 1, FailureKind.PREEMPTED: 5}, FailureKind.OUT_OF_MEMORY, False),
    ],
)
def test_each_class_of_failures_uses_up_its_own_attempts_alone(
    before: dict[FailureKind, int], last: FailureKind, is_retried: bool
) -> None:
    in_a_row = Counter(before)
    in_a_row[last] += 1
    wait_s = FailurePolicy(max_attempts=3).retry_after_s(last, in_a_row=in_a_row, draw=0.5)
    assert (wait_s is not None) is is_retried


def test_a_run_that_fails_in_different_ways_waits_longer_each_time() -> None:
    in_a_row = {FailureKind.PREEMPTED: 2, FailureKind.LOST: 1}
    assert FailurePolicy(backoff_s=1.0).retry_after_s(FailureKind.LOST, in_a_row=in_a_row, draw=0.5) == 4.0


def test_waits_double_with_jitter_up_to_a_bound() -> None:
    policy = FailurePolicy(backoff_s=1.0, max_backoff_s=10.0)
    assert [policy.wait_s(number, 0.5) for number in range(1, 7)] == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]
    assert (policy.wait_s(2, 0.0), policy.wait_s(2, 0.999)) == (1.0, pytest.approx(3.0, abs=0.01))
    assert policy.wait_s(10_000, 0.5) == 10.0


def test_a_node_is_suspect_after_failures_within_a_time() -> None:
    policy = FailurePolicy(quarantine_after=3, quarantine_window_s=100.0)
    assert not policy.quarantines([0.0, 50.0], 60.0)
    assert policy.quarantines([0.0, 50.0, 60.0], 60.0)
    assert not policy.quarantines([0.0, 150.0, 160.0], 160.0)
    suspicious = {kind for kind in FailureKind if policy.suspects(failure(kind, "host-7"))}
    assert suspicious == {FailureKind.ERROR, FailureKind.LOST, FailureKind.HUNG}
    assert not policy.suspects(failure(FailureKind.LOST)), "nobody knows where"


def test_everybody_fails_when_each_worker_has_lost_several_runs_in_a_row() -> None:
    policy = FailurePolicy(give_up_after=4)
    lost = failure(FailureKind.LOST)
    assert not policy.breaks_circuit([lost] * 7, num_workers=2)
    assert policy.breaks_circuit([lost] * 8, num_workers=2)
    assert not policy.breaks_circuit([failure(FailureKind.PREEMPTED)] * 99, num_workers=2)
    assert not policy.breaks_circuit([failure(FailureKind.CONFIGURATION)] * 99, num_workers=2)


def test_the_evidence_is_one_line() -> None:
    losses = [failure(FailureKind.LOST, "a")] * 2 + [failure(FailureKind.LOST)]
    assert describe(losses) == "2 x it broke on a; 1 x it broke"


class OutOfMemoryError(RuntimeError):
    """Named as torch's own."""


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ValueError(), FailureKind.CONFIGURATION, "ValueError: "),
        (ValueError("x < 0"), FailureKind.CONFIGURATION, "x < 0"),
        (RunStorageError("no metrics at step 5"), FailureKind.STORAGE, "no metrics at step 5"),
        (OSError(errno.ENOSPC, "full"), FailureKind.STORAGE, "OSError: [Errno 28] full"),
        (FileNotFoundError(errno.ENOENT, "no weights"), FailureKind.ERROR, "FileNotFoundError: [Errno 2] no weights"),
        (FloatingPointError("the loss is nan"), FailureKind.NOT_FINITE, "the loss is nan"),
        (OverflowError("too large"), FailureKind.NOT_FINITE, "too large"),
        (
            RuntimeError("value cannot be converted to type float without overflow"),
            FailureKind.NOT_FINITE,
            "a value is too large for its type (value cannot be converted to type float without overflow)",
        ),
        (
            OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nMore."),
            FailureKind.OUT_OF_MEMORY,
            "the GPU is out of memory (OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB.)",
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            FailureKind.OUT_OF_MEMORY,
            "the GPU is out of memory (RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling "
            "`cublasCreate(handle)`)",
        ),
        (MemoryError("8 GB"), FailureKind.OUT_OF_MEMORY, "the machine is out of memory (MemoryError: 8 GB)"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
            FailureKind.OUT_OF_MEMORY,
            "the machine is out of memory (RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to "
            "allocate 4 bytes)",
        ),
        (RuntimeError("the device fell over"), FailureKind.ERROR, "RuntimeError: the device fell over"),
    ],
)
def test_exceptions_are_told_apart(error: Exception, kind: FailureKind, message: str) -> None:
    told = classify(error)
    assert (told.kind, told.message) == (kind, message)


def test_torchs_own_errors_are_told_apart() -> None:
    """The real ones, as far as a CPU can raise them."""
    with pytest.raises(RuntimeError) as overflow:
        torch.zeros(1).addcdiv_(torch.ones(1), torch.ones(1), value=1e39)
    assert classify(overflow.value).kind is FailureKind.NOT_FINITE
    with pytest.raises(RuntimeError) as memory:
        torch.empty(2**60, dtype=torch.uint8)
    assert classify(memory.value).kind is FailureKind.OUT_OF_MEMORY
    assert classify(torch.OutOfMemoryError("CUDA out of memory.")).kind is FailureKind.OUT_OF_MEMORY


@pytest.mark.parametrize(
    ("num_succeeded", "num_failed", "gives_up"), [(0, 2, False), (0, 3, True), (1, 3, False), (1, 99, False)]
)
def test_a_sweep_that_only_fails_is_given_up(num_succeeded: int, num_failed: int, gives_up: bool) -> None:
    policy = FailurePolicy(give_up_after=3)
    assert policy.gives_up(num_succeeded=num_succeeded, reasons=["x"] * num_failed) is gives_up


def test_the_budget_ends_with_trials_or_time() -> None:
    budget = Budget(max_trials=2, max_seconds=60, max_worker_seconds=100, patience=5)

    def allows(budget: Budget, num_trials: int = 1, num_since: int = 0, **spent: float) -> bool:
        return budget.allows_another(num_trials=num_trials, spent=Spent(**spent), num_since_improvement=num_since)

    assert allows(budget, num_since=4, seconds=59.9, worker_seconds=99)
    assert not allows(budget, num_trials=2)
    assert not allows(budget, seconds=60)
    assert not allows(budget, worker_seconds=100)
    assert not allows(budget, num_since=5)
    assert allows(Budget(max_trials=2), num_since=99, seconds=1e9, worker_seconds=1e9)
    assert budget.stop_reason(Spent(worker_seconds=100), 0) == "budget.gpu_hours (0.0277778) are spent"


def test_what_was_spent_outlives_its_driver(tmp_path: Path) -> None:
    assert Spent.load(tmp_path / "spent.json") == Spent()
    Spent(seconds=12.25, worker_seconds=20).save(tmp_path / "spent.json")
    assert Spent.load(tmp_path / "spent.json") == Spent(seconds=12.2, worker_seconds=20)


def test_the_frontier_holds_what_nothing_beats() -> None:
    judge, seconds = Goal(name="judge", metric="j"), Goal(name="seconds", metric="s", maximize=False)
    frontier = Frontier([judge, seconds])
    added = [(1.0, 10.0), (2.0, 20.0), (0.5, 11.0), (2.0, 15.0), (3.0, 99.0)]
    assert [frontier.add(number, values) for number, values in enumerate(added)] == [True, True, False, True, True]
    assert not frontier.add(5, (9.0, 1.0), feasible=False)
    assert frontier.members == {0: (1.0, 10.0), 3: (2.0, 15.0), 4: (3.0, 99.0)}
    assert frontier.best() == 4
    single = Frontier([seconds])
    assert [single.add(number, (value,)) for number, value in enumerate((5.0, 6.0, 4.0))] == [True, False, True]
    assert single.members == {2: (4.0,)}


@pytest.mark.parametrize(
    "make",
    [
        lambda: Budget(max_trials=0),
        lambda: Budget(max_trials=1, max_seconds=0),
        lambda: FailurePolicy(max_attempts=0),
        lambda: FailurePolicy(give_up_after=0),
        lambda: FailurePolicy(quarantine_after=0),
        lambda: FailurePolicy(quarantine_window_s=0),
        lambda: FailurePolicy(backoff_s=2.0, max_backoff_s=1.0),
        lambda: TrialSpec(number=0, params={}, runs=()),
    ],
)
def test_impossible_settings_are_refused(make: object) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=r"must be|no runs"):
        make()


def test_errors_survive_pickling() -> None:
    error = UserError("unknown key", file="sweep.yaml", key="search.spce", remedy="did you mean 'space'?")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == "sweep.yaml: search.spce: unknown key; did you mean 'space'?"
    assert (copy.file, copy.key, copy.remedy) == (error.file, error.key, error.remedy)
    assert str(UserError("no such file")) == "no such file"
    assert str(pickle.loads(pickle.dumps(SweepAbortedError("all failed")))) == "all failed"


def test_a_manual_clock_stands_still() -> None:
    clock = ManualClock(5.0)
    assert clock.now_s == 5.0
    clock.advance(1.5)
    assert clock.now_s == 6.5
    with pytest.raises(ValueError, match="never runs backwards"):
        clock.advance(-1)
