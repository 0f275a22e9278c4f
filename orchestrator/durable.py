"""Files that are whole or absent, whatever is killed and whenever."""

from __future__ import annotations

import os
import re
from pathlib import Path

_COMPONENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def path_component(name: str) -> str:
    """``name``, if it is safe as the name of a file or a folder.

    Raises:
        ValueError: it could leave the folder that it is meant for, or is no portable name.
    """
    if not _COMPONENT.fullmatch(name) or len(name) > 200:
        raise ValueError(
            f"{name!r} is no safe file name; use up to 200 letters, digits, '.', '_' and '-', the first no '.' or '-'"
        )
    return name


def sync(path: Path) -> None:
    """Have a file's or a folder's content on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(parent, name))
        sync(Path(parent))


def write_text(path: Path, text: str, *, outlasts_power_cut: bool = True) -> None:
    """Replace a file by its new content in one step: a reader sees the old one or the new one.

    Waiting for the disk is what takes time; without it a power cut may leave an empty or a torn file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        if outlasts_power_cut:
            os.fsync(file.fileno())
    temporary.replace(path)
    if outlasts_power_cut:
        sync(path.parent)
