"""Composition by Hydra: the user's YAML over `conf/`, with overrides, into plain values."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import UserError
from orchestrator.schema import ConfigError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

SPACE_KEY = "search.space."
CONF = Path(__file__).parents[1] / "conf"


def compose(folder: Path, name: str, overrides: Sequence[str], source: str, *, title: str) -> dict[str, Any]:
    """Hydra's composition of one file with `conf/` behind it on the search path; plain values, unchecked.

    ``title`` is the sweep's name if nothing gives it one.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    parse_overrides(overrides)  # so that a slip in one is told as such
    searchpath = f'hydra.searchpath=["file://{CONF.resolve()}"]'
    try:
        with initialize_config_dir(config_dir=str(folder.resolve()), version_base="1.3"):
            chosen = _chosen_groups(folder / f"{name}.yaml")
            config = hydra_compose(name, overrides=[searchpath, *(_forced(item, chosen) for item in overrides)])
        if OmegaConf.is_missing(config, "name") or "name" not in config:
            OmegaConf.update(config, "name", title, force_add=True)
        plain = OmegaConf.to_container(config, resolve=True)
    except MissingConfigException as error:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        options = ", ".join(error.options or [])
        raise UserError(f"there is no {choice!r}; choose one of {options}", file=source, key=group) from None
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise UserError(_one_line(error), file=source) from None
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _chosen_groups(file: Path) -> set[str]:
    """The config groups from which a file's own `defaults` choose."""
    from yaml import safe_load

    content = safe_load(file.read_bytes())
    defaults = content.get("defaults") if isinstance(content, Mapping) else None
    choices = [item for item in defaults or [] if isinstance(item, Mapping)]
    return {str(key).split("@")[0].split()[-1] for choice in choices for key in choice}


def parse_sweep_syntax(node: object, key: str) -> object:
    """A domain in Hydra's own words (`interval(1, 15)`, `tag(log, interval(1, 15))`, `range(0, 8, step=2)`,
    `choice(a, b)`) as the list or the mapping that it stands for; anything else as it is.

    Raises:
        ConfigError: the text is none of them.
    """
    if not isinstance(node, str):
        return node
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, RangeSweep
    from hydra.errors import HydraException

    try:
        value = OverridesParser.create().parse_override(f"key={node}").value()
    except HydraException:
        value = None
    match value:
        case ChoiceSweep():
            return list(value.list)
        case RangeSweep(start=start, stop=stop, step=step) if start is not None and stop is not None:
            return [start + i * step for i in range(math.ceil((stop - start) / step - 1e-9))]
        case IntervalSweep(start=float() | int() as start, end=float() | int() as end, tags=tags) if tags <= {"log"}:
            bounds = {"low": start, "high": end}
            whole = {name: int(bound) if bound == int(bound) else bound for name, bound in bounds.items()}
            return {**whole, "log": "log" in tags}
    raise ConfigError(
        key,
        "must be a list of values, {low: , high: , log: , step: }, interval(low, high), tag(log, interval(low, high)), "
        f"range(start, stop, step) or choice(a, b); got {node!r}",
    )


def _forced(override: str, chosen: Container[str]) -> str:
    """``key=value`` sets a key whether or not a file names it; that it exists is checked later, with better words.

    ``group=choice`` replaces the file's choice from a group; where it makes none, what is chosen goes over the file.
    """
    head, _, value = override.partition("=")
    if override[:1] in "+~" or not value or "@" in head:
        return override
    if (CONF / head).is_dir():
        return override if head in chosen else f"+{override}"
    if head.startswith(SPACE_KEY) and _parse(override).is_sweep_override():
        text = value if "(" in value else f"choice({value})"
        quoted = text.replace("\\", "\\\\").replace("'", "\\'")
        return f"++{head}='{quoted}'"
    return f"++{override}"


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Overrides by key; on the command line they are Hydra's, so this is Hydra's own grammar."""
    parsed = {}
    for override in overrides:
        item = _parse(override)
        if item.is_sweep_override() and not item.key_or_group.startswith(SPACE_KEY):
            remedy = "quote or escape a comma that is part of it; what is to be searched goes under search.space"
            raise UserError("takes one value", file="command line", key=item.key_or_group, remedy=remedy)
        parsed[item.key_or_group] = None if item.is_delete() else item.value()
    return parsed


def _parse(override: str) -> Override:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(override)
    except HydraException as error:
        raise UserError(f"cannot read {override!r} as KEY=VALUE: {_one_line(error)}", file="command line") from None


def _one_line(error: Exception) -> str:
    """The first lines of a message that Hydra, OmegaConf or YAML spread over a page."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kept = [
        line
        for line in lines
        if not line.startswith(("See https", "Config search path", "provider=", "full_key", "object_type"))
    ]
    return "; ".join(kept[:4])
