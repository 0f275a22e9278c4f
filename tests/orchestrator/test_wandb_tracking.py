"""W&B, with the real package, without a network."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from orchestrator.trial import RunSpec
from orchestrator.wandb_tracking import WandbTracking, resolve_mode

SPEC = RunSpec(run_id="t0001-p00-s0", trial=1, prompt="a red cube", seed=0, config={"scene": {"resolution": 40}})


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def _tracking(folder: Path, **changes: object) -> WandbTracking:
    return WandbTracking(group="cfg_scale", project="psd-sweeps", folder=folder, **changes)  # type: ignore[arg-type]


def test_without_a_key_it_is_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_mode("auto") == "offline"
    assert resolve_mode("online") == "online"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0123456789\n")
    (tmp_path / "netrc").chmod(0o600)
    assert resolve_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert resolve_mode("auto") == "offline"
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "0123456789")
    assert resolve_mode("auto") == "online"


def test_a_run_has_one_id_for_ever_and_another_in_another_folder(tmp_path: Path) -> None:
    here = _tracking(tmp_path / "a")
    again: WandbTracking = pickle.loads(pickle.dumps(here))
    assert here.run_id(SPEC) == again.run_id(SPEC)
    assert here.run_id(SPEC) != _tracking(tmp_path / "b").run_id(SPEC)


def test_an_offline_run_can_be_read_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "sheet.png"
    Image.new("RGB", (8, 8), "red").save(picture)
    tracker = _tracking(tmp_path / "out")(SPEC, tmp_path)
    tracker.log(10, {"train/loss": 0.5})
    tracker.log_files(20, {"contact_sheet": picture, "notes": tmp_path / "notes.txt"})
    tracker.log(20, {"train/loss": 0.25, "eval/judge": 3.5})
    tracker.close(0)
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "")

    [log] = (tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb")
    summary = _inspect(log)
    assert "cfg_scale" in json.dumps(summary)
    text = json.dumps(summary)
    assert '"eval/judge"' in text
    assert '"train/step"' in text
    assert list(log.parent.glob("files/media/images/media/contact_sheet_*.png"))


def test_a_service_out_of_reach_is_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    tracking = _tracking(tmp_path, init_timeout_s=2.0)
    for _ in range(2):
        tracker = tracking(SPEC, tmp_path)
        tracker.log(1, {"train/loss": 0.5})
        tracker.close(0)
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def _inspect(log: Path) -> object:
    command = shutil.which("wandb", path=str(Path(sys.executable).parent))
    assert command is not None
    output = subprocess.run(
        [command, "leet", "inspect", "--summary", "--json", str(log)], check=True, capture_output=True, text=True
    ).stdout
    return json.loads(output)
