"""The orchestration benchmark's page: tables from the pieces' JSON files, goals, and the reading that stands below."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from benchmarks.orchestration_pieces import Measurement

READING = "## Reading"
Measured = dict[str, Measurement]


def write_report(results: Path, names: Sequence[str], path: Path) -> None:
    """Everything above the heading "Reading" anew; what stands from there on is a person's, and stays."""
    measured: Measured = {
        name: json.loads((results / f"{name}.json").read_text())
        for name in names
        if (results / f"{name}.json").exists()
    }
    old = path.read_text() if path.exists() else ""
    reading = old[old.index(READING) :] if READING in old else f"{READING}\nNone yet.\n"
    sections = [_head(), _comparison(measured), _sampler(measured), _memory(measured), _reports(measured)]
    sections.append(_goals(measured))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*sections, reading]))


def _head() -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("ray", "optuna"))
    return f"""# What the orchestrator costs
`python -m benchmarks.orchestration`, written by it down to the reading. Objectives only sleep; each trial is one run in
one chunk with five parameters, sampled by the same TPE. Ours keeps its study on the disk, as `psd sweep` does; Ray Tune
keeps it in memory, reuses its actors and writes no logs (its quickest settings). The clock starts when Ray is at rest:
the processes that it starts ahead, one for each of the machine's cores, are up and idle. Those that a system needs
beyond them count, as does all that it makes of any.

Machine: {os.cpu_count()} cores ({_processor()}), Python {platform.python_version()}, {versions}. "Load" is the
machine's load average before and after a piece. Much above 1, others were at work, and times are too long.
"""


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _origin(measurement: Measurement) -> list[str]:
    load = f"{measurement['load_before']:.1f}, {measurement['load_after']:.1f}"
    return [f"`{measurement['commit']}`", measurement["at"], load]


def _overhead_s(measurement: Measurement) -> float:
    return measurement["values"]["wall_s"] - measurement["values"]["ideal_s"]


def _pairs(measured: Measured) -> dict[str, tuple[Measurement, Measurement]]:
    """Ours and Tune's by their common name."""
    sizes = [name.removeprefix("ours-") for name in measured if name.startswith("ours-")]
    return {size: (measured[f"ours-{size}"], measured[f"tune-{size}"]) for size in sizes if f"tune-{size}" in measured}


_SYSTEMS = {"ours": "psd", "tune": "Ray Tune", "tune_ahead": "Ray Tune, 2 trials a slot"}


def _comparison(measured: Measured) -> str:
    rows = []
    for name, measurement in measured.items():
        if not name.startswith(("ours-", "tune")):
            continue
        system, size, slots = name.split("-")
        values = measurement["values"]
        rows.append(
            [
                _SYSTEMS[system],
                size.replace("x", " x "),
                slots,
                f"{values['ideal_s']:.1f}",
                f"{values['wall_s']:.1f}",
                f"{_overhead_s(measurement):.1f}",
                f"{values['startup_s']:.1f}",
                f"{values['at_work_s'] / values['ideal_s'] - 1:+.0%}",
                f"{values['handover_p50_ms']:.0f}",
                f"{values['handover_p99_ms']:.0f}",
                f"{values['driver_cpu_ms_per_trial']:.0f}",
                *_origin(measurement),
            ]
        )
    header = ["system", "trials", "slots", "ideal s", "wall s", "overhead s", "start-up s", "over ideal, at work"]
    header += ["hand-over p50 ms", "p99 ms", "driver CPU ms a trial", "commit", "at", "load"]
    return f"""## Against Ray Tune
Overhead is wall time less the ideal: trials over slots, times a trial's sleep. "At work" leaves the start-up out: from
the first trial's beginning to the last one's end. A hand-over is the time from a trial's end to the beginning of the
trial that takes its place.

{_table(header, rows)}"""


def _memory(measured: Measured) -> str:
    if "memory-10000" not in measured:
        return ""
    measurement = measured["memory-10000"]
    values = measurement["values"]
    alone = measured["optuna-10000"]["values"] if "optuna-10000" in measured else {}
    counts = sorted(int(name.rsplit("_", 1)[1]) for name in values if name.startswith("rss_mb_"))
    rows = [
        [
            str(count),
            f"{values[f'rss_mb_{count}']:.0f}",
            f"{values[f'cpu_ms_per_trial_{count}']:.1f}",
            f"{values[f'ms_per_trial_{count}']:.1f}",
            f"{alone[f'rss_mb_{count}']:.0f}" if alone else "",
            f"{alone[f'cpu_ms_per_trial_{count}']:.1f}" if alone else "",
        ]
        for count in counts
    ]
    header = ["trials", "memory MB", "CPU ms a trial", "wall ms a trial", "Optuna alone: memory MB", "CPU ms a trial"]
    return f"""## Ten thousand trials
Trials that fake workers finish at once, sampled at random; the driver's process, without Ray. Beside it the same trials
of Optuna alone, in memory and without a file.

Commit, time, load: {", ".join(_origin(measurement))}.

{_table(header, rows)}"""


