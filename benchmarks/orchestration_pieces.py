"""The pieces of the orchestration benchmark: our driver, Ray Tune, memory over many trials, many reports a second."""

from __future__ import annotations

import itertools
import math
import os
import resource
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import psutil

from benchmarks.sleeping import METRIC, NAMES, SleepingObjective, score
from orchestrator.budget import Budget
from orchestrator.checkpoints import DirectoryCheckpoints
from orchestrator.clock import SystemClock
from orchestrator.driver import SweepDriver, SweepEvent
from orchestrator.failure import FailurePolicy
from orchestrator.goals import Goal
from orchestrator.pool import Pool
from orchestrator.pruning import MedianPruning, Watch
from orchestrator.search_space import FloatDomain, SearchSpace
from orchestrator.study import Study, Suggestion
from orchestrator.testing import MemoryStudy
from orchestrator.tracking import track_nothing
from orchestrator.trial import Event, Lease, RunFinished, RunProgressed, RunSpec, TrialSpec
from orchestrator.worker import WorkerSetup

SPACE = SearchSpace(domains={name: FloatDomain(low=0, high=1) for name in NAMES}, conditions={})
STARTUP_TRIALS = 6
SETTLING_TIMEOUT_S = 180.0
AT_REST_CPU_S = 0.15  # in a second
Values = dict[str, float]


class Measurement(TypedDict):
    values: Values
    commit: str
    load_before: float
    load_after: float
    at: str


@dataclass(frozen=True, kw_only=True)
class Piece:
    name: str
    arguments: tuple[float, ...]
    measure: Callable[..., Values]


def _storage(folder: Path) -> str:
    """What `psd sweep` uses where nothing else is said."""
    return f"journal:///{folder}/study.journal"


@dataclass
class _Sweep:
    """Our sweep over sleeping runs, put together as `psd sweep` does; ``finished`` is told as runs finish."""

    folder: Path
    num_trials: int
    trial_s: float
    num_chunks: int = 1
    finished: list[Mapping[str, float]] = field(default_factory=list)

    @property
    def setup(self) -> WorkerSetup:
        runs = self.folder / "runs"
        return WorkerSetup(
            objective=SleepingObjective,
            runs=runs,
            checkpoints=DirectoryCheckpoints(runs),
            tracker=track_nothing,
            checkpoint_every=10**9,
        )

    def driver(self, study: Study, pool: Pool, watch: Watch | None = None) -> SweepDriver:
        return SweepDriver(
            study=study,
            pool=pool,
            planner=self.plan,
            goals=[Goal(name=METRIC, metric=METRIC)],
            watch=watch,
            runs=self.setup.runs,
            checkpoints=self.setup.checkpoints,
            failure_policy=FailurePolicy(),
            budget=Budget(max_trials=self.num_trials),
            clock=SystemClock(),
            on_event=self.on_event,
        )

    def plan(self, suggestion: Suggestion) -> TrialSpec:
        config = {**suggestion.params, "trial_s": self.trial_s, "num_chunks": self.num_chunks}
        run_id = f"t{suggestion.number:05d}-p00-s0"
        run = RunSpec(run_id=run_id, trial=suggestion.number, prompt="p", seed=0, config=config)
        return TrialSpec(number=suggestion.number, params=suggestion.params, runs=(run,))

    def on_event(self, event: SweepEvent) -> None:
        if isinstance(event, RunFinished):
            self.finished.append(event.metrics)


def _start_ray(num_cpus: int) -> None:
    """Start Ray, and wait until it has come to rest: the processes that it starts ahead are up, and all are idle."""
    import ray

    os.environ.update(RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0", RAY_agent_register_timeout_ms="120000")  # as the pool
    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=128 * 1024**2,
        _node_ip_address="127.0.0.1",
    )
    deadline_s = time.monotonic() + SETTLING_TIMEOUT_S
    while not _is_at_rest(num_idle=min(num_cpus, os.cpu_count() or 1)):  # as many as Ray 2.60 starts
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"Ray has not come to rest within {SETTLING_TIMEOUT_S:.0f} s")


def _is_at_rest(num_idle: int) -> bool:
    """Whether so many idle workers are there, and all of Ray's processes together hardly used the CPU for a second."""
    processes = psutil.Process().children(recursive=True)
    before_s = _cpu_s(processes)
    time.sleep(1.0)
    if _cpu_s(processes) - before_s > AT_REST_CPU_S:
        return False
    return sum(map(_is_idle_worker, psutil.Process().children(recursive=True))) >= num_idle


def _is_idle_worker(process: psutil.Process) -> bool:
    try:
        return " ".join(process.cmdline()).startswith("ray::IDLE")
    except psutil.NoSuchProcess:
        return False


