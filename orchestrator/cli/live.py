"""Changes to a sweep while it runs: `psd set` writes them into `sweep.json`, and the driver looks there."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from orchestrator import config
from orchestrator.budget import Budget
from orchestrator.cli.search import read_records
from orchestrator.config import Sweep
from orchestrator.errors import UserError
from orchestrator.schema import did_you_mean
from orchestrator.sweep_lock import holder


def set_command(words: Sequence[str]) -> int:
    """``psd set [OUTPUT_DIR] KEY=VALUE...``; without a folder, the one sweep that is at work under `outputs`."""
    folders, overrides = [word for word in words if "=" not in word], [word for word in words if "=" in word]
    if len(folders) > 1 or not overrides:
        raise UserError("takes one output folder at most, and at least one KEY=VALUE", file="command line")
    for override in overrides:
        key = override.partition("=")[0]
        if key not in config.LIVE:
            near = did_you_mean(key, config.LIVE) or f"; only {', '.join(config.LIVE)} can"
            raise UserError(f"cannot change while a sweep runs{near}", file="command line", key=key)
    output = Path(folders[0]) if folders else _only_sweep_at_work(Path("outputs"))
    if config.load_output(output).is_asset:
        raise UserError("holds one object and no sweep; there is nothing to set", file=str(output))
    sweep = config.load_output(output, overrides)
    config.claim_output(sweep)
    Console().print(f"{output}: {', '.join(overrides)}; {_what_follows(sweep)}", highlight=False, soft_wrap=True)
    return 0


def _what_follows(sweep: Sweep) -> str:
    if not holder(sweep.output):
        return "nobody is at work there: psd resume goes by it"
    with suppress(UserError):  # the study may want a password that is not stored
        num_begun = len(read_records(sweep))
        if num_begun >= sweep.num_trials:
            return f"{num_begun} trials have begun: they are finished, and no other begins"
    return "its driver goes by it from now on"


def make_budget(sweep: Sweep) -> Budget:
    limits = sweep.config.budget
    return Budget(
        max_trials=sweep.num_trials,
        max_seconds=None if limits.hours is None else 3600 * limits.hours,
        max_worker_seconds=None if limits.gpu_hours is None else 3600 * limits.gpu_hours,
        patience=limits.patience,
    )


class LiveSettings:
    """Looks whether a sweep's own record has changed, at first since the sweep was read: it may have, meanwhile."""

    def __init__(self, sweep: Sweep) -> None:
        self._output, self._settings = sweep.output, sweep.live_settings()
        self._seen: tuple[int, int] | None = None

    def changed(self) -> Sweep | None:
        """The sweep as it is now; None while what may change of it is as it was at the last look."""
        try:
            stamp = self._stamp()
            if stamp == self._seen:
                return None
            sweep = config.load_output(self._output)
        except UserError:  # edited by hand, and wrongly: what runs goes on as it was
            self._seen = stamp
            return None
        except OSError:  # the file system does not answer: look again
            return None
        before, self._settings, self._seen = self._settings, sweep.live_settings(), stamp
        return None if self._settings == before else sweep

    def _stamp(self) -> tuple[int, int]:
        status = (self._output / "sweep.json").stat()
        return status.st_mtime_ns, status.st_ino  # the file is replaced, never written into


def _only_sweep_at_work(outputs: Path) -> Path:
    at_work = [file.parent for file in sorted(outputs.glob("*/sweep.json")) if holder(file.parent)]
    if len(at_work) != 1:
        found = ", ".join(map(str, at_work)) or "none"
        raise UserError(
            f"cannot tell which sweep is meant; at work under {outputs}: {found}",
            remedy="name its folder: psd set OUTPUT_DIR KEY=VALUE",
        )
    return at_work[0]
