"""Composition by Hydra: the user's YAML over `conf/`, with overrides, into plain values."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.errors import UserError

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


def _forced(override: str, chosen: Container[str]) -> str:
    """``key=value`` sets a key whether or not a file names it; that it exists is checked later, with better words.

    ``group=choice`` replaces the file's choice from a group; where it makes none, what is chosen goes over the file.
    """
    head = override.split("=", 1)[0]
    if override[:1] in "+~" or "=" not in override or "@" in head:
        return override
    if (CONF / head).is_dir():
        return override if head in chosen else f"+{override}"
    return f"++{override}"


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Overrides by key; on the command line they are Hydra's, so this is Hydra's own grammar."""
    if not overrides:
        return {}
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise UserError(_one_line(error), file="command line") from None
    return {item.key_or_group: None if item.is_delete() else item.value() for item in parsed}


def _one_line(error: Exception) -> str:
    """The first lines of a message that Hydra, OmegaConf or YAML spread over a page."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kept = [
        line
        for line in lines
        if not line.startswith(("See https", "Config search path", "provider=", "full_key", "object_type"))
    ]
    return "; ".join(kept[:4])
