"""Pruners: from the rule in a sweep file to Optuna's own."""

from __future__ import annotations

import warnings

import optuna
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, PercentilePruner, WilcoxonPruner

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
