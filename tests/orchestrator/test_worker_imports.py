"""What a worker's process loads before it has a run to do: sixteen of them start at once, on few cores."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

from orchestrator import config
from orchestrator.cli.sweep import worker_setup

ROOT = Path(__file__).parents[2]
HEAVY = {
    "diffusers",
    "fsspec",
    "hydra",
    "numpy",
    "omegaconf",
    "optuna",
    "pandas",
    "psd",
    "rich",
    "scipy",
    "sqlalchemy",
    "torch",
    "transformers",
    "wandb",
}

_RECEIVE = """
import pickle, sys
import orchestrator.worker_process
pickle.load(open(sys.argv[1], "rb"))
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""


def test_a_worker_loads_nothing_heavy_before_its_objective_does(tmp_path: Path) -> None:
    sweep = config.load(ROOT / "sweeps" / "cfg_scale.yaml", ["tracking.kind=none", f"output={tmp_path / 'out'}"])
    (tmp_path / "setup").write_bytes(pickle.dumps(worker_setup(sweep)))
    loaded = subprocess.run(
        [sys.executable, "-c", _RECEIVE, str(tmp_path / "setup")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert "orchestrator" in loaded
    assert HEAVY & set(loaded) == set()
