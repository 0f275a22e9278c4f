"""Ask, report and tell over an Optuna study."""

from __future__ import annotations

import math
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from orchestrator.errors import StudyMissingError
from orchestrator.optuna_study.claims import Claim, LastingClaim
from orchestrator.optuna_study.numbering import RETRIES, SOURCE, Numbering
from orchestrator.optuna_study.pruners import WatchedStudy, make_pruner
from orchestrator.optuna_study.samplers import Sampling, make_sampler
from orchestrator.optuna_study.storage import answered, close_storage, exists, make_lasting, open_storage
from orchestrator.pruning import NoPruning, Pruning
from orchestrator.search_space import CategoricalDomain, Domain, FloatDomain, IntDomain, SearchSpace
from orchestrator.study import Suggestion, TrialRecord
from orchestrator.trial import Scalar
from orchestrator.warm_start import KnownPoint

Direction = Literal["maximize", "minimize"]
T = TypeVar("T")
OWNER, TOKEN = "owner", "token"  # user attributes of ours, beside those of a trial's results
FINGERPRINT = "fingerprint"  # a study's
_STATES = {
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


class OptunaStudy:
    """A study in an Optuna storage, by name; opened again, it goes on where it stopped.

    Every method may be called again after a StudyUnavailableError, even if it had succeeded unheard.

    Args:
        storage_url: None keeps the study in memory.
        directions: one for each goal.
        num_steps: the length of a run, for the pruners that need it.
        start: points to try first; what a point leaves open is sampled.
        known: points of earlier studies, for the sampler to learn from; they are no trials of this study. Asked for
            only while it has none of its own.
        owner: tells the drivers of a shared study apart; the same after a restart.
        shared: other drivers may be at work on the study: their running trials are left alone.
        claim: of this driver to the study, confirmed before each use; None: nobody else can use it.
        fingerprint: of the sweep whose trials these are; None: of any.
        must_exist: it is not made where it is not there.

    Raises:
        StudyMissingError: it is not there, and must be.
        ValueError: the storage cannot be opened, or its study of that name has other directions or is another sweep's.
    """

    def __init__(
        self,
        *,
        name: str,
        storage_url: str | None,
        space: SearchSpace,
        directions: Sequence[Direction] = ("maximize",),
        sampling: Sampling | None = None,
        pruning: Pruning | None = None,
        num_steps: int = 1,
        start: Sequence[Mapping[str, Scalar]] = (),
        known: Callable[[], Sequence[KnownPoint]] | None = None,
        owner: str = "",
        shared: bool = False,
        claim: Claim | None = None,
        fingerprint: str | None = None,
        must_exist: bool = False,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampling = sampling or Sampling()
        self._space = space
        self._points = space.points() if sampling.kind == "grid" else start  # trial n gets point n
        self._owner, self._shared, self._claim = owner, shared, claim or LastingClaim()
        self._token: str | None = None
        self._distributions = {key: as_distribution(domain) for key, domain in space.domains.items()}
        self._backend = None if storage_url is None else open_storage(storage_url)
        self._storage = optuna.storages.get_storage(self._backend)  # with a cache where it is a database
        if must_exist and not _has_study(self._storage, name):
            self.close()
            raise StudyMissingError(name)
        optuna.create_study(study_name=name, storage=self._storage, directions=list(directions), load_if_exists=True)
        pruner = make_pruner(pruning or NoPruning(), num_steps=num_steps)
        self._study = WatchedStudy(name=name, storage=self._storage, pruner=pruner)
        self._id = self._storage.get_study_id_from_name(name)
        if [direction.name.lower() for direction in self._study.directions] != list(directions):
            theirs = ", ".join(direction.name.lower() for direction in self._study.directions)
            raise ValueError(f"the study {name} exists and would {theirs}; use another name")
        if fingerprint is not None and self._study.user_attrs.get(FINGERPRINT, fingerprint) != fingerprint:
            raise ValueError(f"the study {name} is of a sweep with other settings; use another name")
        if fingerprint is not None and FINGERPRINT not in self._study.user_attrs:
            self._study.set_user_attr(FINGERPRINT, fingerprint)
        if known is not None:
            self._import(known)
        trials = self._trials()
        for trial in trials:
            self._shrink(trial)
        self._study.sampler = make_sampler(sampling, space, num_trials=len(trials), stream=owner if shared else "")
        self._trial_ids: dict[int, int] = {}  # by number, of trials that were reported and not told
        self._numbering = Numbering(trials)
        self._waiting = [trial._trial_id for trial in trials if trial.state == TrialState.WAITING]
        for trial in trials:
            if trial.state == TrialState.RUNNING and self._is_mine(trial):
                self._suggest_all(trial._trial_id)  # a driver may have died before all was suggested

    def ask(self, max_trials: float = math.inf) -> Suggestion | None:
        again = self._token is not None  # the last call failed, but its trial may be there
        token = self._token = self._token or uuid.uuid4().hex

        def attempt() -> Suggestion | None:
            trial_id = self._find(token) if again else None
            if trial_id is None:
                with self._claim.turn():
                    trial_id = self._take(token, max_trials)
            if trial_id is None:
                return None
            suggestion = self._suggest_all(trial_id)
            make_lasting(self._storage)
            return suggestion

        suggestion = self._answered(attempt)
        self._token = None
        return suggestion

    def report(self, number: int, step: int, value: float) -> bool:
        def attempt() -> bool:
            if number not in self._trial_ids:
                self._trial_ids[number] = self._trial_id(number)
            trial_id = self._trial_ids[number]
            self._storage.set_trial_intermediate_value(trial_id, step, value)
            return self._study.pruner.prune(self._study, self._storage.get_trial(trial_id))

        return self._answered(attempt)

    def complete(
        self,
        number: int,
        values: Sequence[float],
        attributes: Mapping[str, object],
        violations: Mapping[str, float] | None = None,
    ) -> None:
        self._answered(lambda: self._tell(number, attributes, values=list(values), violations=violations or {}))

    def prune(self, number: int, reason: str, attributes: Mapping[str, object] | None = None) -> None:
        told = {**(attributes or {}), "reason": reason}
        self._answered(lambda: self._tell(number, told, state=TrialState.PRUNED))

    def fail(self, number: int, reason: str) -> None:
        self._answered(lambda: self._tell(number, {"reason": reason}, state=TrialState.FAIL))

    def records(self) -> Sequence[TrialRecord]:
        return self._answered(lambda: _records(self._trials(), self._is_mine))

    def retry_failed(self) -> None:
        """Have each failed trial of this driver tried again, once.

        A trial is told once, so in the storage it is another one, with the parameters and the curve of the failed one,
        and running from its first moment: whoever drives the sweep next adopts it. Here it is the same trial as before.
        """

        def attempt() -> None:
            with self._claim.turn():
                self._look_for_new()
                for trial in self._numbering.newest(self._trials()).values():
                    if trial.state == TrialState.FAIL and self._is_mine(trial):
                        self._storage.create_new_trial(self._id, template_trial=_again(trial, self._owner))
                self._look_for_new()
            make_lasting(self._storage)

        self._answered(attempt)

    def close(self) -> None:
        if self._backend is not None:
            close_storage(self._backend)

    def _answered(self, call: Callable[[], T]) -> T:
        self._claim.confirm()
        return answered(call)

    def _take(self, token: str, max_trials: float) -> int | None:
        """A running trial that is ours from its first moment, whatever is killed when: one that waits, or a new one."""
        self._look_for_new()
        if self._numbering.num_trials - len(self._waiting) >= max_trials:
            return None
        attributes = {OWNER: self._owner, TOKEN: token}
        self._study._thread_local.cached_all_trials = None  # as Study.ask does
        for trial_id in self._waiting:
            if self._take_waiting(trial_id, attributes):
                self._trials()  # for the cache of a database, which knows only what it has seen
                return trial_id
        return self._create(attributes)

    def _create(self, attributes: Mapping[str, str]) -> int:
        return self._storage.create_new_trial(
            self._id, template_trial=create_trial(state=TrialState.RUNNING, user_attrs=dict(attributes))
        )

    def _look_for_new(self) -> None:
        """Trials that came since the last look, of other drivers, or enqueued from outside, say by optuna-dashboard.

        A trial that does not wait never will.
        """
        while True:
            try:
                number = self._numbering.num_seen
                trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._id, number)
            except KeyError:
                break
            self._numbering.see(self._storage.get_trial(trial_id))
            self._waiting.append(trial_id)
        self._waiting = [
            trial_id for trial_id in self._waiting if self._storage.get_trial(trial_id).state == TrialState.WAITING
        ]

    def _take_waiting(self, trial_id: int, attributes: Mapping[str, str]) -> bool:
        """Whether it was still there to be taken."""
        try:
            for key, value in attributes.items():  # first, so that it is never running and nobody's
                self._storage.set_trial_user_attr(trial_id, key, value)
            return self._storage.set_trial_state_values(trial_id, state=TrialState.RUNNING)
        except UpdateFinishedTrialError:
            return False

    def _import(self, known: Callable[[], Sequence[KnownPoint]]) -> None:
        """Only ahead of the first trial of our own; what an import that was cut off had taken is not taken again."""
        trials = self._trials()
        if any(SOURCE not in trial.user_attrs for trial in trials):
            return
        there = {trial.user_attrs[SOURCE] for trial in trials}
        for point in known():
            if point.source not in there:
                trial = create_trial(
                    values=list(point.values),
                    params=dict(point.params),
                    distributions={key: self._distributions[key] for key in point.params},
                    user_attrs={SOURCE: point.source},
                    constraints=dict(point.violations),
                )
                self._storage.create_new_trial(self._id, template_trial=trial)

    def _find(self, token: str) -> int | None:
        running = (trial for trial in self._trials() if trial.state == TrialState.RUNNING)
        return next((trial._trial_id for trial in running if trial.user_attrs.get(TOKEN) == token), None)

    def _suggest_all(self, trial_id: int) -> Suggestion:
        """The trial's parameters, in the order of the space; those that it has already stay as they are."""
        frozen = self._storage.get_trial(trial_id)
        number = self._numbering.number(frozen)
        if number < len(self._points) and "fixed_params" not in frozen.system_attrs:
            self._storage.set_trial_system_attr(trial_id, "fixed_params", dict(self._points[number]))
        trial = optuna.Trial(self._study, trial_id)
        params: dict[str, Scalar] = {}
        for key, distribution in self._distributions.items():
            if self._space.is_active(key, params):
                params[key] = _suggest(trial, key, distribution)
        return Suggestion(number=number, params=params)

    def _tell(
        self,
        number: int,
        attributes: Mapping[str, object],
        *,
        values: list[float] | None = None,
        violations: Mapping[str, float] | None = None,
        state: TrialState | None = None,
    ) -> None:
        self._trial_ids.pop(number, None)
        trial_id = self._trial_id(number)
        frozen = self._storage.get_trial(trial_id)
        if frozen.state.is_finished():
            return
        for key, value in attributes.items():
            self._storage.set_trial_user_attr(trial_id, key, value)
        trial = optuna.Trial(self._study, trial_id)
        for name, violation in (violations or {}).items():
            if name not in frozen.constraints:
                trial.set_constraint(name, violation)
        self._study.tell(frozen.number, values, state=state, skip_if_finished=True)
        self._shrink(self._storage.get_trial(trial_id))

    def _shrink(self, trial: FrozenTrial) -> None:
        """Have a trial share its distributions with the others: of what a storage keeps in memory they are half."""
        known = self._distributions
        trial.distributions = {
            key: known[key] if known.get(key) == theirs else theirs for key, theirs in trial.distributions.items()
        }

    def _trial_id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._id, self._numbering.in_storage(number))

    def _trials(self) -> list[FrozenTrial]:
        return self._storage.get_all_trials(self._id, deepcopy=False)

    def _is_mine(self, trial: FrozenTrial) -> bool:
        return not self._shared or trial.user_attrs.get(OWNER) == self._owner


