"""From plain values to a checked sweep; every fault ends here, with its key, before anything starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from orchestrator import storage_url
from orchestrator.config.composition import CONF, parse_overrides
from orchestrator.config.space import check_start, parse_space
from orchestrator.config.sweep import VARIANT, Sweep, SweepConfig
from orchestrator.errors import UserError
from orchestrator.experiment_config.experiment import ExperimentConfig, experiment
from orchestrator.pruning import NoPruning, WilcoxonPruning
from orchestrator.schema import ConfigError, did_you_mean, join, parse, unknown_key
from orchestrator.search_space import CategoricalDomain, SearchSpace
from orchestrator.settings import leaves, merge, nest, plain_mapping

EXPERIMENT_KEYS = tuple(item.name for item in fields(ExperimentConfig))


def checked(plain: dict[str, Any], overrides: Sequence[str], source: str) -> Sweep:
    try:
        return _check(plain, source)
    except ConfigError as error:
        if any(error.key == key or error.key.startswith(key + ".") for key in parse_overrides(overrides)):
            source = "command line"
        raise UserError(error.message, file=source, key=error.key) from None


def _check(plain: dict[str, Any], source: str) -> Sweep:
    sweep_keys = [item.name for item in fields(SweepConfig)]
    for key in plain:
        if key not in sweep_keys and key not in EXPERIMENT_KEYS:
            raise _misplaced(key, plain) or unknown_key(key, key, [*sweep_keys, *EXPERIMENT_KEYS])
    config = parse(SweepConfig, {key: value for key, value in plain.items() if key in sweep_keys})
    parsed = parse(ExperimentConfig, {key: value for key, value in plain.items() if key in EXPERIMENT_KEYS})
    _check_metrics(config, parsed)
    filled = plain_mapping(asdict(parsed))
    if config.search.variants:
        _check_variants(config, filled)
        names = CategoricalDomain(choices=tuple(config.search.variants))
        space = SearchSpace(domains={VARIANT: names}, conditions={})
    else:
        space = parse_space(config.search.space, filled)
        check_start(config.search.start, space)
    sweep = Sweep(config=config, experiment=filled, space=space, source=source)
    _check_sampler(sweep)
    _check_pruning(sweep, parsed)
    _check_storages(config)
    if config.share_study and not (config.storage or "").startswith("postgres"):
        raise ConfigError("share_study", "needs PostgreSQL; set storage to postgresql://USER@HOST/DATABASE")
    return sweep


def _misplaced(key: str, plain: Mapping[str, Any]) -> ConfigError | None:
    """What to say of a root key that is known in another place."""
    if (CONF / key).is_dir():
        return ConfigError(key, f"is chosen in `defaults`, as [sweep, experiment: toybox, {key}: NAME, _self_]")
    owners = [name for name, _ in leaves(plain) if name.endswith(f".{key}")]
    return ConfigError(key, f"unknown key; did you mean {' or '.join(owners[:3])}?") if owners else None


def _check_storages(config: SweepConfig) -> None:
    for key, url in (("storage", config.storage), ("search.warm_start.storage", config.search.warm_start.storage)):
        try:
            if url is not None:
                storage_url.check(url)
        except ValueError as error:
            raise ConfigError(key, str(error)) from None


def _check_metrics(config: SweepConfig, parsed: ExperimentConfig) -> None:
    objective = config.objective
    named = {"objective.metric": objective.metric}
    named |= {f"objective.against.{name}": name for name in objective.against}
    named |= {f"objective.constraints.{name}": name for name in objective.constraints}
    for key, metric in named.items():
        if metric not in parsed.metrics:
            allowed, guess = ", ".join(parsed.metrics), did_you_mean(metric, parsed.metrics)
            raise ConfigError(key, f"must be one of {allowed}; got {metric!r}{guess}")


def _check_sampler(sweep: Sweep) -> None:
    """Each sampler can do what is asked of it."""
    search, space = sweep.config.search, sweep.space
    if sweep.walks_a_grid:
        try:
            num_points = len(space.points())
        except ConfigError as error:
            raise ConfigError(join("search.space", error.key), error.message) from None
        if sweep.config.trials is not None and sweep.config.trials > num_points:
            what = "variants" if search.variants else "points of the grid"
            raise ConfigError(
                "trials", f"must be <= {num_points}, the number of {what}, or null; got {sweep.config.trials}"
            )
    elif search.sampler == "cmaes":
        if len(sweep.goals) > 1:
            raise ConfigError("search.sampler", "cmaes has one objective; drop objective.against, or use tpe or nsga2")
        for key, domain in space.domains.items():
            if isinstance(domain, CategoricalDomain) or key in space.conditions:
                raise ConfigError(f"search.space.{key}", "is not a plain range, as cmaes needs; use tpe, or drop it")


def _check_pruning(sweep: Sweep, parsed: ExperimentConfig) -> None:
    pruning, config = sweep.config.search.pruning, sweep.config
    if isinstance(pruning, NoPruning):
        return
    if len(sweep.goals) > 1:
        raise ConfigError("search.pruning", "needs one objective; drop objective.against, or set kind to none")
    if isinstance(pruning, WilcoxonPruning):
        num_runs = len(config.prompts) * len(config.seeds)
        if num_runs <= max(2, pruning.startup_runs):
            raise ConfigError(
                "search.pruning",
                f"wilcoxon needs more runs a trial than {num_runs}; add prompts or seeds, or use median",
            )
        return
    metric = pruning.metric or config.objective.metric
    if metric not in parsed.curve_metrics:
        allowed = ", ".join(parsed.curve_metrics)
        raise ConfigError("search.pruning.metric", f"must be measured during a run: one of {allowed}; got {metric!r}")
    if parsed.evaluation.every >= parsed.optimization.num_steps:
        raise ConfigError(
            "search.pruning",
            f"finds no curve: evaluation.every ({parsed.evaluation.every}) must be below "
            f"optimization.num_steps ({parsed.optimization.num_steps})",
        )


def _check_variants(config: SweepConfig, filled: Mapping[str, Any]) -> None:
    """Each variant must be an experiment of its own, with the sweep's metric, and mean all that it says."""
    for name, settings in config.search.variants.items():
        try:
            if not name.strip() or not name.isprintable() or len(name) > 60:
                raise ConfigError("", "a variant's name must be 1 to 60 printable characters")
            changes = nest(settings)
            parsed = experiment(merge(filled, changes))
            _check_metrics(config, parsed)
            known = dict(leaves(asdict(parsed)))
            for key, _ in leaves(changes):
                if not any(other == key or other.startswith(key + ".") for other in known):
                    raise ConfigError(key, "belongs to another kind than the variant has; drop it or change the kind")
        except ConfigError as error:
            raise ConfigError(join("search.variants", name), str(error)) from None
