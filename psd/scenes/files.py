"""A finished scene as a file: its state in safetensors, from which it can be rendered and exported again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from psd.scenes.base import Scene

SEPARATOR = "/"  # between the name of a module's extra state and the names inside it


def save_scene(scene: Scene, path: Path) -> None:
    path.write_bytes(save({name: tensor.contiguous() for name, tensor in _flat(scene.state_dict()).items()}))


def load_scene(scene: Scene, path: Path) -> None:
    """Puts what ``save_scene`` wrote into a scene of the same settings.

    Raises:
        ValueError: the file is no scene's, or that of other settings.
    """
    try:
        scene.load_state_dict(_nested(load_file(path)))
    except (SafetensorError, RuntimeError, KeyError) as error:
        raise ValueError(f"{path} does not hold a scene of these settings: {error}") from None


def _flat(state: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    for name, value in state.items():
        match value:
            case Mapping():
                flat |= _flat(value, f"{prefix}{name}{SEPARATOR}")
            case Tensor():
                flat[prefix + name] = value
            case _:
                flat[prefix + name] = torch.tensor(value)
    return flat


def _nested(flat: Mapping[str, Tensor]) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, value in flat.items():
        outer, separator, inner = name.partition(SEPARATOR)
        if not separator:
            state[outer] = value
        else:
            state.setdefault(outer, {})[inner] = value
    return state
