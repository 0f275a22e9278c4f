"""The search space of a sweep file: domains, when each is there, and that every end of each is an allowed value."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.config.composition import parse_sweep_syntax
from orchestrator.experiment_config.experiment import ExperimentConfig, experiment
from orchestrator.schema import ConfigError, did_you_mean, find_setting, join
from orchestrator.search_space import CategoricalDomain, Condition, Domain, SearchSpace, flatten, parse_domain
from orchestrator.settings import leaves, merge, nest
from orchestrator.trial import Scalar

MAX_BRANCHES = 256


def parse_space(node: Mapping[str, Any], filled: Mapping[str, Any]) -> SearchSpace:
    """The space that a sweep file describes over an experiment with every default filled in.

    A searched ``kind`` makes branches; a key that only some kinds have is searched in their branches alone.

    Raises:
        ConfigError: no such setting, no such value, or an end of a domain that the experiment refuses.
    """
    nodes = {key: parse_sweep_syntax(value, join("search.space", key)) for key, value in flatten(node).items()}
    kinds = {key: item for key, item in sorted(nodes.items(), key=lambda item: item[0].count(".")) if _is_kind(key)}
    branches = [_Branch(filled, choice) for choice in _choices(kinds)]
    _check_kinds(kinds, branches, filled)
    domains: dict[str, Domain] = {}
    conditions: dict[str, Condition] = {}
    for key in [*kinds, *(key for key in nodes if key not in kinds)]:
        homes = [branch for branch in branches if branch.has(key)]
        if not homes:
            raise _no_such_setting(key, branches[0], filled)
        domains[key] = parse_domain(nodes[key], homes[0].find(key), join("search.space", key))
        above = _searched_above(key, kinds)
        if above is not None:
            values = dict.fromkeys(branch.choice[above] for branch in homes)
            conditions[key] = Condition(key=above, values=tuple(values))
    for branch in branches:
        branch.check({key: domain for key, domain in domains.items() if branch.has(key)})
    return SearchSpace(domains=domains, conditions=conditions)


def check_start(points: Sequence[Mapping[str, Any]], space: SearchSpace) -> None:
    """Raises:
    ConfigError: a point to try first lies outside the space.
    """
    for i, point in enumerate(points):
        for name, value in point.items():
            key = f"search.start[{i}].{name}"
            if name not in space.domains:
                raise ConfigError(key, f"is not in search.space{did_you_mean(name, space.domains)}")
            if value not in space.domains[name]:
                raise ConfigError(key, f"must lie in its domain ({space.domains[name]}); got {value!r}")
            condition = space.conditions.get(name)
            if condition is not None and condition.key in point and not condition.holds(point):
                raise ConfigError(key, f"is there only {condition}")


class _Branch:
    """The experiment with one choice of every searched kind."""

    def __init__(self, filled: Mapping[str, Any], choice: Mapping[str, Scalar]) -> None:
        self.choice = choice
        self._tree = filled
        self._kinds = {key.removesuffix(".kind"): value for key, value in leaves(filled) if _is_kind(key)}
        for key, kind in choice.items():
            above = key.removesuffix(".kind")
            if self.has(key):
                self._tree = merge(self._tree, nest({key: kind}))
                if self._kinds.get(above) != kind:
                    self._kinds = {k: v for k, v in self._kinds.items() if not k.startswith(above + ".")}
                self._kinds[above] = kind

    def find(self, key: str) -> Any:
        return find_setting(ExperimentConfig, key, {**self._kinds, **self._own_kind(key)})

    def has(self, key: str) -> bool:
        try:
            self.find(key)
        except ConfigError:
            return False
        return True

    def _own_kind(self, key: str) -> dict[str, Any]:
        """To find a searched kind itself, any of its values will do."""
        return {key.removesuffix(".kind"): self.choice[key]} if key in self.choice else {}

    def check(self, domains: Mapping[str, Domain]) -> None:
        present = dict(leaves(self._tree))
        needed = {key: domain.ends()[0] for key, domain in domains.items() if key not in present}
        base = merge(self._tree, nest(needed))
        for key, domain in domains.items():
            for value in (self.choice[key],) if key in self.choice else domain.ends():
                try:
                    experiment(merge(base, nest({key: value})))
                except ConfigError as error:
                    culprit, tried = self._culprit(error.key, {**needed, key: value}) or (key, value)
                    raise ConfigError(
                        join("search.space", culprit), f"{tried!r} is not allowed there: {error}"
                    ) from None

    def _culprit(self, wrong: str, tried: Mapping[str, Any]) -> tuple[str, Any] | None:
        """The searched key that a wrong setting goes back to: itself, or the kind that asks for it."""
        if wrong in tried:
            return wrong, tried[wrong]
        kind = _searched_above(wrong, self.choice)
        return None if kind is None else (kind, self.choice[kind])


def _check_kinds(kinds: Mapping[str, Any], branches: Sequence[_Branch], filled: Mapping[str, Any]) -> None:
    """Each choice of a searched kind must be one somewhere."""
    for key in kinds:
        for value in dict.fromkeys(branch.choice[key] for branch in branches):
            homes = [branch for branch in branches if branch.choice[key] == value]
            if not any(branch.has(key) for branch in homes):
                raise _no_such_setting(key, homes[0], filled)


def _is_kind(key: str) -> bool:
    return key.endswith(".kind")


def _choices(kinds: Mapping[str, Any]) -> list[dict[str, Scalar]]:
    """Every combination of the searched kinds."""
    listed = {}
    for key, node in kinds.items():
        domain = parse_domain(node, str, join("search.space", key))
        assert isinstance(domain, CategoricalDomain)
        listed[key] = domain.choices
    combinations = [dict(zip(listed, values, strict=True)) for values in itertools.product(*listed.values())]
    if len(combinations) > MAX_BRANCHES:
        raise ConfigError("search.space", f"has {len(combinations)} combinations of kinds; at most {MAX_BRANCHES} go")
    return combinations


def _searched_above(key: str, kinds: Mapping[str, Any]) -> str | None:
    """The nearest searched kind on whose choice a key may depend."""
    above = [kind for kind in kinds if kind != key and key.startswith(kind.removesuffix("kind"))]
    return max(above, key=len, default=None)


def _no_such_setting(key: str, branch: _Branch, filled: Mapping[str, Any]) -> ConfigError:
    try:
        branch.find(key)
    except ConfigError as error:
        message = error.message if error.key == key else str(error)
        if error.message.startswith("unknown key"):
            guess = did_you_mean(key, dict(leaves(filled))) or error.message.removeprefix("unknown key")
            message = f"is not a setting of the experiment{guess}"
        return ConfigError(join("search.space", key), message)
    raise AssertionError(f"{key} was not found before")
