"""From a trial's parameters to the experiments that its runs are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from orchestrator.config.loading import load_asset
from orchestrator.config.sweep import VARIANT, Sweep
from orchestrator.experiment_config.experiment import experiment
from orchestrator.schema import join
from orchestrator.search_space import CategoricalDomain
from orchestrator.settings import difference, merge, plain_mapping
from orchestrator.study import Suggestion
from orchestrator.trial import RunSpec, Scalar, TrialSpec


def resolve(sweep: Sweep, params: Mapping[str, Scalar]) -> dict[str, Any]:
    """The experiment with a trial's parameters applied, checked again as a whole."""
    return _filled(merge(sweep.experiment, sweep.changes(params)))


def _filled(plain: Mapping[str, Any]) -> dict[str, Any]:
    return plain_mapping(asdict(experiment(plain)))


def plan_trial(sweep: Sweep, suggestion: Suggestion) -> TrialSpec:
    """A trial's runs: every prompt with every seed."""
    config = resolve(sweep, suggestion.params)
    runs = tuple(
        RunSpec(
            run_id=f"t{suggestion.number:04d}-p{i:02d}-s{seed}",
            trial=suggestion.number,
            prompt=prompt,
            seed=seed,
            config=config,
            params=dict(suggestion.params),
        )
        for i, prompt in enumerate(sweep.config.prompts)
        for seed in sweep.config.seeds
    )
    return TrialSpec(number=suggestion.number, params=suggestion.params, runs=runs)


def experiments(sweep: Sweep) -> dict[str, dict[str, Any]]:
    """What will be run, by the key under which a fault of it stands in the sweep file.

    Of searched values those alone that name files.
    """
    variants = sweep.config.search.variants
    if variants:
        return {join("search.variants", name): resolve(sweep, {VARIANT: name}) for name in variants}
    found = {"": dict(sweep.experiment)}
    for key, domain in sweep.space.domains.items():
        if isinstance(domain, CategoricalDomain) and key.endswith(".path") and key not in sweep.space.conditions:
            for choice in domain.choices:
                found[f"search.space.{key} ({choice})"] = resolve(sweep, {key: choice})
    return found


def as_asset_settings(sweep: Sweep, params: Mapping[str, Scalar]) -> dict[str, Any]:
    """What `psd run` has to be told, by dotted key, to make one of a trial's runs; the trial's own settings first."""
    told = difference(load_asset(sweep.config.prompts[0]).experiment, resolve(sweep, params))
    return {key: told[key] for key in own_settings(sweep, params) if key in told} | told


def own_settings(sweep: Sweep, params: Mapping[str, Scalar]) -> dict[str, Any]:
    """What a trial changes in the sweep's experiment, by dotted key."""
    return difference(sweep.experiment, resolve(sweep, params)) if sweep.config.search.variants else dict(params)
