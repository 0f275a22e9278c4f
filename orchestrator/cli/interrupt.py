"""Ways to stop a sweep: Ctrl-C, a polite kill, a terminal that closes, and `psd stop` from wherever its output is."""

from __future__ import annotations

import os
import signal
import stat
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
AT_ONCE_S = 0.05  # faster than anybody presses Ctrl-C twice


class Interrupt:
    """The first Ctrl-C, polite kill, hang-up or `psd stop` asks for a clean stop; a further signal ends the program.

    Not a further hang-up: a terminal that goes tells its shell, too, which passes it on. Under ``nohup`` none counts.
    Nor a signal that follows at once: `timeout -s INT` signals the program, and then its group.
    """

    def __init__(self, output: Path) -> None:
        self._stop_file = output / STOP_FILE
        self._is_signalled = False
        self._hurries_from_s = 0.0

    @property
    def requested(self) -> bool:
        return self._is_signalled or self._is_told()

    @contextmanager
    def caught(self) -> Iterator[None]:
        handlers = {signal.SIGINT: self._on_signal, signal.SIGTERM: self._on_signal}
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            handlers[signal.SIGHUP] = self._on_hangup
        previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
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
        if not self._is_signalled:
            self._is_signalled = True
            self._hurries_from_s = time.monotonic() + AT_ONCE_S
        elif time.monotonic() > self._hurries_from_s:
            raise KeyboardInterrupt

    def _on_hangup(self, number: int, frame: FrameType | None) -> None:
        self._is_signalled = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for output in (1, 2):
            if stat.S_ISCHR(os.fstat(output).st_mode):  # the terminal that is gone: what is written there would fail
                os.dup2(nowhere, output)
        os.close(nowhere)


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
