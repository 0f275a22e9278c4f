"""From plain YAML values to typed, frozen dataclasses, with errors that name the key, the rule and the remedy.

OmegaConf's own structured configs know neither unions nor ranges and coerce silently, so composition is Hydra's and
checking is done here. A union of dataclasses is told apart by the field ``kind``, a ``Literal`` in each of them.
"""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from enum import Enum
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")


class ConfigError(ValueError):
    """A value that cannot be: where it stands, and what would be right."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(key, message)  # the arguments as they are, so that it survives pickling
        self.key, self.message = key, message

    def __str__(self) -> str:
        return ": ".join(part for part in (self.key, self.message) if part)


@dataclass(frozen=True, kw_only=True)
class Range:
    """Where a number may lie; ``above`` excludes its bound."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf

    def __str__(self) -> str:
        parts = [
            f"> {self.above:g}" if self.above > -math.inf else "",
            f">= {self.low:g}" if self.low > -math.inf else "",
        ]
        parts.append(f"<= {self.high:g}" if self.high < math.inf else "")
        return " and ".join(part for part in parts if part)

    def __contains__(self, number: float) -> bool:
        return self.low <= number <= self.high and number > self.above


Count = Annotated[int, Range(low=1)]
WholeNumber = Annotated[int, Range(low=0)]
Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(low=0)]
Fraction = Annotated[float, Range(low=0, high=1)]


def parse(schema: type[T], node: object, key: str = "") -> T:
    """An instance of the dataclass ``schema`` from a mapping found at ``key``.

    Raises:
        ConfigError: an unknown or missing key, a wrong type, a value out of range.
    """
    known: dict[str, Field[Any]] = {field.name: field for field in fields(schema)}  # type: ignore[arg-type]
    if not isinstance(node, Mapping):
        raise ConfigError(key, f"must be a mapping with keys among {_listed(known)}; got {_shown(node)}")
    for name in node:
        if name not in known:
            raise unknown_key(join(key, str(name)), str(name), known)
    hints = get_type_hints(schema, include_extras=True)
    values: dict[str, Any] = {}
    for name, field in known.items():
        if name in node and node[name] != "???":  # "???" is OmegaConf's mark for a value that must be given
            values[name] = parse_value(hints[name], node[name], join(key, name))
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(join(key, name), "is missing; it has no default")
    try:
        return schema(**values)
    except ConfigError as error:
        raise ConfigError(join(key, error.key), error.message) from None
    except ValueError as error:
        raise ConfigError(key, str(error)) from None


