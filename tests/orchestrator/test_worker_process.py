"""A worker on a machine that does not see the driver's disk; one that wears out; one that may be silent for so long."""

from __future__ import annotations

import logging
import math
import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.carrying import Parcel, Receiver, pack, unpack
from orchestrator.checkpoints import DirectoryCheckpoints, step_of
from orchestrator.deadlines import Deadlines, Watch
from orchestrator.haste import is_hastened
from orchestrator.heartbeat import asks_patience, num_beats, patience
from orchestrator.run_folder import RunFolder
from orchestrator.testing import FakeObjective
from orchestrator.tracking import NullTracker, Tracker
from orchestrator.trial import Event, Lease, RunFailed, RunFinished, RunProgressed, RunSpec, RunStopped
from orchestrator.worker import WorkerSetup
from orchestrator.worker_process import Report, Wear, WorkerProcess, resident_bytes
from orchestrator.worker_warnings import WorkerWarning

CONFIG = {"x": 1.0, "num_steps": 30, "steps_per_chunk": 5}
LEASE = Lease(spec=RunSpec(run_id="t0000-p00-s0", trial=0, prompt="p", seed=0, config=CONFIG))


def track_nothing(spec: RunSpec, output: Path) -> Tracker:
    return NullTracker()


def setup(runs: Path) -> WorkerSetup:
    return WorkerSetup(
        objective=FakeObjective,
        runs=runs,
        checkpoints=DirectoryCheckpoints(runs),
        tracker=track_nothing,
        checkpoint_every=10,
    )


