"""`psd sweep` and `psd resume`: check everything, start the workers, drive the sweep, say what came out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from rich.console import Console

from orchestrator import config, durable
from orchestrator.budget import Spent
from orchestrator.checkpoints import CheckpointStore, DirectoryCheckpoints
from orchestrator.cli.display import Display, SweepView, choose_display
from orchestrator.cli.interrupt import Interrupt, withdraw_stop
from orchestrator.cli.live import LiveSettings, make_budget
from orchestrator.cli.outcome import best_command, other_metrics, typed, where_to_look
from orchestrator.cli.search import open_study, patiently, watch
from orchestrator.clock import SystemClock
from orchestrator.config import Sweep
from orchestrator.driver import Stopped, SweepDriver
from orchestrator.errors import UserError
from orchestrator.experiment_config.experiment import experiment
from orchestrator.fsspec_checkpoints import FsspecCheckpoints
from orchestrator.pool import Pool
from orchestrator.psd_inputs import check_inputs
from orchestrator.psd_objective.worker_side import make_objective, measure_memory
from orchestrator.report.tables import as_overrides, best_rows, best_yaml, terminal_table, trial_rows, trials_csv
from orchestrator.schema import ConfigError, join
from orchestrator.study import Study, TrialRecord, num_ended, unfinished
from orchestrator.sweep_lock import HeldError, held
from orchestrator.tracking import Tracker, track_nothing
from orchestrator.trial import RunSpec
from orchestrator.worker import WorkerSetup

if TYPE_CHECKING:
    from orchestrator.ray_pool import RayPool

FAILED, INTERRUPTED = 1, 130
SPENT_FILE, SAVE_SPENT_S = "spent.json", 20.0
_MAX_NAMED = 5  # runs in a line
STOP_TIMEOUT_S = 18.0  # for the checkpoints of a clean stop: with what the pool takes to close, half a minute


def sweep_command(file: Path, overrides: Sequence[str], *, dry_run: bool) -> int:
    sweep = config.load(file, overrides)
    check(sweep)
    if dry_run:
        print_plan(sweep, Console())
        return 0
    return run_sweep(sweep, Console())


def resume_command(output: Path, overrides: Sequence[str], *, retry_failed: bool) -> int:
    sweep = config.load_output(output, overrides)
    check(sweep)
    if sweep.is_asset:
        from orchestrator.cli.asset import make_asset

        return make_asset(sweep, Console())  # which goes on in any case
    return run_sweep(sweep, Console(), retry_failed=retry_failed)


def check(sweep: Sweep) -> None:
    """All that can be known to be wrong before anything starts.

    Raises:
        UserError: with the file, the key, and what would be right.
    """
    for prefix, settings in config.experiments(sweep).items():
        try:
            check_inputs(experiment(settings), sweep.config.prompts)
        except ConfigError as error:
            raise UserError(error.message, file=sweep.source, key=join(prefix, error.key)) from None
    location = sweep.config.checkpoints.location
    try:
        if location is not None:
            FsspecCheckpoints(_url(location))
    except ValueError as error:
        raise UserError(str(error), file=sweep.source, key="checkpoints.location") from None
    unset = [name for name in sweep.config.worker.env if name not in os.environ]
    if unset:
        remedy = "set it, or leave it out"
        raise UserError(f"{', '.join(unset)} is not set here", file=sweep.source, key="worker.env", remedy=remedy)
    config.check_output(sweep)


def print_plan(sweep: Sweep, console: Console) -> None:
    """The resolved configuration as YAML, and below it, as comments, what would run."""
    settings = sweep.config
    trials, prompts, seeds = sweep.num_trials, len(settings.prompts), len(settings.seeds)
    num_steps = sweep.experiment["optimization"]["num_steps"]
    lines = [
        f"{_count(trials, 'trial')} x {_count(prompts * seeds, 'run')} "
        f"({_count(prompts, 'prompt')} x {_count(seeds, 'seed')}) of {num_steps} steps",
        f"{', '.join(map(str, sweep.goals))}, the mean over a trial's runs",
        *(f"keep {bound}" for bound in sweep.bounds),
        *_plan_of_search(sweep),
        f"into {sweep.output}, study {sweep.shown_storage}",
    ]
    text = yaml.safe_dump(sweep.to_plain(), sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
    console.print(
        text + "".join(f"# {line}\n" for line in lines), markup=False, highlight=False, soft_wrap=True, end=""
    )


def _plan_of_search(sweep: Sweep) -> list[str]:
    if not sweep.config.search.variants:
        conditions = sweep.space.conditions
        return [
            f"search {name}: {domain}" + (f", {conditions[name]}" if name in conditions else "")
            for name, domain in sweep.space.domains.items()
        ]
    settings = {name: config.own_settings(sweep, {config.VARIANT: name}) for name in sweep.config.search.variants}
    return [f"variant {name}: {as_overrides(own) or 'as it stands above'}" for name, own in settings.items()]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def run_sweep(asked: Sweep, console: Console, *, retry_failed: bool = False) -> int:
    """The exit status."""
    with hold(asked):
        goes_on = config.holds(asked)
        sweep = config.as_held(asked) if goes_on else config.claim_output(asked)
        with open_study(sweep) as study:
            sweep = config.claim_output(asked)  # what is new in it is kept once the study could be opened
            if retry_failed:
                patiently(study.retry_failed)
            records = patiently(study.records)
            _greet(sweep, records if goes_on else [], console)
            over = _is_over(sweep, records)
            stopped = None if over else _drive(sweep, study, console)
            records = patiently(study.records)
            conclude(sweep, records, console)
        if stopped is None and not over:
            _track_trials(sweep, records, console)
    if stopped is not None:
        text = f"\n{_what_is_kept(stopped)}. Go on with:  {typed('psd')} resume {sweep.output}"
        console.print(text, highlight=False, soft_wrap=True)
        return INTERRUPTED
    return 0 if any(record.state == "complete" for record in records) else FAILED


def _what_is_kept(stopped: Stopped) -> str:
    if not stopped.unsaved:
        return "Stopped; what is checkpointed is kept"
    num_more = len(stopped.unsaved) - _MAX_NAMED
    return (
        f"Stopped; {len(stopped.unsaved)} of {_count(stopped.num_runs, 'run')} could not be checkpointed in time: "
        f"{', '.join(stopped.unsaved[:_MAX_NAMED])}{f' and {num_more} more' if num_more > 0 else ''}; "
        "what is not checkpointed is computed again"
    )


def _track_trials(sweep: Sweep, records: Sequence[TrialRecord], console: Console) -> None:
    if sweep.config.tracking.kind == "none":
        return
    from orchestrator.cli.tracked_trials import track_trials
    from orchestrator.wandb_tracking import WandbTracking

    tracking = make_tracking(sweep)
    assert isinstance(tracking, WandbTracking)
    if not track_trials(sweep, records, tracking):
        again = f"{typed('psd')} sync {sweep.output}"
        console.print(f"\nW&B has not got the table of trials. Upload it with:  {again}", soft_wrap=True)


@contextmanager
def hold(sweep: Sweep) -> Iterator[None]:
    """Keep a second driver out of the output folder.

    Raises:
        UserError: there is one, and who it is; or the folder cannot be written to.
    """
    with ExitStack() as stack:
        try:
            sweep.output.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(sweep.output))
            withdraw_stop(sweep.output)
        except HeldError as error:
            raise UserError(
                f"{sweep.output} is being worked on by {error.holder or 'another process'}",
                file=sweep.source,
                key="output",
                remedy=f"see how far it is: psd status {sweep.output}",
            ) from None
        except OSError as error:
            raise UserError(
                f"cannot write to {sweep.output}: {error.strerror}", file=sweep.source, key="output"
            ) from None
        yield


def worker_setup(sweep: Sweep) -> WorkerSetup:
    runs = sweep.output.resolve() / "runs"
    return WorkerSetup(
        objective=make_objective,
        runs=runs,
        checkpoints=checkpoint_store(sweep),
        tracker=make_tracking(sweep),
        checkpoint_every=sweep.config.checkpoint_every,
        memory_bytes=measure_memory,
    )


def checkpoint_store(sweep: Sweep) -> CheckpointStore:
    """Where the runs of a claimed output folder keep their checkpoints."""
    settings = sweep.config.checkpoints
    if settings.location is None:
        return DirectoryCheckpoints(sweep.output.resolve() / "runs", keep=settings.keep)
    folder = f"{sweep.config.name}-{config.output_id(sweep)}"  # of this sweep's own, whoever else uses the place
    return FsspecCheckpoints(f"{_url(settings.location)}/{folder}", keep=settings.keep)


def _url(location: str) -> str:
    return location.rstrip("/") if "://" in location else f"file://{Path(location).resolve()}"


def make_tracking(sweep: Sweep) -> Callable[[RunSpec, Path], Tracker]:
    settings = sweep.config.tracking
    match settings.kind:
        case "none":
            return track_nothing
        case "wandb":
            from orchestrator.wandb_tracking import WandbTracking, resolve_mode

            return WandbTracking(
                group=sweep.config.name,
                job_type="variant" if sweep.config.search.variants else "trial",
                project=settings.project,
                entity=settings.entity,
                mode=resolve_mode(settings.mode),  # here: a worker may find a key of its own, or none
                folder=sweep.output.resolve(),
            )


def _worker_env(sweep: Sweep) -> dict[str, str]:
    """What workers are told of this process's environment: W&B's login, and what `worker.env` names."""
    named = {name: os.environ[name] for name in sweep.config.worker.env}
    if sweep.config.tracking.kind != "wandb":
        return named
    from orchestrator.wandb_tracking import login

    return {**login(), **named}


def _tracking_lines(sweep: Sweep) -> list[str]:
    settings = sweep.config.tracking
    if settings.kind != "wandb":
        return []
    from orchestrator.wandb_tracking import resolve_key, resolve_mode

    if resolve_mode(settings.mode) == "online":
        return [f"W&B: online, project {settings.project}"]
    return ["W&B: offline" + (", since there is no key here" if resolve_key() is None else "")]


def _drive(sweep: Sweep, study: Study, console: Console) -> Stopped | None:
    """What became of the runs under way when the sweep was interrupted; None if it came to its end."""
    setup, clock = worker_setup(sweep), SystemClock()
    view = _view(sweep, patiently(study.records), clock)
    interrupt = Interrupt(sweep.output)
    with _workers(sweep, setup) as pool:
        console.print("\n".join([_count(pool.num_workers, "worker"), *_tracking_lines(sweep)]), highlight=False)
        with interrupt.caught(), choose_display(view, console) as display:  # after Ray, which handles SIGTERM, too
            driver = _driver(sweep, study, pool, setup, clock, display)
            try:
                stopped = _loop(sweep, driver, pool, view, display, interrupt)
            finally:
                _save_spent(driver, sweep)
        if view.ended_by is not None:
            console.print(f"Ended before {_count(view.num_trials, 'trial')}: {view.ended_by}", highlight=False)
    return stopped


@contextmanager
def _workers(sweep: Sweep, setup: WorkerSetup) -> Iterator[RayPool]:
    """The workers of a sweep, closed by whatever ends it: what is still under way then goes, its trackers are closed.

    At once where somebody is impatient, but not without taking back what the autoscaler was asked for.
    """
    from orchestrator.ray_pool import RayPool

    settings = sweep.config
    try:
        pool = RayPool(
            setup,
            num_workers=settings.workers or "auto",
            shape=settings.worker,
            most_useful=_num_runs(sweep),
            address=ray_address(),
            deadlines=settings.failures.deadlines(),
            wear=settings.failures.wear(),
            worker_env=_worker_env(sweep),
        )
    except UserError as error:
        source = sweep.source if error.key else None
        raise UserError(error.problem, file=source, key=error.key, remedy=error.remedy) from None
    timeout_s = None
    try:
        yield pool
    except KeyboardInterrupt:
        timeout_s = 0.0
        raise
    finally:
        pool.close(timeout_s)


def ray_address() -> str | None:
    """The cluster that `RAY_ADDRESS` names, as Ray's own commands understand it; None: this machine alone.

    Raises:
        UserError: an address for clients outside the cluster, which could neither place workers nor read their files.
    """
    address = os.environ.get("RAY_ADDRESS", "").strip()
    if "://" in address:
        raise UserError(
            f"RAY_ADDRESS={address} leads into a cluster from outside; a sweep is driven from one of its nodes",
            remedy="use `ray submit` or `ray job submit` (docs/clusters.md), or unset RAY_ADDRESS to stay here",
        )
    return address if address not in ("", "local") else None


def _loop(
    sweep: Sweep, driver: SweepDriver, pool: RayPool, view: SweepView, display: Display, interrupt: Interrupt
) -> Stopped | None:
    live, saved_s, stopped = LiveSettings(sweep), time.monotonic(), None
    while not interrupt.requested:
        display.tick()
        if (changed := live.changed()) is not None:
            driver.budget, view.num_trials = make_budget(changed), changed.num_trials
            pool.resize(changed.config.workers or "auto", _num_runs(changed))
        if time.monotonic() - saved_s >= SAVE_SPENT_S:
            _save_spent(driver, sweep)
            saved_s = time.monotonic()
        if not driver.step(timeout_s=0.25):
            break
    else:
        pool.withdraw_wish()  # before anything that takes time: whoever asks for a stop may kill within seconds
        view.stopping = True
        display.tick()
        stopped = driver.stop(STOP_TIMEOUT_S)
    if driver.is_done and view.counts.total() < view.num_trials:
        view.ended_by = driver.stop_reason
    display.tick()
    return None if driver.is_done else stopped


def _save_spent(driver: SweepDriver, sweep: Sweep) -> None:
    with suppress(OSError):  # a full disk: what is not written down is not counted by the next sitting
        driver.spent.save(sweep.output / SPENT_FILE)


def _num_runs(sweep: Sweep) -> int:
    return sweep.num_trials * len(sweep.config.prompts) * len(sweep.config.seeds)


def _driver(
    sweep: Sweep, study: Study, pool: Pool, setup: WorkerSetup, clock: SystemClock, display: Display
) -> SweepDriver:
    return SweepDriver(
        study=study,
        pool=pool,
        planner=lambda suggestion: config.plan_trial(sweep, suggestion),
        goals=sweep.goals,
        bounds=sweep.bounds,
        watch=watch(sweep),
        runs=setup.runs,
        checkpoints=setup.checkpoints,
        failure_policy=sweep.config.failures.policy(),
        budget=make_budget(sweep),
        spent=Spent.load(sweep.output / SPENT_FILE),
        clock=clock,
        on_event=display.on_event,
        keeps_checkpoints=not sweep.config.checkpoints.remove_finished,
    )


def _view(sweep: Sweep, records: Sequence[TrialRecord], clock: SystemClock) -> SweepView:
    settings = sweep.config
    return SweepView(
        name=settings.name,
        goals=sweep.goals,
        num_trials=sweep.num_trials,
        runs_per_trial=len(settings.prompts) * len(settings.seeds),
        records=records,
        clock=clock,
    )


def _is_over(sweep: Sweep, records: Sequence[TrialRecord]) -> bool:
    return num_ended(records) >= sweep.num_trials and not unfinished(records)


def _greet(sweep: Sweep, records: Sequence[TrialRecord], console: Console) -> None:
    settings = sweep.config
    runs = len(settings.prompts) * len(settings.seeds)
    text = f"[bold]{settings.name}[/bold]: {_count(sweep.num_trials, 'trial')} of {_count(runs, 'run')}"
    console.print(f"{text}, {', '.join(map(str, sweep.goals))}, into {sweep.output}", highlight=False)
    ended = num_ended(records)
    if _is_over(sweep, records):
        more = f"{typed('psd')} resume {sweep.output} trials={2 * ended}"
        console.print(f"All is done. For more trials:  {more}", highlight=False, soft_wrap=True)
    elif records:
        left = len(records) - ended
        console.print(f"Going on: {_count(ended, 'trial')} done, {left} under way.", highlight=False)


def conclude(sweep: Sweep, records: Sequence[TrialRecord], console: Console) -> None:
    """The table of trials, the best settings, and where to look; also trials.csv, best.yaml and report.html."""
    rows = trial_rows(records, sweep.goals)
    if rows:
        console.print()
        console.print(terminal_table(rows, sweep.goals, other_metrics(sweep), width=console.width))
    best = best_rows(rows)
    try:
        _write_results(sweep, records)
    except OSError as error:  # a full disk: the study has it all
        again = f"{typed('psd')} resume {sweep.output}"
        text = f"The results could not be written ({error}). Again, when there is room:  {again}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    lines = where_to_look(sweep)
    if any(record.state == "failed" for record in records):
        lines.insert(0, ("try again", f"{typed('psd')} resume {sweep.output} --retry-failed"))
    if best and best[0].params:
        lines.insert(0, ("try the best", best_command(sweep, best[0])))
    console.print()
    for name, text in lines:
        console.print(f"{name:<14}{text}", highlight=False, markup=False, soft_wrap=True)


def _write_results(sweep: Sweep, records: Sequence[TrialRecord]) -> None:
    from orchestrator.cli.report import write_report  # with plotly

    rows = trial_rows(records, sweep.goals)
    durable.write_text(sweep.output / "trials.csv", trials_csv(rows))
    if best := best_rows(rows):
        own = [(row, config.own_settings(sweep, row.params)) for row in best]
        durable.write_text(sweep.output / "best.yaml", best_yaml(own, sweep=sweep.config.name, goals=sweep.goals))
    write_report(sweep, records)