def parse_value(hint: Any, value: object, key: str) -> Any:
    """A value of the type ``hint``, which may be a scalar, an enum, a container, a dataclass, or a union of them."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _within(arguments[1], parse_value(arguments[0], value, key), key)
    if origin in (Union, types.UnionType):
        return _parse_union(arguments, value, key)
    if origin is Literal:
        return _one_of(arguments, value, key)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(key, f"must be a mapping; got {_shown(value)}")
        return {str(name): parse_value(arguments[1], item, join(key, str(name))) for name, item in value.items()}
    if origin is tuple:
        return _parse_tuple(arguments, value, key)
    if hint is Any:
        return value
    if is_dataclass(hint):
        return parse(cast(type[Any], hint), value, key)
    if issubclass(hint, Enum):
        return hint(_one_of([member.value for member in hint], value, key))
    return _parse_scalar(hint, value, key)


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The types that a setting may have, without what is said beside them; one alone where it is no union."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return alternatives(arguments[0])
    if origin in (Union, types.UnionType):
        return tuple(inner for member in arguments for inner in alternatives(member))
    return (hint,)


def find_setting(schema: type, key: str, kinds: Mapping[str, object]) -> Any:
    """The type of the setting at a dotted key of ``schema``.

    ``kinds`` has, by the key above it, each ``kind`` that is in force; a kind that it leaves out is the default's.

    Raises:
        ConfigError: there is no such setting, or another kind has it.
    """
    hint: Any = schema
    default: object = None
    above = ""
    for name in key.split("."):
        if get_origin(hint) is dict:
            hint, default = get_args(hint)[1], None
        else:
            members = [member for member in alternatives(hint) if is_dataclass(member)]
            kind = kinds.get(above, getattr(default, "kind", None))
            chosen = _of_kind(members, kind, above)
            _check_field(name, chosen, members, kind, above)
            default = next(field.default for field in fields(chosen) if field.name == name)
            hint = get_type_hints(chosen, include_extras=True)[name]
        above = join(above, name)
    return hint


def _of_kind(members: Sequence[Any], kind: object, key: str) -> type[Any]:
    if not members:
        raise ConfigError(key, "is a plain value and has no settings of its own")
    if len(members) == 1 and not any(field.name == "kind" for field in fields(members[0])):
        return cast(type[Any], members[0])
    kinds = {get_args(get_type_hints(member)["kind"])[0]: member for member in members}
    if kind is None:
        raise ConfigError(join(key, "kind"), f"is not set; to search below it, set it to one of {_listed(kinds)}")
    return cast(type[Any], kinds[_one_of(list(kinds), kind, join(key, "kind"))])


def _check_field(name: str, chosen: type[Any], members: Sequence[Any], kind: object, above: str) -> None:
    known = [field.name for field in fields(chosen)]
    if name in known:
        return
    owners = [get_args(get_type_hints(member)["kind"])[0] for member in members
              if any(field.name == name for field in fields(member))]  # fmt: skip
    if owners:
        raise ConfigError(
            join(above, name),
            f"belongs to {join(above, 'kind')} {_listed(owners)}, not {kind}; change the kind or drop the key",
        )
    raise unknown_key(join(above, name), name, known)


def _parse_scalar(hint: type, value: object, key: str) -> object:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is hint:
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(key, f"must be a finite number; got {value}")
        return value
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
    raise ConfigError(key, f"must be {names[hint]}; got {_shown(value)}")


def _parse_tuple(arguments: Sequence[Any], value: object, key: str) -> tuple[Any, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        example = "" if value is None or isinstance(value, Mapping) else f", as [{value}]"
        raise ConfigError(key, f"must be a list{example}; got {_shown(value)}")
    if arguments[-1] is not Ellipsis and len(value) != len(arguments):
        raise ConfigError(key, f"must be a list of {len(arguments)} values; got {_shown(value)}")
    hints = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
    return tuple(
        parse_value(hint, item, f"{key}[{i}]") for i, (hint, item) in enumerate(zip(hints, value, strict=True))
    )


def _parse_union(members: Sequence[Any], value: object, key: str) -> Any:
    classes = [cast(type[Any], member) for member in members if is_dataclass(member)]
    if isinstance(value, Mapping) and classes:
        kinds = {get_args(get_type_hints(member)["kind"])[0]: member for member in classes}
        if "kind" not in value:
            raise ConfigError(join(key, "kind"), f"is missing; choose one of {_listed(kinds)}")
        chosen = kinds[_one_of(list(kinds), value["kind"], join(key, "kind"))]
        own = {field.name for field in fields(chosen)}
        others = {field.name for member in classes for field in fields(member)} - own
        # What composition left over from another kind goes, so that `weighting.kind=single` on its own is enough.
        return parse(chosen, {name: item for name, item in value.items() if name not in others}, key)
    if value is None and types.NoneType in members:
        return None
    scalars = [member for member in members if member is not types.NoneType and member not in classes]
    failures: list[ConfigError] = []
    for member in scalars:
        try:
            return parse_value(member, value, key)
        except ConfigError as error:
            failures.append(error)
    if len(failures) == 1 and not classes:
        raise failures[0]
    wanted = " or ".join([*(error.message.split(";")[0].removeprefix("must be ") for error in failures),
                          *(["a mapping with a `kind`"] if classes else [])])  # fmt: skip
    raise ConfigError(key, f"must be {wanted}; got {_shown(value)}")


def _within(allowed: Range, number: Any, key: str) -> Any:
    if number not in allowed:
        raise ConfigError(key, f"must be {allowed}; got {number}")
    return number


def _one_of(allowed: Sequence[Any], value: object, key: str) -> Any:
    if value not in allowed:
        raise ConfigError(
            key, f"must be one of {_listed(allowed)}; got {_shown(value)}{did_you_mean(str(value), allowed)}"
        )
    return value


def unknown_key(key: str, name: str, known: Iterable[str]) -> ConfigError:
    known = list(known)
    guess = did_you_mean(name, known)
    return ConfigError(key, f"unknown key{guess or '; known here: ' + _listed(known)}")


def did_you_mean(word: str, known: Iterable[object]) -> str:
    close = difflib.get_close_matches(word, [str(item) for item in known], n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def join(key: str, name: str) -> str:
    return ".".join(part for part in (key, name) if part)


def _listed(names: Iterable[object]) -> str:
    return ", ".join(str(name) for name in names)


def _shown(value: object) -> str:
    text = "null" if value is None else repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})" if value is not None else text
