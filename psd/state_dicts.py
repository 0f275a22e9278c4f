"""State dicts as they are published: one file, often a pickle, of which nothing but tensors is taken."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from psd.checkpoint_files import check_file

_WRAPPERS = ("state_dict", "model", "module")  # keys under which training programs keep the model's own state


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by name from safetensors or a pickle; a pickle is read with ``weights_only``, so it cannot run code.

    They lie in the file, wherever its format lets them, and take memory only while they are looked at.

    Raises:
        ValueError: the file is missing, not all there, holds more than tensors and plain values, or no tensors.
    """
    check_file(path)
    content = _read(path)
    for name in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    items = content.items() if isinstance(content, Mapping) else ()
    tensors = {str(name): value for name, value in items if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{path} holds no state dict: no tensors by name")
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def take(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names start with the prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def fill(model: nn.Module, tensors: Mapping[str, Tensor], *, what: str, checkpoint: Path) -> None:
    """Gives a model that was made on the meta device, and so without weights, exactly these; it copies none.

    Raises:
        ValueError: there are too few, too many or others; says of which ``checkpoint``, and ``what`` was to be filled.
    """
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{checkpoint} does not fill {what}: {reason}") from error


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error) or "Unsupported" in str(error):
            raise ValueError(
                f"{path} is a pickle that asks for more than tensors, so it could run code, and was not read; "
                "get it from its publisher, or have its tensors saved as safetensors"
            ) from error
        raise ValueError(f"{path} is no checkpoint, or a damaged one; fetch it again") from error
    except (RuntimeError, EOFError, KeyError, SafetensorError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path} is damaged or not whole; fetch it again ({reason})") from error
