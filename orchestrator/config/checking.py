"""From plain values to a checked sweep; every fault ends here, with its key, before anything starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from orchestrator.config.composition import parse_overrides
from orchestrator.config.sweep import VARIANT, Sweep, SweepConfig
from orchestrator.errors import UserError
from orchestrator.experiment_config.experiment import ExperimentConfig, experiment
from orchestrator.schema import ConfigError, did_you_mean, join, parse, unknown_key
from orchestrator.search_space import CategoricalDomain, Domain, flatten, parse_domain
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
            raise unknown_key(key, key, [*sweep_keys, *EXPERIMENT_KEYS])
    config = parse(SweepConfig, {key: value for key, value in plain.items() if key in sweep_keys})
    parsed = parse(ExperimentConfig, {key: value for key, value in plain.items() if key in EXPERIMENT_KEYS})
    _check_metric(config.objective.metric, parsed)
    filled = plain_mapping(asdict(parsed))
    if config.search.variants:
        _check_variants(config, filled)
        space: dict[str, Domain] = {VARIANT: CategoricalDomain(choices=tuple(config.search.variants))}
    else:
        space = _check_space(config.search.space, filled)
        _check_start(config.search.start, space)
    return Sweep(config=config, experiment=filled, space=space, source=source)


def _check_metric(metric: str, parsed: ExperimentConfig) -> None:
    if metric not in parsed.metrics:
        allowed, guess = ", ".join(parsed.metrics), did_you_mean(metric, parsed.metrics)
        raise ConfigError("objective.metric", f"must be one of {allowed}; got {metric!r}{guess}")


def _check_variants(config: SweepConfig, filled: Mapping[str, Any]) -> None:
    """Each variant must be an experiment of its own, with the sweep's metric, and mean all that it says."""
    variants = config.search.variants
    if config.trials is not None and config.trials > len(variants):
        raise ConfigError("trials", f"must be <= {len(variants)}, the number of variants, or null; got {config.trials}")
    for name, settings in variants.items():
        try:
            if not name.strip() or not name.isprintable() or len(name) > 60:
                raise ConfigError("", "a variant's name must be 1 to 60 printable characters")
            changes = nest(settings)
            parsed = experiment(merge(filled, changes))
            _check_metric(config.objective.metric, parsed)
            known = dict(leaves(asdict(parsed)))
            for key, _ in leaves(changes):
                if not any(other == key or other.startswith(key + ".") for other in known):
                    raise ConfigError(key, "belongs to another kind than the variant has; drop it or change the kind")
        except ConfigError as error:
            raise ConfigError(join("search.variants", name), str(error)) from None


def _check_space(space: Mapping[str, Any], filled: dict[str, Any]) -> dict[str, Domain]:
    """The domains, each of whose ends must be a value that the experiment accepts at that key."""
    settings = dict(leaves(filled))
    domains: dict[str, Domain] = {}
    for name, node in flatten(space).items():
        key = join("search.space", name)
        if name not in settings:
            guess = did_you_mean(name, settings)
            raise ConfigError(key, f"is not a setting of the experiment{guess or '; see `psd sweep FILE --dry-run`'}")
        domains[name] = parse_domain(node, settings[name], key)
        for value in domains[name].ends():
            try:
                experiment(merge(filled, nest({name: value})))
            except ConfigError as error:
                raise ConfigError(key, f"{value!r} is not allowed there: {error}") from None
    return domains


def _check_start(points: Sequence[Mapping[str, Any]], space: Mapping[str, Domain]) -> None:
    for i, point in enumerate(points):
        for name, value in point.items():
            key = f"search.start[{i}].{name}"
            if name not in space:
                raise ConfigError(key, f"is not in search.space{did_you_mean(name, space)}")
            if value not in space[name]:
                raise ConfigError(key, f"must lie in its domain ({space[name]}); got {value!r}")
