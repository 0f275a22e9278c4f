"""Domains: where a search may place one hyper-parameter. Plain values, free of any optimiser's own classes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.schema import ConfigError, parse
from orchestrator.trial import Scalar


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
        return (self.low, self.high)

    def values(self) -> tuple[Scalar, ...] | None:
        """All of them; None where they are infinitely many."""
        if self.step is None:
            return (self.low,) if self.low == self.high else None
        return tuple(self.low + i * self.step for i in range(_num_steps(self.low, self.high, self.step) + 1))

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high

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
        return (self.low, self.high)

    def values(self) -> tuple[Scalar, ...] | None:
        return tuple(range(self.low, self.high + 1, self.step or 1))

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and self.low <= value <= self.high

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
        return value in self.choices

    def __str__(self) -> str:
        return ", ".join(str(choice) for choice in self.choices)


Domain = FloatDomain | IntDomain | CategoricalDomain


def parse_domain(node: object, current: object, key: str) -> Domain:
    """The domain that a sweep file gives for a setting whose value without a search is ``current``.

    A list means "one of these"; ``{low, high, log, step}`` a range, of whole numbers where the setting is one.
    """
    if isinstance(node, Sequence) and not isinstance(node, str):
        choices = tuple(float(choice) if type(current) is float and type(choice) is int else choice for choice in node)
        if not all(isinstance(choice, str | bool | int | float) for choice in choices):
            raise ConfigError(key, f"must list plain values; got {list(node)}")
        try:
            return CategoricalDomain(choices=choices)
        except ValueError as error:
            raise ConfigError(key, str(error)) from None
    if not isinstance(node, Mapping):
        raise ConfigError(key, f"must be a list of values or {{low: , high: , log: , step: }}; got {node!r}")
    if isinstance(current, bool | str):
        raise ConfigError(key, f"must be a list of values, since the setting is not a number but {current!r}")
    whole = isinstance(current, int) or (current is None and all(isinstance(node.get(k), int) for k in ("low", "high")))
    return parse(IntDomain, node, key) if whole else parse(FloatDomain, node, key)


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


def grid(space: Mapping[str, Domain]) -> list[dict[str, Scalar]]:
    """Every point of a space whose domains have finitely many values; the last key varies fastest.

    Raises:
        ValueError: a domain has infinitely many.
    """
    for name, domain in space.items():
        if domain.values() is None:
            raise ValueError(f"{name} has no finite list of values to make a grid of; give it a `step`, or list them")
    values = [domain.values() or () for domain in space.values()]
    return [dict(zip(space, point, strict=True)) for point in itertools.product(*values)]


def _num_steps(low: float, high: float, step: float) -> int:
    return math.floor((high - low) / step + 1e-9)


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
