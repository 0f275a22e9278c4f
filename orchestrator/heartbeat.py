"""A worker's sign of life within a chunk: an objective whose chunks may be long beats between their parts.

A worker has a process of its own, so the count is the process's. Whoever watches it asks for the count now and then:
one that stands still for too long is a worker that hangs, however alive its process looks.
"""

from __future__ import annotations

import itertools

_beats = itertools.count(1)
_num_beats = 0


def beat() -> None:
    """Say that the work moves on; cheap enough for every optimisation step."""
    global _num_beats
    _num_beats = next(_beats)


def num_beats() -> int:
    return _num_beats
