"""The output folder: which sweep it belongs to, in `sweep.json`."""

from __future__ import annotations

import json
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator import durable
from orchestrator.config.checking import checked
from orchestrator.config.sweep import CHANGEABLE, Sweep, live_settings
from orchestrator.errors import UserError
from orchestrator.settings import leaves, nest
from orchestrator.storage_url import anchored


def claim_output(sweep: Sweep) -> Sweep:
    """Make the output folder this sweep's own, or find that it is already: then the sweep goes on where it stopped.

    Returns it as the folder holds it from now on.

    Raises:
        UserError: the folder belongs to another sweep, or to something else.
    """
    file = sweep.output / "sweep.json"
    known = _known(sweep)
    if known:
        check_output(sweep)
    held = as_held(sweep)
    record = {
        "id": known.get("id") or uuid.uuid4().hex[:8],
        "fingerprint": sweep.fingerprint(),
        "is_asset": sweep.is_asset,
        "asked": sweep.live_settings() if sweep.recorded is None else known.get("asked", sweep.recorded),
        "sweep": held.to_plain(),
    }
    sweep.output.mkdir(parents=True, exist_ok=True)
    durable.write_text(file, json.dumps(record, indent=2) + "\n")
    return held


def as_held(sweep: Sweep) -> Sweep:
    """The sweep as its output folder would hold it, the same from every working directory.

    What `psd set` or `psd resume` changed of what may change while it runs stays, until a file and a command line ask
    for something else of it than they did before. Of a sweep that was read from its folder only what the command line
    changed is new: `psd set` may have changed other settings since.
    """
    storage, checkpoints = sweep.config.storage, sweep.config.checkpoints
    if storage is not None:
        storage = anchored(storage)
    if checkpoints.location is not None and "://" not in checkpoints.location:
        checkpoints = replace(checkpoints, location=str(Path(checkpoints.location).resolve()))
    config = replace(
        sweep.config, storage=None if storage == sweep.own_storage_url else storage, checkpoints=checkpoints
    )
    return replace(sweep, config=replace(config, **_live_as_held(sweep)))


def _live_as_held(sweep: Sweep) -> dict[str, Any]:
    """The fields of the configuration that `psd set` can reach."""
    known = _known(sweep)
    if not known:
        return {}
    held = live_settings(known["sweep"])
    before = dict(leaves(known.get("asked", {}))) if sweep.recorded is None else sweep.recorded
    asked = sweep.live_settings().items()
    live = nest(held | {key: value for key, value in asked if key not in before or before[key] != value})
    merged = checked({**known["sweep"], **live}, (), str(sweep.output / "sweep.json")).config
    return {name: getattr(merged, name) for name in live}


def _known(sweep: Sweep) -> dict[str, Any]:
    """What the output folder holds; nothing before it was claimed."""
    file = sweep.output / "sweep.json"
    return dict(json.loads(file.read_text())) if file.is_file() else {}


def output_id(sweep: Sweep) -> str:
    """What tells the sweep of this output folder from one of the same name in another."""
    return str(json.loads((sweep.output / "sweep.json").read_text())["id"])


def holds_asset(output: Path) -> bool:
    """Whether an output folder is what `psd run` made, and no sweep's."""
    return bool(json.loads((output / "sweep.json").read_text()).get("is_asset"))


def holds(sweep: Sweep) -> bool:
    """Whether the output folder is this sweep's already."""
    return (sweep.output / "sweep.json").is_file() and _difference(sweep) is None


def check_output(sweep: Sweep) -> None:
    """Raises:
    UserError: the output folder is another sweep's, or something else's.
    """
    output = sweep.output
    try:
        is_there = output.exists()
    except (OSError, ValueError) as error:  # too long a name, or a NUL in it
        raise UserError(f"cannot be a folder: {error}", file=sweep.source, key="output") from None
    if is_there and not output.is_dir():
        raise UserError(f"must be a folder; {output} is a file", file=sweep.source, key="output")
    if not (output / "sweep.json").is_file():
        if output.is_dir() and any(not _is_ours(path) for path in output.iterdir()):
            raise UserError(f"{output} holds other files; choose another", file=sweep.source, key="output")
        return
    difference = _difference(sweep)
    if difference is not None:
        raise UserError(
            f"{output} holds another sweep ({difference})",
            file=sweep.source,
            key="output",
            remedy=f"choose another `name` or `output`, or continue that one: psd resume {output}",
        )


def _is_ours(path: Path) -> bool:
    """Whether a file is what a driver makes, or was killed over making, before there is a `sweep.json`."""
    return path.name == ".lock" or path.name.startswith((".now-", ".sweep.json."))


def _difference(sweep: Sweep) -> str | None:
    """In what this sweep and the one in its output folder differ first."""
    file = sweep.output / "sweep.json"
    other = read_record(file)
    if holds_asset(sweep.output) != sweep.is_asset:
        return f"it was made by psd {'sweep' if sweep.is_asset else 'run'}"
    theirs = dict(leaves({key: value for key, value in other.items() if key not in CHANGEABLE}))
    ours = dict(leaves(sweep.definition()))
    for key in [*ours, *theirs]:
        if ours.get(key) != theirs.get(key):
            return f"{key} is {theirs.get(key)!r} there, {ours.get(key)!r} here"
    return None


def read_record(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text())["sweep"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"is damaged ({error}); choose another output folder", file=str(file)) from None
    assert isinstance(record, dict)
    return record
