"""Pruners: from the rule in a sweep file to Optuna's own, and the study that they are given to look at."""

from __future__ import annotations

import warnings
from collections.abc import Container

import optuna
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, PercentilePruner, WilcoxonPruner
from optuna.trial import FrozenTrial, TrialState

from orchestrator.optuna_study.storage import num_completions
from orchestrator.pruning import (
    HyperbandPruning,
    MedianPruning,
    NoPruning,
    PercentilePruning,
    Pruning,
    WilcoxonPruning,
)


def make_pruner(pruning: Pruning, *, num_steps: int) -> BasePruner:
    """``num_steps`` is the length of a run."""
    match pruning:
        case NoPruning():
            return NopPruner()
        case MedianPruning(startup_trials=startup_trials, warmup_steps=warmup_steps):
            return MedianPruner(n_startup_trials=startup_trials, n_warmup_steps=warmup_steps)
        case PercentilePruning(keep_percent=percent, startup_trials=startup_trials, warmup_steps=warmup_steps):
            return PercentilePruner(percent, n_startup_trials=startup_trials, n_warmup_steps=warmup_steps)
        case HyperbandPruning(min_steps=min_steps, reduction_factor=reduction_factor):
            return HyperbandPruner(
                min_resource=min_steps, max_resource=max(num_steps, min_steps), reduction_factor=reduction_factor
            )
        case WilcoxonPruning(p_threshold=p_threshold, startup_runs=startup_runs):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                return WilcoxonPruner(p_threshold=p_threshold, n_startup_steps=startup_runs)


class WatchedStudy(optuna.Study):
    """A study whose complete trials are looked up when there may be new ones, not at each report.

    Optuna's pruners of curves ask for them whenever they are asked, and its storages walk through all trials for them.
    A complete trial stays as it is, so the answer is the same as long as the storage says that none was added. One that
    cannot say, such as a database that other drivers write to, is asked each time.
    """

    def __init__(self, *, name: str, storage: optuna.storages.BaseStorage, pruner: BasePruner) -> None:
        super().__init__(study_name=name, storage=storage, pruner=pruner)
        self._complete: list[FrozenTrial] = []
        self._num_known: int | None = None

    def get_trials(self, deepcopy: bool = True, states: Container[TrialState] | None = None) -> list[FrozenTrial]:
        if deepcopy or states != (TrialState.COMPLETE,):
            return super().get_trials(deepcopy, states)
        num_told = num_completions(self._storage)
        if num_told is None or num_told != self._num_known:
            self._complete = super().get_trials(deepcopy, states)
            self._num_known = num_told  # from before the walk: what came meanwhile is looked up next time
        return self._complete
