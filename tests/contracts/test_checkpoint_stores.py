"""One suite over every store of checkpoints: what a worker and a driver may rely on."""

from __future__ import annotations

import json
import pickle
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import pytest

from orchestrator.checkpoints import CheckpointStore, DirectoryCheckpoints, step_of
from orchestrator.fsspec_checkpoints import FsspecCheckpoints
from orchestrator.trial import Lease, RunSpec

KINDS = ("directory", "file", "memory")


@pytest.fixture
def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., CheckpointStore]]:
    place = f"checkpoints-{uuid.uuid4().hex}"

    def make(**options: Any) -> CheckpointStore:
        match request.param:
            case "directory":
                return DirectoryCheckpoints(tmp_path / "runs", **options)
            case "file":
                return FsspecCheckpoints(f"file://{tmp_path}/a place", **options)
            case _:
                return FsspecCheckpoints(f"memory://{place}/deeper", **options)

    yield make
    if request.param == "memory":
        memory = fsspec.filesystem("memory")
        if memory.exists(place):
            memory.rm(place, recursive=True)


@pytest.fixture
def store(make_store: Callable[..., CheckpointStore]) -> CheckpointStore:
    return make_store()


every_store = pytest.mark.parametrize("make_store", KINDS, indirect=True)


def lease(run_id: str = "run", attempt: int = 0, sitting: int = 0) -> Lease:
    spec = RunSpec(run_id=run_id, trial=0, prompt="p", seed=0, config={})
    return Lease(spec=spec, attempt=attempt, sitting=sitting)


def write(store: CheckpointStore, step: int, by: Lease | None = None, text: str = "") -> None:
    with store.write(by or lease(), step) as folder:
        assert list(folder.iterdir()) == []
        (folder / "a").write_text(text or str(step))
        (folder / "deeper").mkdir()
        (folder / "deeper" / "b").write_bytes(b"\0" * step)


def read(store: CheckpointStore, run_id: str = "run") -> tuple[int, str]:
    """The step and the text of the newest."""
    location = store.latest(run_id)
    assert location is not None
    with store.read(location) as folder:
        step, text = step_of(location), (folder / "a").read_text()
        assert (folder / "deeper" / "b").read_bytes() == b"\0" * step
        assert sorted(path.name for path in folder.iterdir()) == ["a", "deeper"]
    return step, text


@every_store
def test_what_is_written_is_read_in_a_folder(store: CheckpointStore) -> None:
    assert store.latest("run") is None
    write(store, 10)
    assert read(store) == (10, "10")
    write(store, 20)
    assert read(store) == (20, "20")
    assert store.latest("other") is None


@every_store
def test_another_process_finds_the_same(store: CheckpointStore) -> None:
    write(store, 10)
    assert read(pickle.loads(pickle.dumps(store))) == (10, "10")


@every_store
def test_steps_are_ordered_as_numbers(store: CheckpointStore) -> None:
    for step in (999_990, 1_000_000):
        write(store, step)
    assert read(store) == (1_000_000, "1000000")


@every_store
def test_the_newest_stay(make_store: Callable[..., CheckpointStore]) -> None:
    store = make_store(keep=2)
    locations = []
    for step in (10, 20, 30):
        write(store, step)
        locations.append(store.latest("run") or "")
    for location in locations[1:]:
        with store.read(location):
            pass
    with pytest.raises(FileNotFoundError, match="is not there"), store.read(locations[0]):
        pass


@every_store
def test_a_block_that_raises_commits_nothing(store: CheckpointStore) -> None:
    write(store, 10)

    def fill_the_disk() -> None:
        with store.write(lease(), 20) as folder:
            (folder / "a").write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fill_the_disk()
    assert read(store) == (10, "10")


@every_store
def test_the_newest_lease_counts_whatever_an_older_one_still_writes(store: CheckpointStore) -> None:
    old, new = lease(attempt=0), lease(attempt=1)
    write(store, 10, old)
    assert read(store) == (10, "10")
    write(store, 20, old, "zombie")
    assert read(store) == (20, "zombie"), "the newer lease has nothing yet, and this is whole"
    write(store, 15, new)
    for step in (30, 40, 50, 60):
        write(store, step, old, "zombie")
    assert read(store) == (15, "15")
    write(store, 25, new)
    assert read(store) == (25, "25")
    write(store, 5, lease(sitting=1))
    assert read(store) == (5, "5"), "another driver's lease is newer, whatever its attempt"


@every_store
def test_an_older_lease_removes_nothing_of_a_newer_one(make_store: Callable[..., CheckpointStore]) -> None:
    store = make_store(keep=1)
    write(store, 10, lease(attempt=1))
    for step in (20, 30):
        write(store, step, lease(attempt=0))
    assert read(store) == (10, "10")


@every_store
def test_checkpoints_of_a_finished_run_can_be_removed(store: CheckpointStore) -> None:
    write(store, 10)
    write(store, 20, lease(attempt=1))
    write(store, 10, lease("other"))
    store.remove("run")
    assert store.latest("run") is None
    assert read(store, "other") == (10, "10")
    store.remove("run")
    store.remove("never")


