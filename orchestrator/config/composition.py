"""Composition by Hydra: the user's YAML over `conf/`, with overrides, into plain values."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import UserError
from orchestrator.schema import ConfigError, did_you_mean, join

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

SPACE_KEY = "search.space."
CONF = Path(__file__).parents[1] / "conf"
_BEGINNING = "a sweep file begins with `defaults: [sweep, experiment: toybox, _self_]`"


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
    chosen = _chosen_groups(_check_file(folder / f"{name}.yaml", source))
    overrides, beside = _located(overrides)
    folders = ", ".join(f'"file://{path}"' for path in (*beside, folder.resolve(), CONF.resolve()))
    searchpath = f"hydra.searchpath=[{folders}]"
    try:
        with (
            _told_from_psds_own(folder, name) as (first, unique),
            initialize_config_dir(config_dir=str(first), version_base="1.3"),
        ):
            config = hydra_compose(unique, overrides=[searchpath, *(_forced(item, chosen) for item in overrides)])
        if OmegaConf.is_missing(config, "name") or "name" not in config:
            OmegaConf.update(config, "name", title, force_add=True)
        plain = OmegaConf.to_container(config, resolve=True)
    except MissingConfigException as error:
        raise _no_such_choice(str(error.missing_cfg_file), error.options, source) from None
    except YAMLError as error:
        raise UserError(_told_by_yaml(error), file=source) from None
    except RecursionError:
        raise UserError("refers to itself, by an anchor, an interpolation or its defaults", file=source) from None
    except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
        raise UserError(_one_line(error), file=source, key=_full_key(error)) from None
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


@contextmanager
def _told_from_psds_own(folder: Path, name: str) -> Iterator[tuple[Path, str]]:
    """A folder and a name under which Hydra finds the file.

    Others than its own where a file beside it, or it itself, is named as one of psd's (`sweep.yaml`), which `defaults`
    would then not mean.
    """
    own = sorted(CONF.glob("*.yaml"))
    if folder.resolve() == CONF.resolve() or not any((folder / path.name).is_file() for path in own):
        yield folder.resolve(), name
        return
    with tempfile.TemporaryDirectory(prefix="psd-") as scratch:
        for path in own:
            shutil.copy(path, scratch)
        shutil.copy(folder / f"{name}.yaml", Path(scratch) / f"my_{name}.yaml")
        yield Path(scratch), f"my_{name}"


def _located(overrides: Sequence[str]) -> tuple[list[str], list[Path]]:
    """`experiment=some/experiment/mine.yaml` as Hydra takes it: the file's name, and where its group is."""
    named, beside = [], []
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "experiment" and value.endswith(".yaml"):
            file = Path(value).expanduser().resolve()
            if not file.is_file() or file.parent.name != "experiment":
                problem = f"no file {value}" if not file.is_file() else f"{value} is not in a folder named experiment"
                raise UserError(problem, file="command line", key=key, remedy="give .../experiment/NAME.yaml")
            override = f"experiment={file.stem}"
            beside.append(file.parents[1])
        named.append(override)
    return named, beside


def _check_file(file: Path, source: str) -> list[Any]:
    """The items of a file's `defaults`, once it is known to be what Hydra takes.

    Raises:
        UserError: with the line or the key.
    """
    from yaml import YAMLError, safe_load

    try:
        content = safe_load(file.read_bytes().decode())
    except UnicodeDecodeError as error:
        raise UserError(f"is no UTF-8 text: {error.reason} at byte {error.start}", file=source) from None
    except (YAMLError, TypeError, ValueError) as error:  # PyYAML meets some odd keys and dates with plain errors
        raise UserError(_told_by_yaml(error), file=source) from None
    if content is None:
        raise UserError("is empty", file=source, remedy=_BEGINNING)
    if not isinstance(content, Mapping):
        raise UserError(f"must be a mapping of settings; it is {type(content).__name__}", file=source)
    for key in content:
        if not isinstance(key, str):
            raise UserError(f"keys must be text; got {key!r} ({type(key).__name__})", file=source, key=str(key))
    for base in (CONF / "sweep.yaml", CONF / "experiment" / "toybox.yaml"):
        misfit = None if file == base else _misfit(content, {**safe_load(base.read_bytes()), "defaults": None})
        if misfit is not None:
            raise UserError("is a list where a mapping is wanted, or the other way round", file=source, key=misfit)
    if "defaults" not in content and "output" not in content:  # which no complete file lacks
        raise UserError("is missing", file=source, key="defaults", remedy=_BEGINNING)
    defaults = content.get("defaults", [])
    if not isinstance(defaults, list) or not all(isinstance(item, str | Mapping) for item in defaults):
        raise UserError("must be a list, as [sweep, experiment: toybox, _self_]", file=source, key="defaults")
    if defaults and "_self_" not in defaults:
        raise UserError("must name _self_, best as the last: the file itself", file=source, key="defaults")
    return defaults


def _chosen_groups(defaults: Sequence[Any]) -> set[str]:
    """The config groups from which a file's own `defaults` choose."""
    choices = [item for item in defaults if isinstance(item, Mapping)]
    return {str(key).split("@")[0].split()[-1] for choice in choices for key in choice}


def _no_such_choice(missing: str, options: Sequence[str] | None, source: str) -> UserError:
    group, _, choice = missing.rpartition("/")
    if options:
        return UserError(f"there is no {choice!r}; choose one of {', '.join(options)}", file=source, key=group or None)
    known = sorted(path.stem for path in CONF.iterdir())
    guess = did_you_mean(group or choice, known) or f"; psd has {', '.join(known)}"
    return UserError(f"there is no {missing!r} beside the file or in psd itself{guess}", file=source, key="defaults")


def _told_by_yaml(error: Exception) -> str:
    """What is wrong with a file's YAML, and in which line."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    line = f"line {mark.line + 1}: " if mark is not None else ""
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or _one_line(error)
    remedy = "; indent with blanks" if r"'\t'" in problem else ""
    return f"{line}is no YAML: {problem}{remedy}"


def _full_key(error: BaseException) -> str | None:
    """The key that OmegaConf names, also where Hydra wraps its error."""
    return getattr(error, "full_key", None) or getattr(error.__cause__, "full_key", None) or None


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
        case RangeSweep(start=start, stop=stop, step=step) if start is not None and stop is not None and step:
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

    if "=" not in override and not override.startswith("~"):
        remedy = "it must be KEY=VALUE, in quotes where it has blanks, as 'prompts=[a red cube]'"
        raise UserError(f"cannot read {override!r}", file="command line", remedy=remedy)
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException as error:
        raise UserError(f"cannot read {override!r} as KEY=VALUE: {_one_line(error)}", file="command line") from None


def _one_line(error: BaseException) -> str:
    """The first lines of a message that Hydra or OmegaConf spread over a page, or of what it wraps."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    noise = ("See https", "Config search path", "provider=", "full_key", "object_type", "^")
    kept = [
        line for line in lines if not line.startswith(noise) and not line.endswith("raised while composing config:")
    ]
    if not kept and error.__cause__ is not None:
        return _one_line(error.__cause__)
    return "; ".join(kept[:4]) or f"cannot be composed ({type(error).__name__})"


def _misfit(content: object, base: object, key: str = "") -> str | None:
    """The first key at which a list meets a mapping, which Hydra cannot lay one over the other."""
    if not isinstance(content, Mapping) or not isinstance(base, Mapping):
        return key if {type(content), type(base)} == {list, dict} else None
    found = (_misfit(value, base.get(name), join(key, str(name))) for name, value in content.items())
    return next((misfit for misfit in found if misfit is not None), None)
