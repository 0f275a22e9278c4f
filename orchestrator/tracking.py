"""Tracking: where a run's curves and pictures go to be looked at. Never the truth (metrics.jsonl is), never fatal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol


class Tracker(Protocol):
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def log_files(self, step: int, files: Mapping[str, Path]) -> None: ...

    def close(self, exit_code: int) -> None: ...


class NullTracker:
    """For a sweep that is not tracked."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def log_files(self, step: int, files: Mapping[str, Path]) -> None:
        pass

    def close(self, exit_code: int) -> None:
        pass
