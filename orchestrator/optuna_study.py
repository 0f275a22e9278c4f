"""The study that Optuna keeps: ask and tell over any of its storages."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, QMCSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event
from sqlalchemy.exc import SQLAlchemyError

from orchestrator.search_space import CategoricalDomain, Domain, FloatDomain, IntDomain, grid
from orchestrator.study import Suggestion, TrialRecord
from orchestrator.trial import Scalar

_STATES = {
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


class OptunaStudy:
    """A study in an Optuna storage, by name; opened again, it goes on where it stopped.

    ``start`` are points to try first; what a point leaves open is sampled.

    Raises:
        ValueError: the storage cannot be opened, or it holds a study of that name with another direction.
    """

    def __init__(
        self,
        *,
        name: str,
        storage_url: str | None,
        space: Mapping[str, Domain],
        direction: Literal["maximize", "minimize"] = "maximize",
        sampler: Literal["tpe", "random", "qmc", "grid"] = "tpe",
        seed: int = 0,
        startup_trials: int = 6,
        start: Sequence[Mapping[str, Scalar]] = (),
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._distributions = {key: _distribution(domain) for key, domain in space.items()}
        self._study = optuna.create_study(
            study_name=name,
            storage=None if storage_url is None else _open_storage(storage_url),
            direction=direction,
            load_if_exists=True,
        )
        if self._study.direction.name.lower() != direction:
            raise ValueError(
                f"the study {name} exists and would {self._study.direction.name.lower()}; use another name"
            )
        num_trials = len(self._trials())
        self._study.sampler = _sampler(sampler, space, _seed(seed, num_trials), startup_trials)
        self._finish_asking()
        if num_trials == 0:
            for point in start:
                self._study.enqueue_trial(dict(point))

    def ask(self) -> Suggestion:
        trial = self._study.ask(fixed_distributions=self._distributions)
        return Suggestion(number=trial.number, params=dict(trial.params))

    def complete(self, number: int, value: float, attributes: Mapping[str, object]) -> None:
        self._annotate(number, attributes)
        self._study.tell(number, value, skip_if_finished=True)

    def fail(self, number: int, reason: str) -> None:
        self._annotate(number, {"reason": reason})
        self._study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def running(self) -> Sequence[Suggestion]:
        return [
            Suggestion(number=trial.number, params=trial.params)
            for trial in self._trials()
            if trial.state == TrialState.RUNNING
        ]

    def records(self) -> Sequence[TrialRecord]:
        return [_record(trial) for trial in self._trials() if trial.state != TrialState.WAITING]

    def _trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _annotate(self, number: int, attributes: Mapping[str, object]) -> None:
        trial = self._trials()[number]
        if trial.state.is_finished():
            return
        for key, value in attributes.items():
            self._study._storage.set_trial_user_attr(trial._trial_id, key, value)

    def _finish_asking(self) -> None:
        """A driver that dies inside ``ask`` leaves a running trial without all of its parameters."""
        for trial in self._trials():
            if trial.state == TrialState.RUNNING and trial.params.keys() != self._distributions.keys():
                resumed = optuna.Trial(self._study, trial._trial_id)
                for name, distribution in self._distributions.items():
                    resumed._suggest(name, distribution)


def read_records(*, name: str, storage_url: str) -> Sequence[TrialRecord]:
    """The trials of a study that another process may be working on; none if there is no such study yet."""
    if storage_url.startswith("sqlite:///") and not Path(storage_url.removeprefix("sqlite:///")).exists():
        return []
    try:
        study = optuna.load_study(study_name=name, storage=_open_storage(storage_url))
    except KeyError:
        return []
    return [_record(trial) for trial in study.get_trials(deepcopy=False) if trial.state != TrialState.WAITING]


def _record(trial: FrozenTrial) -> TrialRecord:
    return TrialRecord(
        number=trial.number,
        params=trial.params,
        state=_STATES[trial.state],
        value=trial.value if trial.state == TrialState.COMPLETE else None,
        attributes=trial.user_attrs,
    )


def _open_storage(url: str) -> BaseStorage:
    if not url.startswith("sqlite"):
        try:
            return optuna.storages.get_storage(url)
        except (SQLAlchemyError, ValueError, ImportError) as error:
            raise ValueError(f"the storage {url} cannot be opened: {str(error).splitlines()[0]}") from error
    try:
        storage = RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})
    except (SQLAlchemyError, ValueError, RuntimeError) as error:
        raise ValueError(f"the storage {url} cannot be opened: {str(error).splitlines()[0]}") from error
    event.listen(storage.engine, "connect", _hasten)
    storage.engine.dispose()  # the connections made so far did not hear of it
    return storage


def _hasten(connection: Any, _record: object) -> None:
    """Half the time per trial of SQLite's defaults; a power cut may lose the last commits, never the file."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()


def _distribution(domain: Domain) -> BaseDistribution:
    match domain:
        case FloatDomain(low=low, high=high, log=log, step=step):
            return FloatDistribution(low, high, log=log, step=step)
        case IntDomain(low=low, high=high, log=log, step=int_step):
            return IntDistribution(low, high, log=log, step=int_step or 1)
        case CategoricalDomain(choices=choices):
            return CategoricalDistribution(choices)


class _GridSampler(BaseSampler):
    """Trial n gets point n, so that a restart, or a second driver, goes on where the last one stopped.

    Optuna's own draws points at random among those not yet visited, and ends the study from within ``tell``.
    """

    def __init__(self, points: Sequence[Mapping[str, Scalar]]) -> None:
        self._points = points

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._points[trial.number % len(self._points)][param_name]


def _sampler(
    kind: Literal["tpe", "random", "qmc", "grid"], space: Mapping[str, Domain], seed: int, startup_trials: int
) -> BaseSampler:
    match kind:
        case "grid":
            return _GridSampler(grid(space))
        case "tpe":
            # The constant liar keeps trials that run side by side from asking for the same point.
            return TPESampler(seed=seed, n_startup_trials=startup_trials, multivariate=True, constant_liar=True)
        case "random":
            return RandomSampler(seed=seed)
        case "qmc":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                return QMCSampler(seed=seed, scramble=True, warn_independent_sampling=False)


def _seed(seed: int, num_trials: int) -> int:
    """Not the same after a restart, or the sampler would ask for the same points again."""
    return int(np.random.SeedSequence([seed, num_trials]).generate_state(1)[0])
