"""Domains: where a search may place one hyper-parameter. Plain values, free of any optimiser's own classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.schema import ConfigError, alternatives, parse
from orchestrator.trial import Scalar

MAX_STEPS = 1_000_000
_OFF_GRID = 1e-6  # of a step: what rounding may make of a multiple of it


@dataclass(frozen=True, kw_only=True)
class FloatDomain:
    low: float
    high: float
    log: bool = False
    step: float | None = None

    def __post_init__(self) -> None:
        _check_range(self.low, self.high, self.log, self.step)

    def ends(self) -> tuple[Scalar, ...]:
        """The values to try first when asking whether the whole domain is allowed."""
        return (self.low, self.last)

    @property
    def last(self) -> float:
        """The highest value: ``high`` itself, unless the steps from ``low`` miss it."""
        return self.high if self.step is None else self.low + self.step * _num_steps(self.low, self.high, self.step)

    def values(self) -> tuple[Scalar, ...] | None:
        """All of them; None where they are infinitely many."""
        if self.step is None:
            return (self.low,) if self.low == self.high else None
        return tuple(self.low + i * self.step for i in range(_num_steps(self.low, self.high, self.step) + 1))

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool) or not self.low <= value <= self.high:
            return False
        num_steps = 0.0 if self.step is None else (value - self.low) / self.step
        return abs(num_steps - round(num_steps)) < _OFF_GRID

    def __str__(self) -> str:
        return f"{self.low:g} .. {self.high:g}" + (
            " (log)" if self.log else f" step {self.step:g}" if self.step else ""
        )


@dataclass(frozen=True, kw_only=True)
class IntDomain:
    low: int
    high: int
    log: bool = False
    step: int | None = None

    def __post_init__(self) -> None:
        _check_range(self.low, self.high, self.log, self.step)

    def ends(self) -> tuple[Scalar, ...]:
        return (self.low, self.last)

    @property
    def last(self) -> int:
        step = self.step or 1
        return self.low + (self.high - self.low) // step * step

    def values(self) -> tuple[Scalar, ...] | None:
        return tuple(range(self.low, self.high + 1, self.step or 1))

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int) or isinstance(value, bool):
            return False
        return self.low <= value <= self.high and (value - self.low) % (self.step or 1) == 0

    def __str__(self) -> str:
        return f"{self.low} .. {self.high}" + (" (log)" if self.log else f" step {self.step}" if self.step else "")


@dataclass(frozen=True, kw_only=True)
class CategoricalDomain:
    choices: tuple[Scalar, ...]

    def __post_init__(self) -> None:
        if not self.choices:
            raise ValueError("must list at least one value; got an empty list")
        if len(set(map(repr, self.choices))) < len(self.choices):
            raise ValueError(f"must list each value once; got {list(self.choices)}")

    def ends(self) -> tuple[Scalar, ...]:
        return self.choices

    def values(self) -> tuple[Scalar, ...] | None:
        return self.choices

    def __contains__(self, value: object) -> bool:
        return any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in self.choices)

    def __str__(self) -> str:
        return ", ".join(str(choice) for choice in self.choices)


Domain = FloatDomain | IntDomain | CategoricalDomain


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A hyper-parameter is there only where another one has one of these values."""

    key: str
    values: tuple[Scalar, ...]

    def holds(self, params: Mapping[str, Scalar]) -> bool:
        return params.get(self.key) in self.values

    def __str__(self) -> str:
        return f"where {self.key} is {' or '.join(map(str, self.values))}"


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """Domains by key, and when a key is there at all. What a condition looks at stands before what depends on it."""

    domains: Mapping[str, Domain]
    conditions: Mapping[str, Condition]

    def is_active(self, key: str, params: Mapping[str, Scalar]) -> bool:
        return key not in self.conditions or self.conditions[key].holds(params)

    def admits(self, params: Mapping[str, Scalar]) -> bool:
        """Whether the parameters are exactly those of one point of the space."""
        active = {key for key in self.domains if self.is_active(key, params)}
        return active == params.keys() and all(value in self.domains[key] for key, value in params.items())

    def points(self) -> list[dict[str, Scalar]]:
        """Every point; the last key varies fastest.

        Raises:
            ConfigError: a domain has infinitely many values.
        """
        points: list[dict[str, Scalar]] = [{}]
        for key, domain in self.domains.items():
            values = domain.values()
            if values is None:
                raise ConfigError(key, "has no finite list of values to make a grid of; give it a step, or list them")
            points = [
                longer
                for point in points
                for longer in ([{**point, key: value} for value in values] if self.is_active(key, point) else [point])
            ]
        return points


def parse_domain(node: object, hint: Any, key: str) -> Domain:
    """The domain that a sweep file gives for a setting of the type ``hint``.

    A list means "one of these"; ``{low, high, log, step}`` a range, of whole numbers where the setting is one.
    """
    types = alternatives(hint)
    if isinstance(node, Sequence) and not isinstance(node, str):
        whole_too = float in types and int not in types  # 2 is as good as 2.0
        choices = tuple(float(choice) if whole_too and type(choice) is int else choice for choice in node)
        if not all(isinstance(choice, str | bool | int | float) for choice in choices):
            raise ConfigError(key, f"must list plain values; got {list(node)}")
        try:
            return CategoricalDomain(choices=choices)
        except ValueError as error:
            raise ConfigError(key, str(error)) from None
    if not isinstance(node, Mapping):
        raise ConfigError(
            key, f"must be a list of values, {{low: , high: , log: , step: }}, or interval(low, high); got {node!r}"
        )
    if float in types:
        return parse(FloatDomain, node, key)
    if int in types:
        return parse(IntDomain, node, key)
    raise ConfigError(key, "must be a list of values, since the setting is not a number")


def flatten(space: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Dotted keys from a search space that may nest (as overrides on the command line make it); what is later wins."""
    flat: dict[str, object] = {}
    for name, node in space.items():
        key = f"{prefix}{name}"
        if isinstance(node, Mapping) and any(isinstance(item, Mapping | list) for item in node.values()):
            found = flatten(node, key + ".")
        else:
            found = {key: node}
        for dotted, domain in found.items():
            earlier = flat.get(dotted)
            merged = {**earlier, **domain} if isinstance(earlier, Mapping) and isinstance(domain, Mapping) else domain
            flat[dotted] = merged
    return flat


def _num_steps(low: float, high: float, step: float) -> int:
    return math.floor((high - low) / step + _OFF_GRID)


def _check_range(low: float, high: float, log: bool, step: float | None) -> None:
    if low > high:
        raise ConfigError("low", f"must be <= high ({high:g}); got {low:g}")
    if log and low <= 0:
        raise ConfigError("low", f"must be > 0 on a log scale; got {low:g}")
    if step is not None and step <= 0:
        raise ConfigError("step", f"must be > 0; got {step:g}")
    if step is not None and log:
        raise ConfigError("step", "cannot be combined with log; drop one of them")
    if step is not None and step > high - low:
        raise ConfigError("step", f"must be <= high - low ({high - low:g}); got {step:g}")
    if step is not None and (high - low) / step > MAX_STEPS:
        raise ConfigError("step", f"must leave at most {MAX_STEPS} steps between low and high; got {step:g}")
