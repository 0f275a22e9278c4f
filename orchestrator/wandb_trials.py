"""The table of a sweep's trials for W&B, made and uploaded in a process of its own: nothing of W&B can hold up another.

Offline it is kept in the sweep's folder, for `psd sync`, which makes it again where it did not arrive.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys

from orchestrator.wandb_sync import keep_trials, sync_trials
from orchestrator.wandb_tracking import TrialsTable, WandbService, WandbTracking, resolve_mode

TIMEOUT_S = 120.0


def record_trials(trials: TrialsTable, tracking: WandbTracking, *, timeout_s: float = TIMEOUT_S) -> bool:
    """Whether it is at W&B then, or kept where that is offline."""
    command = [sys.executable, "-m", "orchestrator.wandb_trials"]
    # where W&B puts a table until it is uploaded: beside the rest of it, rather than in the home of this machine's user
    environment = {**os.environ, "WANDB_DATA_DIR": str(tracking.folder / "wandb")}
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,  # no pipes, which W&B's own process would keep open
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            process.communicate(pickle.dumps((trials, tracking)), timeout=timeout_s)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # with the `wandb sync` that it may have begun
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
    return process.returncode == 0


def main() -> int:
    trials, tracking = pickle.load(sys.stdin.buffer)
    if resolve_mode(tracking.mode) == "offline":
        keep_trials(trials, tracking)
        return 0
    return 0 if sync_trials(trials, tracking, WandbService(project=tracking.project, entity=tracking.entity)) else 1


if __name__ == "__main__":
    sys.exit(main())
