"""What the orchestrator itself costs, against Ray Tune with Optuna, on objectives that only sleep.

    pip install -c constraints.txt '.[bench]'
    python -m benchmarks.orchestration                     run what is missing, then report
    python -m benchmarks.orchestration --only 'ours-*'     only these
    python -m benchmarks.orchestration --again '*-200x1s-*'
    python -m benchmarks.orchestration --list
    python -m benchmarks.orchestration --report            report whatever is there

Each piece runs in a process of its own, in a Ray of its own, and leaves a JSON file, so that they can be run one at a
time. Sleeping takes no core: 16 slots fit on few. Writes docs/results/orchestration.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from benchmarks.orchestration_pieces import (
    Measurement,
    Piece,
    measure_memory,
    measure_optuna,
    measure_ours,
    measure_pruned_reports,
    measure_ray_reports,
    measure_reports,
    measure_tpe,
    measure_tune,
)
from benchmarks.orchestration_report import write_report

RESULTS = Path("outputs/benchmarks/orchestration")
REPORT = Path("docs/results/orchestration.md")
SIZES = ((1000, 0.1), (200, 1.0))
SLOTS = (2, 16)


def pieces() -> list[Piece]:
    """All that is measured; ours and Tune's take turns, so that a busy hour hits both."""
    compared = [
        Piece(
            name=f"{system}-{num_trials}x{trial_s:g}s-{slots}", arguments=(num_trials, trial_s, slots), measure=measure
        )
        for num_trials, trial_s in SIZES
        for slots in SLOTS
        for system, measure in (("ours", measure_ours), ("tune", measure_tune))
    ]
    return [
        *compared,
        # With twice as many trials at once as slots, half of them wait, so that Tune keeps more actors to reuse.
        Piece(name="tune_ahead-1000x0.1s-16", arguments=(1000, 0.1, 16, 32), measure=measure_tune),
        *(Piece(name=f"tpe-1000-{slots}", arguments=(1000, slots), measure=measure_tpe) for slots in SLOTS),
        Piece(name="memory-10000", arguments=(10_000, 2), measure=measure_memory),
        Piece(name="optuna-10000", arguments=(10_000,), measure=measure_optuna),
        Piece(name="reports-1000", arguments=(1000, 20.0), measure=measure_reports),
        Piece(name="pruned-1000-10", arguments=(1000, 20.0, 10), measure=measure_pruned_reports),  # as in image2d
        Piece(name="pruned-1000-40", arguments=(1000, 20.0, 40), measure=measure_pruned_reports),  # as in mvdream
        Piece(name="ray-reports-4", arguments=(4, 10.0, 0.02), measure=measure_ray_reports),
        # As many calls and reports a second as of 1,000 workers whose chunks take a second.
        Piece(name="ray-reports-16", arguments=(16, 20.0, 0.015), measure=measure_ray_reports),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN")
    parser.add_argument("--again", nargs="+", default=[], metavar="PATTERN", help="even if it is there")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--piece", help=argparse.SUPPRESS)  # what a process of its own is started with
    options = parser.parse_args()
    known = {piece.name: piece for piece in pieces()}
    if options.piece:
        measure(known[options.piece], options.results)
        return
    for name in known:
        path = options.results / f"{name}.json"
        again = _matches(name, options.again)
        if options.list:
            print(f"{name:<24}{'there' if path.exists() else ''}")
        elif not options.report and (again or (_matches(name, options.only) and not path.exists())):
            command = [sys.executable, "-m", "benchmarks.orchestration", "--results", str(options.results)]
            subprocess.run([*command, "--piece", name], check=True)
    if not options.list:
        write_report(options.results, list(known), REPORT)
        print(f"wrote {REPORT}")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def measure(piece: Piece, results: Path) -> None:
    """Run one piece and write what it measured, with what it ran on."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="psd-bench-") as folder:
        values = piece.measure(Path(folder), *piece.arguments)
    measurement: Measurement = {
        "values": values,
        "commit": _commit(),
        "load_before": load_before,
        "load_after": os.getloadavg()[0],
        "at": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{piece.name}.json").write_text(json.dumps(measurement, indent=2) + "\n")
    print(f"{piece.name}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))


def _commit() -> str:
    """With a note if the working tree is not that commit's."""
    commit = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=False)
    changes = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    return commit.stdout.strip() + (" with changes" if changes.stdout.strip() else "")


if __name__ == "__main__":
    main()