@every_store
@pytest.mark.parametrize("run_id", ["", ".", "..", "../up", "a/b", "/etc", "-rf", ".hidden", "a b", "a\n", "x" * 201])
def test_a_run_id_cannot_leave_the_store(store: CheckpointStore, run_id: str) -> None:
    with pytest.raises(ValueError, match="no safe file name"):
        store.latest(run_id)
    with pytest.raises(ValueError, match="no safe file name"):
        store.remove(run_id)
    with pytest.raises(ValueError, match="no safe file name"), store.write(lease(run_id), 1):
        pass


@every_store
def test_a_step_is_not_negative_and_one_checkpoint_is_kept(make_store: Callable[..., CheckpointStore]) -> None:
    with pytest.raises(ValueError, match="step must be >= 0"), make_store().write(lease(), -1):
        pass
    with pytest.raises(ValueError, match="keep must be >= 1"):
        make_store(keep=0)


class Interrupted(BaseException):
    """As if the process were killed: nothing may catch it to tidy up."""


@pytest.mark.parametrize("make_store", ["file", "memory"], indirect=True)
def test_a_writer_killed_at_any_boundary_leaves_the_old_checkpoint_or_the_new_one(
    make_store: Callable[..., CheckpointStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every operation on the remote file system is a boundary; the directory's are killed for real elsewhere."""
    steps = []
    for kill_before in range(1, 99):
        store = make_store(keep=1)
        assert isinstance(store, FsspecCheckpoints)
        run_id = f"run-{kill_before}"
        write(store, 10, lease(run_id))
        count = 0

        def counted(operation: Callable[..., Any], kill_before: int = kill_before) -> Callable[..., Any]:
            def attempt(*arguments: Any, **options: Any) -> Any:
                nonlocal count
                count += 1
                if count == kill_before:
                    raise Interrupted
                return operation(*arguments, **options)

            return attempt

        with monkeypatch.context() as patch:
            for name in ("makedirs", "put_file", "pipe_file", "rm_file", "rm"):
                patch.setattr(store._fs, name, counted(getattr(store._fs, name)))
            with suppress(Interrupted):
                write(store, 20, lease(run_id, attempt=1))
        steps.append(read(store, run_id)[0])
        write(store, 30, lease(run_id, attempt=2))
        assert read(store, run_id) == (30, "30")
        if count < kill_before:
            break
    assert count < kill_before
    assert steps == sorted(steps), "committed at one moment"
    assert steps.count(10) >= 5
    assert steps.count(20) >= 3


@pytest.mark.parametrize("make_store", ["file", "memory"], indirect=True)
@pytest.mark.parametrize("torn", [b"", b'{"a": ', b"[]", b'{"../../up": 1}', b'{"/etc/passwd": 1}'])
def test_a_torn_or_forged_list_of_files_is_no_checkpoint(store: CheckpointStore, torn: bytes) -> None:
    assert isinstance(store, FsspecCheckpoints)
    write(store, 10)
    write(store, 20)
    location = store.latest("run")
    store._fs.pipe_file(f"{location}.json", torn)
    assert read(store) == (10, "10")


@pytest.mark.parametrize("make_store", ["file", "memory"], indirect=True)
def test_a_file_of_another_size_is_not_used(store: CheckpointStore) -> None:
    assert isinstance(store, FsspecCheckpoints)
    write(store, 10)
    location = store.latest("run") or ""
    assert json.loads(store._fs.cat_file(f"{location}.json")) == {"a": 2, "deeper/b": 10}
    store._fs.pipe_file(f"{location}/a", b"1")
    with pytest.raises(OSError, match="has 1 bytes in place of 2"), store.read(location):
        pass


@pytest.mark.parametrize("make_store", ["memory"], indirect=True)
def test_whatever_a_client_library_raises_is_an_os_error(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ClientError(Exception):
        pass

    def refuse(*_: object, **__: object) -> None:
        raise ClientError("403")

    write(store, 10)
    location = store.latest("run") or ""
    assert isinstance(store, FsspecCheckpoints)
    for name in ("glob", "cat_file", "put_file"):
        monkeypatch.setattr(store._fs, name, refuse)
    with pytest.raises(OSError, match="ClientError: 403"):
        store.latest("run")
    with pytest.raises(OSError, match="ClientError: 403"), store.read(location):
        pass
    with pytest.raises(OSError, match="ClientError: 403"):
        write(store, 20)


def test_a_password_in_the_url_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^ftp://me@127\.0\.0\.1:1/x cannot be used: "):  # nobody listens there
        FsspecCheckpoints("ftp://me:s3cret@127.0.0.1:1/x")

    store = FsspecCheckpoints("memory://me:s3cret@host/x")
    for error in (PermissionError("memory://me:s3cret@host/x"), RuntimeError("no user me with s3cret")):

        def refuse(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(store._fs, "glob", refuse)
        with pytest.raises(OSError) as caught:  # noqa: PT011 (what it must not say is what counts)
            store.latest("run")
        assert "s3cret" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("url", ["xyz://bucket/folder", "s3://bucket/folder"])
def test_a_protocol_that_is_unknown_or_not_installed_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"cannot be used: .*(xyz|s3fs)"):
        FsspecCheckpoints(url)


def test_step_of_reads_paths_and_addresses() -> None:
    assert step_of("/runs/r/checkpoints/step-000100") == 100
    assert step_of("s3://bucket/r/checkpoints/step-1234567/") == 1_234_567
    with pytest.raises(ValueError, match="no checkpoint"):
        step_of("/runs/r/checkpoints/.writing-000100-7")