def _has_study(storage: BaseStorage, name: str) -> bool:
    try:
        storage.get_study_id_from_name(name)
    except KeyError:
        return False
    return True


def read_records(*, name: str, storage_url: str) -> Sequence[TrialRecord]:
    """The trials of a study that another process may be working on; none if there is no such study yet.

    Raises:
        ValueError: the storage cannot be opened.
    """
    if not exists(storage_url):
        return []
    storage = open_storage(storage_url)
    try:
        study_id = storage.get_study_id_from_name(name)
        return _records(storage.get_all_trials(study_id, deepcopy=False), lambda trial: True)
    except KeyError:
        return []
    finally:
        close_storage(storage)


def _again(trial: FrozenTrial, owner: str) -> FrozenTrial:
    """What a failed trial is when it is tried again."""
    return create_trial(
        state=TrialState.RUNNING,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs={OWNER: owner, RETRIES: trial.user_attrs.get(RETRIES, trial.number)},
        system_attrs=trial.system_attrs,
        intermediate_values=trial.intermediate_values,
    )


def _records(trials: Sequence[FrozenTrial], is_mine: Callable[[FrozenTrial], bool]) -> list[TrialRecord]:
    """Those that were asked for here: not those that wait, nor those taken over from another study."""
    numbering = Numbering(trials)
    num_retries = Counter(numbering.number(trial) for trial in trials if RETRIES in trial.user_attrs)
    return [
        _record(trial, number, mine=is_mine(trial), num_retries=num_retries[number])
        for number, trial in numbering.newest(trials).items()
        if trial.state != TrialState.WAITING
    ]


