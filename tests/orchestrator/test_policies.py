from __future__ import annotations

import pickle

import pytest

from orchestrator.budget import Budget
from orchestrator.clock import ManualClock
from orchestrator.errors import SweepAbortedError, UserError
from orchestrator.failure import FailurePolicy
from orchestrator.trial import Failure, FailureKind, TrialSpec

WORKER = Failure(kind=FailureKind.WORKER, message="lost")
CONFIGURATION = Failure(kind=FailureKind.CONFIGURATION, message="out of range")


def test_a_worker_failure_is_retried_until_the_attempts_are_spent() -> None:
    policy = FailurePolicy(max_attempts=3)
    assert [policy.retries(attempt, WORKER) for attempt in range(4)] == [True, True, False, False]


def test_a_configuration_failure_is_never_retried() -> None:
    assert not FailurePolicy(max_attempts=3).retries(0, CONFIGURATION)


@pytest.mark.parametrize(
    ("num_succeeded", "num_failed", "gives_up"), [(0, 2, False), (0, 3, True), (1, 3, False), (1, 99, False)]
)
def test_a_sweep_that_only_fails_is_given_up(num_succeeded: int, num_failed: int, gives_up: bool) -> None:
    policy = FailurePolicy(give_up_after=3)
    assert policy.gives_up(num_succeeded=num_succeeded, reasons=["x"] * num_failed) is gives_up


def test_the_budget_ends_with_trials_or_time() -> None:
    budget = Budget(max_trials=2, max_seconds=60)
    assert budget.allows_another(num_trials=1, elapsed_s=59.9)
    assert not budget.allows_another(num_trials=2, elapsed_s=0)
    assert not budget.allows_another(num_trials=1, elapsed_s=60)
    assert Budget(max_trials=2).allows_another(num_trials=0, elapsed_s=1e9)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Budget(max_trials=0),
        lambda: Budget(max_trials=1, max_seconds=0),
        lambda: FailurePolicy(max_attempts=0),
        lambda: FailurePolicy(give_up_after=0),
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
