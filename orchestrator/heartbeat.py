"""A worker's sign of life within a chunk: an objective whose chunks may be long beats between their parts.

A worker has a process of its own, so the count is the process's. Whoever watches it asks for the count now and then:
one that stands still for too long is a worker that hangs, however alive its process looks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

_beats = itertools.count(1)
_num_beats = 0
_num_patient_parts = 0


def beat() -> None:
    """Say that the work moves on; cheap enough for every optimisation step."""
    global _num_beats
    _num_beats = next(_beats)


def num_beats() -> int:
    return _num_beats


@contextmanager
def patience() -> Iterator[None]:
    """Around a part that cannot beat, such as an upload: until it is over, the deadline is that of loading."""
    global _num_patient_parts
    _num_patient_parts += 1
    try:
        yield
    finally:
        _num_patient_parts -= 1
        beat()


def asks_patience() -> bool:
    return _num_patient_parts > 0
