"""Uploading what W&B has not got of a sweep: offline runs as they are, and from metrics.jsonl what was lost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from orchestrator.run_folder import RunFolder
from orchestrator.wandb_tracking import RunMark, TrialsTable, WandbTracking, fragments_of, is_uploaded, read_steps


class Service(Protocol):
    def logged_steps(self, wandb_id: str) -> set[int]: ...

    def upload(self, fragments: Sequence[Path]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class SyncReport:
    """What became of a sweep's runs."""

    num_runs: int  # that have metrics
    num_complete: int  # of which nothing was left to upload
    num_uploaded: int  # of which something was, and it has arrived
    num_relogged_rows: int  # that were lost on the way to W&B, and were uploaded from metrics.jsonl
    num_missing_rows: int  # that have not arrived


@dataclass(frozen=True, kw_only=True)
class _Upload:
    """What one run still has to upload."""

    wandb_id: str
    steps: frozenset[int]  # those of metrics.jsonl
    fragments: tuple[Path, ...]
    num_relogged_rows: int


def sync_runs(runs: Path, tracking: WandbTracking, service: Service) -> SyncReport:
    """Upload what is left of the runs in the folder ``runs``, none of which may be under way.

    What W&B has is asked of W&B, and no step is uploaded twice: an offline fragment that repeats one is left where it
    is, and its other steps are logged again from metrics.jsonl.

    Raises:
        UserError: the service cannot be reached.
    """
    tracked = _tracked_runs(runs)
    uploads = [upload for folder in tracked if (upload := _plan(folder, tracking, service)) is not None]
    fragments = [fragment for upload in uploads for fragment in upload.fragments]
    if fragments:
        service.upload(fragments)
    missing = {upload.wandb_id: len(upload.steps - service.logged_steps(upload.wandb_id)) for upload in uploads}
    return SyncReport(
        num_runs=len(tracked),
        num_complete=len(tracked) - len(uploads),
        num_uploaded=sum(not number for number in missing.values()),
        num_relogged_rows=sum(upload.num_relogged_rows for upload in uploads),
        num_missing_rows=sum(missing.values()),
    )


def sync_trials(trials: TrialsTable, tracking: WandbTracking, service: Service) -> bool:
    """Upload the table of trials if W&B has none of as many endings; whether it has one then.

    Raises:
        UserError: the service cannot be reached.
    """
    if trials.num_endings in service.logged_steps(tracking.trials_id):
        return True
    service.upload([keep_trials(trials, tracking)])
    return trials.num_endings in service.logged_steps(tracking.trials_id)


def keep_trials(trials: TrialsTable, tracking: WandbTracking) -> Path:
    """The table as an offline fragment, a new one if none of as many endings is waiting to be uploaded."""
    fragments = fragments_of(tracking.trials_id, tracking.folder)
    waiting = [path for path in fragments if not is_uploaded(path) and trials.num_endings in read_steps(path)]
    if not waiting:
        tracking.log_trials(trials)
        waiting = fragments_of(tracking.trials_id, tracking.folder)
    return waiting[-1]


def _tracked_runs(runs: Path) -> list[RunFolder]:
    folders = [RunFolder(runs, path.parent.name) for path in sorted(runs.glob("*/spec.json"))]
    return [folder for folder in folders if folder.metrics()]


def _plan(folder: RunFolder, tracking: WandbTracking, service: Service) -> _Upload | None:
    """What the run has to upload, with a new fragment for what was lost; None if that is nothing."""
    spec = folder.spec()
    assert spec is not None, "only folders with a spec.json are listed"
    mark = RunMark.read(folder.path) or RunMark(wandb_id=tracking.run_id(spec))
    steps = frozenset(int(row["step"]) for row in folder.metrics())
    known = service.logged_steps(mark.wandb_id)
    fragments = _whole_fragments(fragments_of(mark.wandb_id, tracking.folder), known)
    lost = steps - known.union(*fragments.values())
    if lost:
        _log_again(folder, lost, mark, tracking)
        fragments[fragments_of(mark.wandb_id, tracking.folder)[-1]] = lost
    if not fragments:
        return None
    return _Upload(wandb_id=mark.wandb_id, steps=steps, fragments=tuple(fragments), num_relogged_rows=len(lost))


def _whole_fragments(fragments: Iterable[Path], known: AbstractSet[int]) -> dict[Path, AbstractSet[int]]:
    """Those not uploaded yet that hold steps, and none that W&B or one before them has, with their steps."""
    taken, whole = set(known), dict[Path, AbstractSet[int]]()
    for fragment in fragments:
        if is_uploaded(fragment):
            continue
        steps = read_steps(fragment)
        if steps and taken.isdisjoint(steps):
            whole[fragment] = steps
            taken |= steps
    return whole


def _log_again(folder: RunFolder, steps: AbstractSet[int], mark: RunMark, tracking: WandbTracking) -> None:
    """An offline fragment of the same run with the rows of these steps."""
    spec = folder.spec()
    assert spec is not None
    replace(mark, step=-1).write(folder.path)
    tracker = replace(tracking, mode="offline")(spec, folder.path)
    for row in folder.metrics():
        step = int(row.pop("step"))
        if step in steps:
            tracker.log(step, row)
    tracker.close(0 if folder.result() is not None else 1)
