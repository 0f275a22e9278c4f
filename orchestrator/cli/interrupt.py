"""Ways to stop a sweep: Ctrl-C, a polite kill, and `psd stop` from anywhere that sees its output folder."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console

from orchestrator import config
from orchestrator.cli.outcome import typed
from orchestrator.sweep_lock import holder

STOP_FILE = ".stop"
LOOK_EVERY_S, PATIENCE_S = 0.5, 120.0


class Interrupt:
    """The first Ctrl-C, polite kill or `psd stop` asks for a clean stop; a further signal ends the program."""

    def __init__(self, output: Path) -> None:
        self._stop_file = output / STOP_FILE
        self._is_signalled = False

    @property
    def requested(self) -> bool:
        return self._is_signalled or self._is_told()

    @contextmanager
    def caught(self) -> Iterator[None]:
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _is_told(self) -> bool:
        try:
            return self._stop_file.exists()
        except OSError:  # the file system does not answer: ask again
            return False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._is_signalled:
            raise KeyboardInterrupt
        self._is_signalled = True


def withdraw_stop(output: Path) -> None:
    """What was asked of the driver before is not asked of this one."""
    (output / STOP_FILE).unlink(missing_ok=True)


def stop_command(output: Path) -> int:
    """``psd stop OUTPUT_DIR``: the exit status is 0 when nobody is at work there any more."""
    config.load_output(output)
    console = Console()
    driver = holder(output)
    if driver is None:
        console.print(f"{output}: nobody is at work there", highlight=False, soft_wrap=True)
        return 0
    (output / STOP_FILE).touch()
    deadline_s = time.monotonic() + PATIENCE_S
    while holder(output) is not None:
        if time.monotonic() > deadline_s:
            text = f"{output}: asked {driver} to stop, but it is still at work after {PATIENCE_S:.0f} s"
            console.print(text, highlight=False, soft_wrap=True)
            return 1
        time.sleep(LOOK_EVERY_S)
    console.print(f"{output}: stopped. Go on with:  {typed('psd')} resume {output}", highlight=False, soft_wrap=True)
    return 0