def _record(trial: FrozenTrial, number: int, *, mine: bool, num_retries: int) -> TrialRecord:
    return TrialRecord(
        number=number,
        params=trial.params,
        state=_STATES[trial.state],
        values=tuple(trial.values) if trial.state == TrialState.COMPLETE else (),
        feasible=all(violation <= 0 for violation in trial.constraints.values()),
        attributes={key: value for key, value in trial.user_attrs.items() if key not in (OWNER, TOKEN, RETRIES)},
        mine=mine,
        num_retries=num_retries,
    )


def as_distribution(domain: Domain) -> BaseDistribution:
    match domain:
        case FloatDomain(low=low, last=last, log=log, step=step):
            return FloatDistribution(low, last, log=log, step=step)
        case IntDomain(low=low, last=last, log=log, step=int_step):
            return IntDistribution(low, last, log=log, step=int_step or 1)
        case CategoricalDomain(choices=choices):
            return CategoricalDistribution(choices)


def _suggest(trial: optuna.Trial, key: str, distribution: BaseDistribution) -> Any:
    match distribution:
        case FloatDistribution(low=low, high=high, log=log, step=step):
            return trial.suggest_float(key, low, high, log=log, step=step)
        case IntDistribution(low=low, high=high, log=log, step=int_step):
            return trial.suggest_int(key, low, high, log=log, step=int_step)
        case CategoricalDistribution(choices=choices):
            return trial.suggest_categorical(key, choices)
    raise AssertionError(f"{distribution} is none of ours")