def _sampler(measured: Measured) -> str:
    rows = [
        [
            str(slots),
            f"{measurement['values']['cpu_ms_per_trial']:.1f}",
            f"{measurement['values']['trials_per_s']:.0f}",
            *_origin(measurement),
        ]
        for slots, measurement in _sampler_alone(measured).items()
    ]
    header = ["trials at once", "CPU ms a trial", "trials a second", "commit", "at", "load"]
    return f"""## The sampler by itself
1,000 trials of the same TPE, asked of Optuna and told to it, in memory, with nothing of Ray's or ours: what is left of
a driver's time if all else costs nothing.

{_table(header, rows)}"""


def _sampler_alone(measured: Measured) -> dict[int, Measurement]:
    """By the number of slots."""
    return {int(name.split("-")[2]): measured[name] for name in measured if name.startswith("tpe-")}


_FAKE_WORKERS = {
    "reports-1000": "1,000 fake workers",
    "pruned-1000-10": "the same, every 10th report an evaluation that a median pruner compares with 200 trials'",
    "pruned-1000-40": "the same, every 40th",
}


def _reports(measured: Measured) -> str:
    rows = []
    for name, workers in _FAKE_WORKERS.items():
        if name in measured:
            values = measured[name]["values"]
            fakes = f"of which the fake workers {values['core_share_of_fakes']:.1%}"
            share = f"{values['core_share']:.1%} of a core, {fakes}"
            rows.append([workers, f"{values['reports_per_s']:.0f}", share, *_origin(measured[name])])
    for name, measurement in measured.items():
        if name.startswith("ray-reports-"):
            values, num_workers = measurement["values"], name.rsplit("-", 1)[1]
            cost = f"{values['core_share']:.1%} of a core, {values['driver_cpu_ms_per_report']:.2f} ms a report"
            rows.append([f"{num_workers} Ray workers", f"{values['reports_per_s']:.0f}", cost, *_origin(measurement)])
    return f"""## Reports
The driver while workers report. Fake workers need no Ray: what remains is what the driver itself does with a report.

{_table(["workers", "reports a second", "driver", "commit", "at", "load"], rows)}"""


_PRUNERS = {
    "reports-1000": "",
    "pruned-1000-10": ", with a pruner at every 10th",
    "pruned-1000-40": ", with a pruner at every 40th",
}


def _goals(measured: Measured) -> str:
    rows = [
        [
            f"overhead at most a fifth of Tune's: {size}",
            f"{_overhead_s(ours):.1f} s against {_overhead_s(tune):.1f} s: {_overhead_s(ours) / _overhead_s(tune):.2f}",
            _met(_overhead_s(ours) <= _overhead_s(tune) / 5),
        ]
        for size, (ours, tune) in _pairs(measured).items()
    ]
    for name, measurement in measured.items():
        if name.startswith("ours-"):
            p50_ms = measurement["values"]["handover_p50_ms"]
            rows.append([f"hand-over p50 at most 50 ms: {name[5:]}", f"{p50_ms:.0f} ms", _met(p50_ms <= 50)])
    if 16 in (alone := _sampler_alone(measured)):
        per_s = alone[16]["values"]["trials_per_s"]
        wanted = "what 1000x0.1s-16 wants, 160 trials a second, of the sampler alone"
        rows.append([wanted, f"{per_s:.0f} a second", _met(per_s >= 160)])
    for name, what in _PRUNERS.items():
        if name in measured:
            values = measured[name]["values"]
            share = values["core_share"] - values["core_share_of_fakes"]
            rows.append([f"at most 10 % of a core at 1,000 reports a second{what}", f"{share:.1%}", _met(share <= 0.1)])
    if "ray-reports-16" in measured:
        values = measured["ray-reports-16"]["values"]
        said = f"{values['core_share']:.1%} at {values['reports_per_s']:.0f}"
        share = values["core_share"] * max(1.0, 1000 / values["reports_per_s"])
        rows.append(["the same through Ray, from 16 workers", said, _met(share <= 0.1)])
    if "memory-10000" in measured:
        values = measured["memory-10000"]["values"]
        first_ms, last_ms = values["cpu_ms_per_trial_1000"], values["cpu_ms_per_trial_10000"]
        said = f"{first_ms:.1f} ms at first, {last_ms:.1f} ms in the end"
        rows.append(["CPU a trial flat over 10,000 trials", said, _met(last_ms <= 1.2 * first_ms)])
        if "optuna-10000" in measured:
            growth_kb, alone_kb = _growth_kb(values), _growth_kb(measured["optuna-10000"]["values"])
            said = f"{growth_kb:.1f} kB a trial, from 5,000 on; Optuna alone {alone_kb:.1f}"
            rows.append(["memory flat over 10,000 trials, but for Optuna's", said, _met(growth_kb <= alone_kb)])
    return f"""## Goals

{_table(["goal", "measured", "met"], rows)}"""


def _growth_kb(values: Mapping[str, float]) -> float:
    return 1024 * (values["rss_mb_10000"] - values["rss_mb_5000"]) / 5000


def _met(is_met: bool) -> str:
    return "yes" if is_met else "**no**"
