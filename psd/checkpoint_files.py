"""Checkpoint folders of diffusers and transformers: what must be in them, and errors that say what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

Model = TypeVar("Model")


def read_json(path: Path, *, kind: str) -> dict[str, Any]:
    """A JSON object from a checkpoint folder; ``kind`` says in errors what the folder should have been.

    Raises:
        ValueError: the file is missing or not JSON.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent} is no {kind}: {path.name} is missing")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} should hold a JSON object, got {type(content).__name__}")
    return content


def check_folder(folder: Path, *, kind: str) -> None:
    if not folder.is_dir():
        raise ValueError(f"no {kind} at {folder}: the folder does not exist")


def check_weights(folder: Path, filename: str) -> None:
    """Only safetensors count as weights: a pickle could run any code."""
    if (folder / filename).is_file() or (folder / f"{filename}.index.json").is_file():
        return
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    found = f" (there is {pickles[0]}, a pickle: save it again with safe_serialization=True)" if pickles else ""
    raise ValueError(f"{folder} has no weights: {filename} is missing{found}")


def load_model(load: Callable[[], tuple[Model, dict[str, Any]]], folder: Path) -> Model:
    """Runs a ``from_pretrained`` with loading info; a checkpoint that does not fill the whole model is an error."""
    try:
        model, info = load()
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split("\n")[:2])
        raise ValueError(f"the weights in {folder} cannot be read: {reason}") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"the weights in {folder} lack {len(missing)} of the model's parameters, such as {missing[0]}")
    return model
