"""Settings as YAML gives them: nested mappings of plain values, addressed by dotted keys."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from orchestrator.schema import ConfigError, join


def leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting by its dotted key; an empty mapping is a setting, too."""
    for name, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, join(prefix, name))
        else:
            yield join(prefix, name), value


def nest(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A tree from settings whose keys may be dotted, nested, or both; what is later wins.

    Raises:
        ConfigError: a key that is a value and a parent of values at once.
    """
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        *parents, last = str(key).split(".")
        node = tree
        for depth, name in enumerate(parents, start=1):
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise ConfigError(".".join(parents[:depth]), f"is given a value, so that {key} cannot be set as well")
        inner = nest(value) if isinstance(value, Mapping) else value
        node[last] = merge(node[last], inner) if last in node else inner
    return tree


def merge(base: Any, changes: Any) -> Any:
    """``base`` with ``changes``, mappings merged into mappings. Another ``kind`` starts from its own defaults."""
    if not isinstance(base, Mapping) or not isinstance(changes, Mapping):
        return copy.deepcopy(changes)
    if "kind" in changes and changes["kind"] != base.get("kind"):
        return copy.deepcopy(dict(changes))
    kept = {name: copy.deepcopy(value) for name, value in base.items() if name not in changes}
    return kept | {name: merge(base.get(name), value) for name, value in changes.items()}


def difference(base: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """What must be set in ``base``, by dotted key, to arrive at ``other``; all of a mapping whose kind is another."""
    found: dict[str, Any] = {}
    for name, value in other.items():
        key, old = join(prefix, name), base.get(name)
        if name in base and old == value:
            continue
        if isinstance(value, Mapping) and value:
            same_kind = isinstance(old, Mapping) and old.get("kind") == value.get("kind")
            found |= difference(old, value, key) if same_kind and isinstance(old, Mapping) else dict(leaves(value, key))
        else:
            found[key] = value
    return found


def plain(value: Any) -> Any:
    """JSON's own types only: what YAML would give."""
    if isinstance(value, Mapping):
        return plain_mapping(value)
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def plain_mapping(value: Mapping[str, Any]) -> dict[str, Any]:
    return {str(key): plain(item) for key, item in value.items()}
