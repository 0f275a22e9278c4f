"""Where sweeps come from: a YAML file, a prompt on the command line, an output folder."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.config.checking import checked
from orchestrator.config.composition import CONF, compose, parse_overrides
from orchestrator.config.output import holds_asset, read_record
from orchestrator.config.sweep import CHANGEABLE, Sweep, live_settings
from orchestrator.errors import UserError
from orchestrator.schema import did_you_mean


def load(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """The sweep of a YAML file, with overrides in Hydra's syntax.

    Raises:
        UserError: with the file (or the command line), the key, and what would be right.
    """
    if path.is_dir():
        raise UserError("is a folder; name a sweep file in it", file=str(path))
    if not path.is_file():
        raise UserError(f"no such file{_similar(path)}", file=str(path))
    if path.suffix != ".yaml":
        raise UserError("a sweep file's name must end in .yaml", file=str(path))
    plain = compose(path.parent, path.stem, overrides, str(path), title=path.stem)
    return checked(plain, overrides, str(path))


def _similar(path: Path) -> str:
    """A sweep file of about this name, beside it or among those of the project."""
    files = {file.stem: file for file in [*Path("sweeps").rglob("*.yaml"), *path.parent.glob("*.yaml")]}
    close = difflib.get_close_matches(path.stem, files, n=1)
    return f"; did you mean {files[close[0]]}?" if close else ""


def load_asset(prompt: str, overrides: Sequence[str] = ()) -> Sweep:
    """The sweep of one trial that `psd run` executes."""
    source = "command line"
    slug = "-".join("".join(c if c.isalnum() else " " for c in prompt.lower()).split())[:60] or "asset"
    plain = compose(CONF, "asset", overrides, source, title=slug)
    if plain["prompts"] != "???":
        raise UserError("is what stands after `psd run`; leave the override out", file=source, key="prompts")
    return _as_asset(checked({**plain, "prompts": [prompt]}, overrides, source))


def _as_asset(sweep: Sweep) -> Sweep:
    """Raises:
    UserError: it is more than one run.
    """
    if sweep.space.domains or not sweep.num_trials == len(sweep.config.prompts) == len(sweep.config.seeds) == 1:
        raise UserError(
            "psd run makes one object, with one seed and without a search",
            file="command line",
            remedy="for more: psd sweep FILE",
        )
    return replace(sweep, is_asset=True)


def load_output(output: Path, overrides: Sequence[str] = ()) -> Sweep:
    """The sweep that an output folder holds, with changes to what may change."""
    file = output / "sweep.json"
    if not file.is_file():
        near = _near(output) or "; give the folder that `psd sweep` wrote"
        raise UserError(f"holds no sweep (no sweep.json){near}", file=str(output))
    plain = read_record(file)
    recorded = live_settings(plain)
    changes = parse_overrides(overrides)
    for key, value in changes.items():
        root = key.split(".")[0]
        if root not in CHANGEABLE or root == "output":
            allowed = [name for name in CHANGEABLE if name != "output"]
            guess = did_you_mean(root, allowed) or f"; only {', '.join(allowed)} can"
            raise UserError(f"cannot change on resume{guess}", file="command line", key=key)
        if not _assign(plain, key, value):
            raise UserError("unknown key", file="command line", key=key)
    sweep = replace(checked({**plain, "output": str(output)}, overrides, str(file)), recorded=recorded)
    return _as_asset(sweep) if holds_asset(output) else sweep


def _near(output: Path) -> str:
    """The sweeps in a folder, or the one beside it that has about its name."""
    inside = sorted(str(file.parent) for file in output.glob("*/sweep.json"))
    if inside:
        return f"; name one of those in it: {', '.join(inside)}"
    beside = {file.parent.name: file.parent for file in output.parent.glob("*/sweep.json")}
    close = difflib.get_close_matches(output.name, beside, n=1)
    return f"; did you mean {beside[close[0]]}?" if close else ""


def _assign(node: dict[str, Any], key: str, value: Any) -> bool:
    """Whether there is a place for the key; whether the key itself is known is checked later."""
    *parents, last = key.split(".")
    inner: Any = node
    for name in parents:
        inner = inner.get(name)
        if not isinstance(inner, dict):
            return False
    inner[last] = value
    return True