class Link:
    """A driver's disk, and workers elsewhere: all that passes between them is pickled."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self.store = DirectoryCheckpoints(runs)
        self.receiver = Receiver(runs, self.store)
        self.folder = RunFolder(runs, LEASE.spec.run_id)

    def worker(self) -> WorkerProcess:
        return WorkerProcess(pickle.loads(pickle.dumps(setup(self.runs / "not there"))), Wear(), ".driver-1")

    def take(self, report: Report) -> list[Event]:
        report = pickle.loads(pickle.dumps(report))
        for entry in report.entries:
            assert entry.parcel is not None
            self.receiver.receive(entry.event, entry.parcel)
        return [entry.event for entry in report.entries]

    def start(self, worker: WorkerProcess, lease: Lease) -> Event:
        report = worker.start(lease)
        if not report.entries:
            report = worker.start(lease, self.receiver.pack_checkpoint(lease.resume_from or ""))
        [event] = self.take(report)
        return event

    def until_end(self, worker: WorkerProcess, lease: Lease, for_s: float = 0.0) -> list[Event]:
        events = [self.start(worker, lease)]
        while isinstance(events[-1], RunProgressed):
            events += self.take(worker.advance(for_s))
        return events


@pytest.fixture
def link(tmp_path: Path) -> Link:
    return Link(tmp_path / "runs")


def reference(folder: Path) -> RunFinished:
    folder.mkdir()
    worker = WorkerProcess(setup(folder), Wear(), ".")
    events = told(worker.start(LEASE))
    while isinstance(events[-1], RunProgressed):
        events = told(worker.advance())
    assert isinstance(events[-1], RunFinished)
    return events[-1]


def told(report: Report) -> list[Event]:
    return [entry.event for entry in report.entries]


@pytest.mark.parametrize("for_s", [0.0, math.inf], ids=["chunk by chunk", "in one call"])
def test_what_a_run_elsewhere_makes_arrives_where_it_would_have_been_made(
    link: Link, tmp_path: Path, for_s: float
) -> None:
    here = reference(tmp_path / "here")
    events = link.until_end(link.worker(), LEASE, for_s)
    assert [event.step for event in events if isinstance(event, RunProgressed)] == [5, 10, 15, 20, 25]
    assert events[-1] == here
    own = RunFolder(tmp_path / "here", LEASE.spec.run_id)
    assert link.folder.metrics() == own.metrics()
    assert link.folder.result() == own.result() == here.metrics
    for name in ("spec.json", "result.json", "picture.txt", "closed"):
        assert (link.folder.path / name).read_bytes() == (own.path / name).read_bytes()
    assert step_of(link.store.latest(LEASE.spec.run_id) or "") == 20


def test_a_run_goes_on_on_a_third_machine_from_what_arrived(link: Link, tmp_path: Path) -> None:
    first = link.worker()
    link.start(first, LEASE)
    for _ in range(4):
        link.take(first.advance())  # to step 25; the machine is lost
    again = replace(LEASE, attempt=1, resume_from=link.store.latest(LEASE.spec.run_id))
    events = link.until_end(link.worker(), again)
    assert isinstance(events[0], RunProgressed)
    assert events[0].step == 25
    assert isinstance(events[-1], RunFinished)
    assert events[-1].metrics == reference(tmp_path / "here").metrics
    assert [row["step"] for row in link.folder.metrics()] == [5, 10, 15, 20, 25, 30]


def test_a_run_that_is_stopped_elsewhere_leaves_its_checkpoint_here(link: Link) -> None:
    worker = link.worker()
    link.start(worker, LEASE)
    assert link.take(worker.stop()) == [RunStopped(lease=LEASE, step=5)]
    assert step_of(link.store.latest(LEASE.spec.run_id) or "") == 5


def test_where_a_checkpoint_cannot_be_kept_a_run_goes_on_and_does_not_stop(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("the disk is full")

    worker = link.worker()
    link.start(worker, LEASE)
    monkeypatch.setattr(link.store, "write", refuse)
    assert isinstance(link.take(worker.advance())[0], RunProgressed)
    assert isinstance(link.take(worker.advance())[0], RunProgressed)
    with pytest.raises(OSError, match="the disk is full"):
        link.take(worker.stop())


def test_what_an_old_attempt_still_sends_is_refused(link: Link) -> None:
    from orchestrator.errors import SupersededError

    old = link.worker()
    link.start(old, LEASE)
    link.until_end(link.worker(), replace(LEASE, attempt=1))
    before = link.folder.metrics()
    for _ in range(4):
        link.take(old.advance())  # rows go nowhere
    assert link.folder.metrics() == before
    report = old.advance()
    assert isinstance(told(report)[-1], RunFinished)
    with pytest.raises(SupersededError):
        link.take(report)


def test_files_are_sent_when_they_change(link: Link) -> None:
    worker = link.worker()
    parcels = [entry.parcel for report in (worker.start(LEASE), worker.advance()) for entry in report.entries]
    assert [sorted(parcel.files) for parcel in parcels if parcel] == [["picture.txt"]] * 2
    assert [parcel.step for parcel in parcels if parcel] == [5, 10]
    assert [parcel.checkpoint is not None for parcel in parcels if parcel] == [False, True]


@pytest.mark.parametrize("name", ["../up", "/etc/passwd", "a/../../up", ""])
def test_a_parcel_writes_only_into_its_runs_folder(link: Link, name: str) -> None:
    event = RunProgressed(lease=LEASE, step=5, num_steps=30, metrics={})
    with pytest.raises(OSError, match="would leave"):
        link.receiver.receive(event, Parcel(step=5, files={name: b"x"}))


def test_an_archive_writes_only_into_its_folder(tmp_path: Path) -> None:
    import tarfile

    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "a").write_text("a")
    (tmp_path / "from" / "link").symlink_to("/etc/passwd")
    with pytest.raises(tarfile.FilterError):
        unpack(pack(tmp_path / "from"), tmp_path / "to")


def test_a_worker_that_sees_the_drivers_disk_sends_nothing(tmp_path: Path) -> None:
    (tmp_path / ".driver-1").touch()
    worker = WorkerProcess(setup(tmp_path), Wear(), ".driver-1")
    [entry] = worker.start(LEASE).entries
    assert entry.parcel is None
    assert RunFolder(tmp_path, LEASE.spec.run_id).metrics()


def test_a_call_goes_on_with_its_run_for_as_long_as_it_may(tmp_path: Path) -> None:
    worker = WorkerProcess(setup(tmp_path), Wear(max_runs=1), ".")
    assert [len(worker.start(LEASE).entries), len(worker.advance().entries)] == [1, 1]
    beats_before = num_beats()
    report = worker.advance(for_s=math.inf)
    assert [type(event) for event in told(report)] == [RunProgressed] * 3 + [RunFinished]
    assert [event.step for event in told(report) if isinstance(event, RunProgressed)] == [15, 20, 25]
    assert report.num_beats == num_beats() > beats_before + 2, "a chunk is a sign of life"
    assert report.worn == "it has done 1 runs"
    assert [row["step"] for row in RunFolder(tmp_path, LEASE.spec.run_id).metrics()] == [5, 10, 15, 20, 25, 30]


def test_a_failure_ends_a_call_with_what_came_before_it(tmp_path: Path) -> None:
    worker = WorkerProcess(setup(tmp_path), Wear(), ".")
    config = {**CONFIG, "fault": {"kind": "value_error", "at_step": 18}}
    worker.start(replace(LEASE, spec=replace(LEASE.spec, config=config)))
    assert [type(event) for event in told(worker.advance(for_s=math.inf))] == [RunProgressed] * 2 + [RunFailed]


def test_a_lease_that_is_superseded_ends_its_call(tmp_path: Path) -> None:
    old = WorkerProcess(setup(tmp_path), Wear(), ".")
    old.start(LEASE)
    WorkerProcess(setup(tmp_path), Wear(), ".").start(replace(LEASE, attempt=1))
    [event] = told(old.advance(for_s=math.inf))
    assert isinstance(event, RunFailed)
    assert "a newer attempt is at work" in event.failure.message


def test_a_run_that_is_to_stop_answers_after_its_chunk(tmp_path: Path) -> None:
    worker = WorkerProcess(setup(tmp_path), Wear(), ".")
    worker.start(LEASE)
    worker.hasten()
    assert is_hastened(), "so its objective sees it"
    assert [getattr(event, "step", None) for event in told(worker.advance(for_s=math.inf))] == [6]
    assert not is_hastened()
    assert len(worker.advance(for_s=math.inf).entries) == 5, "it was not stopped after all"


def test_what_a_worker_warns_of_comes_with_its_report_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("the disk is full")

    worker = WorkerProcess(setup(tmp_path), Wear(), ".")
    worker.start(LEASE)
    monkeypatch.setattr(DirectoryCheckpoints, "write", refuse)
    logging.getLogger("orchestrator.wandb_tracking").warning("W&B is out of reach")
    logging.getLogger("orchestrator.tracking").info("all is well")
    report = pickle.loads(pickle.dumps(worker.advance(for_s=math.inf)))
    assert report.warnings == (
        WorkerWarning(text="W&B is out of reach"),
        WorkerWarning(text="no checkpoint at step 10: the disk is full", run_id=LEASE.spec.run_id),
    )
    assert worker.start(replace(LEASE, attempt=1)).warnings == ()


def run_times(worker: WorkerProcess, count: int) -> list[str]:
    worn = []
    for number in range(count):
        spec = replace(LEASE.spec, run_id=f"run-{number}", config={**CONFIG, "num_steps": 5})
        worn.append(worker.start(Lease(spec=spec)).worn)
    return worn


def test_a_worker_is_worn_after_so_many_runs(tmp_path: Path) -> None:
    worker = WorkerProcess(setup(tmp_path), Wear(max_runs=3), ".")
    assert run_times(worker, 4) == ["", "", "it has done 3 runs", "it has done 4 runs"]


def test_a_worker_is_worn_when_what_it_holds_between_runs_grows(tmp_path: Path) -> None:
    held = iter([5e9, 4e9, 5.9e9, 6.1e9])
    worker = WorkerProcess(replace(setup(tmp_path), memory_bytes=lambda: int(next(held))), Wear(), ".")
    assert run_times(worker, 4) == ["", "", "", "what it holds between runs grew by 2.1 GB in 4 runs"]


def test_wear_needs_sense() -> None:
    with pytest.raises(ValueError, match="max_runs must be >= 1"):
        Wear(max_runs=0)
    with pytest.raises(ValueError, match="max_growth_gb must be > 0"):
        Wear(max_growth_gb=0)
    assert resident_bytes() > 10e6


def _first_over(watch: Watch, begin_s: float, *, every_s: float = 2.0) -> float:
    """When the deadline has passed, for one who looks so often."""
    now_s = begin_s
    while not watch.is_over(now_s):
        now_s += every_s
    return now_s


def test_loading_may_be_silent_for_longer_than_work() -> None:
    watch = Watch(Deadlines(hung_after_s=20.0, loading_timeout_s=600.0), 0.0, is_loading=True)
    for now_s in range(0, 500, 2):
        watch.hear(7, float(now_s))
    assert _first_over(watch, 500.0) == 602.0
    watch.hear(8, 604.0)
    assert _first_over(watch, 604.0) == 626.0


def test_a_worker_that_moved_within_a_call_is_seen_to_have_moved() -> None:
    watch = Watch(Deadlines(hung_after_s=25.0), 0.0, is_loading=False, num_beats=7)
    watch.hear(6, 1.0)  # asked for before the call
    watch.hear(8, 10.0)
    assert watch.silent_s == 0.0
    watch.hear(8, 22.0)
    assert not watch.is_over(34.0)
    assert watch.is_over(35.1)


def test_a_chunk_may_take_long_as_long_as_it_beats() -> None:
    watch = Watch(Deadlines(hung_after_s=20.0), 0.0, is_loading=False)
    for second in range(0, 1000, 10):
        watch.hear(second, float(second))
        assert not watch.is_over(second + 5.0)
    assert _first_over(watch, 995.0) == 1011.0
    assert watch.silent_s == 21.0
    with pytest.raises(ValueError, match="at most loading_timeout_s"):
        Deadlines(hung_after_s=700.0)


def test_an_upload_may_take_as_long_as_loading() -> None:
    watch = Watch(Deadlines(hung_after_s=20.0, loading_timeout_s=600.0), 0.0, is_loading=False)
    with patience():
        watch.hear(num_beats(), 2.0, asks_patience=asks_patience())
    assert _first_over(watch, 2.0) == 602.0
    watch.hear(num_beats(), 604.0, asks_patience=asks_patience())
    assert _first_over(watch, 604.0) == 626.0


def test_a_driver_that_did_not_look_does_not_take_its_worker_for_hung() -> None:
    watch = Watch(Deadlines(hung_after_s=20.0), 0.0, is_loading=False)
    watch.hear(1, 2.0)
    watch.hear(2, 4.0)
    assert not watch.is_over(300.0), "the driver was away, and has not asked since"
    assert _first_over(watch, 302.0) == 312.0, "if the worker stays silent, it hangs"