def _cpu_s(processes: Sequence[psutil.Process]) -> float:
    """That they have used so far; of those that have ended meanwhile none."""
    used_s = 0.0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            used_s += times.user + times.system
    return used_s


def measure_ours(folder: Path, num_trials: int, trial_s: float, slots: int) -> Values:
    from orchestrator.optuna_study import OptunaStudy, Sampling
    from orchestrator.ray_pool import RayPool

    _start_ray(slots)
    sweep = _Sweep(folder, num_trials, trial_s)
    called_s, cpu_before_s = time.time(), time.process_time()
    study = OptunaStudy(
        name="bench", storage_url=_storage(folder), space=SPACE, sampling=Sampling(startup_trials=STARTUP_TRIALS)
    )
    pool = RayPool(sweep.setup, num_workers=slots)
    driver = sweep.driver(study, pool)
    while driver.step(timeout_s=0.25):
        pass
    returned_s, cpu_s = time.time(), time.process_time() - cpu_before_s
    pool.close()
    best = max(record.value for record in study.records() if record.value is not None)
    return {
        **_times([(row["began_s"], row["ended_s"]) for row in sweep.finished], trial_s, slots, called_s, returned_s),
        "driver_cpu_ms_per_trial": 1000 * cpu_s / num_trials,
        "best": best,
    }


def measure_tune(
    folder: Path, num_trials: int, trial_s: float, slots: int, max_concurrent_trials: int | None = None
) -> Values:
    """Ray Tune at its quickest: actors reused, no loggers, no output, the study in memory."""
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    from optuna.samplers import TPESampler
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    class TuneTrial(tune.Trainable):  # a class, since actors that run functions are not reused
        def setup(self, config: dict[str, Any]) -> None:
            self._params = config

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self._params = new_config
            return True

        def step(self) -> dict[str, Any]:
            began_s = time.time()
            time.sleep(self._params["trial_s"])
            return {"score": score(self._params), "began_s": began_s, "ended_s": time.time(), "done": True}

        def save_checkpoint(self, checkpoint_dir: str) -> None:  # without it Tune fails each trial at its end
            pass

        def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
            pass

    _start_ray(slots)
    search = OptunaSearch(
        metric="score",
        mode="max",
        sampler=TPESampler(seed=0, n_startup_trials=STARTUP_TRIALS, multivariate=True, constant_liar=True),
    )
    called_s, cpu_before_s = time.time(), time.process_time()
    tuner = tune.Tuner(
        tune.with_resources(TuneTrial, {"cpu": 1}),
        param_space={**{name: tune.uniform(0.0, 1.0) for name in NAMES}, "trial_s": trial_s},
        tune_config=tune.TuneConfig(
            metric="score",
            mode="max",
            num_samples=num_trials,
            search_alg=search,
            max_concurrent_trials=max_concurrent_trials or slots,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            storage_path=str(folder), verbose=0, checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False)
        ),
    )
    results = tuner.fit()
    returned_s, cpu_s = time.time(), time.process_time() - cpu_before_s
    rows = [result.metrics for result in results if result.metrics]
    assert len(rows) == num_trials, f"{len(rows)} of {num_trials} trials have results"
    assert not results.errors, results.errors[0]
    return {
        **_times([(row["began_s"], row["ended_s"]) for row in rows], trial_s, slots, called_s, returned_s),
        "driver_cpu_ms_per_trial": 1000 * cpu_s / num_trials,
        "best": max(row["score"] for row in rows),
    }


