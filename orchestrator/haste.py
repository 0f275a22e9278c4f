"""A wish that the chunk under way end soon, since its run is to stop or to move: an objective asks between its parts.

A worker has a process of its own, so the wish is the process's. It lasts until the worker answers: whoever wished then
says what is to become of the run, and one that goes on after all does so at its usual pace.
"""

from __future__ import annotations

import threading

_wish = threading.Event()


def hasten() -> None:
    """From any thread."""
    _wish.set()


def is_hastened() -> bool:
    """Cheap enough for every optimisation step."""
    return _wish.is_set()


def relax() -> None:
    _wish.clear()