def _times(
    spans: Sequence[tuple[float, float]], trial_s: float, slots: int, called_s: float, returned_s: float
) -> Values:
    """The k-th beginning after the first ``slots`` follows upon the k-th end: what lies between is the hand-over."""
    ideal_s = math.ceil(len(spans) / slots) * trial_s
    begins, ends = sorted(begin for begin, _ in spans), sorted(end for _, end in spans)
    gaps = sorted(begin - end for begin, end in zip(begins[slots:], ends, strict=False))
    return {
        "num_trials": len(spans),
        "ideal_s": ideal_s,
        "wall_s": returned_s - called_s,
        "startup_s": begins[slots - 1] - called_s,
        "at_work_s": ends[-1] - begins[0],
        "handover_p50_ms": 1000 * gaps[len(gaps) // 2],
        "handover_p99_ms": 1000 * gaps[int(0.99 * len(gaps))],
    }


def measure_memory(folder: Path, num_trials: int, num_workers: int) -> Values:
    """The driver's CPU time and memory over many trials that fake workers finish at once, with a study on the disk.

    The sampler is random: TPE's own model of ten thousand trials is none of the orchestrator's.
    """
    from orchestrator.optuna_study import OptunaStudy, Sampling

    sweep = _Sweep(folder, num_trials, 0.0)
    study = OptunaStudy(name="bench", storage_url=_storage(folder), space=SPACE, sampling=Sampling(kind="random"))
    finished = 0

    def on_event(event: SweepEvent) -> None:
        nonlocal finished
        if isinstance(event, RunFinished):
            finished += 1

    sweep.on_event = on_event  # type: ignore[method-assign]
    driver = sweep.driver(study, FinishingPool(num_workers))
    values: Values = {}
    due, last_cpu_s, last_s = num_trials // 10, time.process_time(), time.time()
    while driver.step(timeout_s=0.25):
        if finished >= due:
            cpu_s, now_s = time.process_time(), time.time()
            values[f"rss_mb_{due}"] = _rss_mb()
            values[f"cpu_ms_per_trial_{due}"] = 1000 * (cpu_s - last_cpu_s) / (num_trials // 10)
            values[f"ms_per_trial_{due}"] = 1000 * (now_s - last_s) / (num_trials // 10)
            due, last_cpu_s, last_s = due + num_trials // 10, cpu_s, now_s
    return values


def measure_optuna(folder: Path, num_trials: int) -> Values:
    """As many trials of Optuna alone, in memory: asked for, sampled at random and told, and nothing else."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0), direction="maximize")
    values: Values = {}
    due, last_cpu_s = num_trials // 10, time.process_time()
    for number in range(1, num_trials + 1):
        trial = study.ask()
        study.tell(trial, score({name: trial.suggest_float(name, 0.0, 1.0) for name in NAMES}))
        if number >= due:
            cpu_s = time.process_time()
            values[f"rss_mb_{due}"] = _rss_mb()
            values[f"cpu_ms_per_trial_{due}"] = 1000 * (cpu_s - last_cpu_s) / (num_trials // 10)
            due, last_cpu_s = due + num_trials // 10, cpu_s
    return values


def measure_tpe(folder: Path, num_trials: int, slots: int) -> Values:
    """What the sampler of the comparison costs by itself: so many trials of Optuna in memory, ``slots`` at a time."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            seed=0, n_startup_trials=STARTUP_TRIALS, multivariate=True, constant_liar=True
        )
    study = optuna.create_study(sampler=sampler, direction="maximize")
    underway: deque[optuna.Trial] = deque()
    cpu_s, began_s = time.process_time(), time.monotonic()
    for _ in range(num_trials):
        if len(underway) == slots:
            study.tell(trial := underway.popleft(), score(trial.params))
        underway.append(trial := study.ask())
        for name in NAMES:
            trial.suggest_float(name, 0.0, 1.0)
    cpu_s, took_s = time.process_time() - cpu_s, time.monotonic() - began_s
    return {"cpu_ms_per_trial": 1000 * cpu_s / num_trials, "trials_per_s": num_trials / took_s}


class FinishingPool:
    """Workers that finish a run as soon as they are asked, without processes."""

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._leases: list[Lease] = []

    @property
    def num_workers(self) -> int:
        return self._num_workers

    @property
    def num_idle(self) -> int:
        return self._num_workers - len(self._leases)

    @property
    def num_soon_idle(self) -> int:
        return 0

    def submit(self, lease: Lease) -> None:
        self._leases.append(lease)

    def poll(self, timeout_s: float) -> Sequence[Event]:
        finished, self._leases = self._leases, []
        return [RunFinished(lease=lease, metrics={METRIC: score(lease.spec.config)}) for lease in finished]

    def cancel(self, lease: Lease) -> None:
        pass

    def avoid(self, node: str) -> bool:
        return False

    def close(self) -> None:
        pass


def _rss_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


class ReportingPool:
    """Workers that report once a second, each at its own moment, without processes and without end.

    Every so many reports of a worker have the metric that it is judged by, ``METRIC``; they began at different times.
    """

    def __init__(self, num_workers: int, evaluate_every: int = 1) -> None:
        self._num_workers, self._evaluate_every = num_workers, evaluate_every
        self._leases: list[Lease] = []
        self._began_s = time.monotonic()
        self._num_told = 0

    @property
    def num_workers(self) -> int:
        return self._num_workers

    @property
    def num_idle(self) -> int:
        return self._num_workers - len(self._leases)

    @property
    def num_soon_idle(self) -> int:
        return 0

    def submit(self, lease: Lease) -> None:
        self._leases.append(lease)
        self._began_s, self._num_told = time.monotonic(), 0

    def poll(self, timeout_s: float) -> Sequence[Event]:
        if self.num_idle == 0 and timeout_s > 0:
            time.sleep(0.01)  # what Ray would have gathered meanwhile: ten reports
        num_due = int((time.monotonic() - self._began_s) * self._num_workers) if not self.num_idle else 0
        told = range(self._num_told, num_due)
        self._num_told = num_due
        return [self._report(*divmod(i, self._num_workers)) for i in told]

    def cancel(self, lease: Lease) -> None:
        pass

    def avoid(self, node: str) -> bool:
        return False

    def close(self) -> None:
        pass

    def _report(self, second: int, worker: int) -> RunProgressed:
        step = 1 + second + worker % self._evaluate_every
        metrics = {"train/loss": 1.0, "train/reward": 2.0, "train/step": float(step)}
        if step % self._evaluate_every == 0:
            metrics[METRIC] = 2.0 + math.sin(step)
        return RunProgressed(lease=self._leases[worker], step=step, num_steps=10**6, metrics=metrics)


def measure_reports(folder: Path, num_workers: int, seconds: float) -> Values:
    """The driver's share of a core while so many workers report once a second each, and that of the fake workers."""
    study = MemoryStudy(lambda number: dict.fromkeys(NAMES, 0.5))
    return _measure_reports(folder, study, ReportingPool(num_workers), seconds)


def measure_pruned_reports(folder: Path, num_workers: int, seconds: float, evaluate_every: int) -> Values:
    """The same with a median pruner that compares each evaluation with those of 200 trials; it prunes none."""
    import optuna

    from orchestrator.optuna_study import OptunaStudy, Sampling

    study = OptunaStudy(
        name="bench",
        storage_url=_storage(folder),
        space=SPACE,
        sampling=Sampling(kind="random"),
        pruning=MedianPruning(),
    )
    curve = {step: math.sin(step) for step in range(evaluate_every, 20 * evaluate_every, evaluate_every)}
    for _ in range(200):
        study._study.add_trial(optuna.trial.create_trial(value=0.0, intermediate_values=curve))
    pool = ReportingPool(num_workers, evaluate_every)
    return _measure_reports(folder, study, pool, seconds, Watch(curve_metric=METRIC))


def _measure_reports(
    folder: Path, study: Study, pool: ReportingPool, seconds: float, watch: Watch | None = None
) -> Values:
    sweep = _Sweep(folder, 10**6, 1.0)
    num_reports = itertools.count()

    def on_event(event: SweepEvent) -> None:
        if isinstance(event, RunProgressed):
            next(num_reports)

    sweep.on_event = on_event  # type: ignore[method-assign]
    driver = sweep.driver(study, pool, watch)
    while pool.num_idle:
        driver.step()
    began_s, cpu_s, before = time.monotonic(), time.process_time(), next(num_reports)
    while time.monotonic() < began_s + seconds:
        driver.step(timeout_s=0.25)
    took_s, cpu_s = time.monotonic() - began_s, time.process_time() - cpu_s
    alone_began_s, alone_cpu_s = time.monotonic(), time.process_time()
    while time.monotonic() < alone_began_s + seconds / 4:
        pool.poll(0.25)
    alone = (time.process_time() - alone_cpu_s) / (time.monotonic() - alone_began_s)
    return {
        "reports_per_s": (next(num_reports) - before - 1) / took_s,
        "core_share": cpu_s / took_s,
        "core_share_of_fakes": alone,
        "num_untold": len(driver._to_tell),
    }


def measure_ray_reports(folder: Path, slots: int, seconds: float, chunk_s: float) -> Values:
    """What a report costs the driver when it really comes through Ray, from workers whose chunks take ``chunk_s``."""
    from orchestrator.ray_pool import RayPool

    _start_ray(slots)
    sweep = _Sweep(folder, slots, chunk_s, num_chunks=10**9)
    num_reports = itertools.count()

    def on_event(event: SweepEvent) -> None:
        if isinstance(event, RunProgressed):
            next(num_reports)

    sweep.on_event = on_event  # type: ignore[method-assign]
    pool = RayPool(sweep.setup, num_workers=slots)
    driver = sweep.driver(MemoryStudy(lambda number: dict.fromkeys(NAMES, 0.5)), pool)
    while next(num_reports) < 10 * slots:
        driver.step(timeout_s=0.25)
    began_s, cpu_s, before = time.monotonic(), time.process_time(), next(num_reports)
    while time.monotonic() < began_s + seconds:
        driver.step(timeout_s=0.25)
    took_s, cpu_s, num = time.monotonic() - began_s, time.process_time() - cpu_s, next(num_reports) - before - 1
    pool.close()
    return {"reports_per_s": num / took_s, "core_share": cpu_s / took_s, "driver_cpu_ms_per_report": 1000 * cpu_s / num}
