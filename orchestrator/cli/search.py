"""The study of a sweep, opened for its driver: claimed, warm-started, and waited for while it does not answer."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import tenacity

from orchestrator import config
from orchestrator.config import Sweep
from orchestrator.errors import StudyMissingError, StudyUnavailableError, SweepAbortedError, UserError
from orchestrator.pruning import Watch, WilcoxonPruning
from orchestrator.study import TrialRecord
from orchestrator.warm_start import KnownPoint, known_points

if TYPE_CHECKING:
    from orchestrator.optuna_study import Claim, OptunaStudy

_log = logging.getLogger(__name__)

PATIENCE_S = 900.0  # that a study may be away before and after the sweep; while it runs, the driver goes on without
T = TypeVar("T")


@contextmanager
def open_study(sweep: Sweep) -> Iterator[OptunaStudy]:
    """A server that is away is waited for.

    Raises:
        UserError: the study cannot be opened, is another driver's, or cannot be warm-started.
        SweepAbortedError: its server stayed away.
    """
    with ExitStack() as stack:
        yield patiently(lambda: stack.enter_context(_opened(sweep)))


@contextmanager
def _opened(sweep: Sweep) -> Iterator[OptunaStudy]:
    """Raises:
    UserError: as above.
    StudyUnavailableError: the study's server, or that of the one to learn from, is away.
    """
    from orchestrator.optuna_study import answered, claim_study, exists

    with ExitStack() as stack:
        try:
            if _has_runs(sweep) and not exists(sweep.storage_url):
                raise StudyMissingError(sweep.config.name)
            granted = claim_study(sweep.storage_url, sweep.config.name, shared=sweep.config.share_study)
            claim = stack.enter_context(granted)
            if claim is None:
                raise UserError(
                    f"the study {sweep.config.name} in {sweep.shown_storage} is another driver's",
                    file=sweep.source,
                    key="storage",
                    remedy="wait for it, use another `name`, or on PostgreSQL let both set share_study=true",
                )
            study = stack.enter_context(closing(answered(partial(_open, sweep, claim))))
        except StudyMissingError:
            raise UserError(
                f"{sweep.output} holds runs, but {sweep.shown_storage} has no study {sweep.config.name} of them",
                file=sweep.source,
                key="storage",
                remedy="give the storage that has it, or another `output` to begin again",
            ) from None
        except ValueError as error:
            raise UserError(str(error), file=sweep.source, key="storage") from None
        yield study


def _has_runs(sweep: Sweep) -> bool:
    return any((sweep.output / "runs").glob("*/spec.json"))


def _open(sweep: Sweep, claim: Claim) -> OptunaStudy:
    from orchestrator.optuna_study import OptunaStudy, Sampling

    search = sweep.config.search
    return OptunaStudy(
        name=sweep.config.name,
        storage_url=sweep.storage_url,
        space=sweep.space,
        directions=["maximize" if goal.maximize else "minimize" for goal in sweep.goals],
        sampling=Sampling(
            kind="grid" if sweep.walks_a_grid else search.sampler,
            seed=search.seed,
            startup_trials=search.startup_trials,
            population_size=search.population_size,
        ),
        pruning=search.pruning,
        num_steps=sweep.experiment["optimization"]["num_steps"],
        start=search.start,
        known=partial(_known_points, sweep),
        owner=config.output_id(sweep),
        shared=sweep.config.share_study,
        claim=claim,
        fingerprint=sweep.fingerprint(),
        must_exist=_has_runs(sweep),
    )


def watch(sweep: Sweep) -> Watch:
    """What the study must hear to prune."""
    pairs_runs = isinstance(sweep.config.search.pruning, WilcoxonPruning)
    return Watch(curve_metric=sweep.curve_metric, pairs_runs=pairs_runs)


def patiently(call: Callable[[], T], *, sleep: Callable[[float], None] = time.sleep) -> T:
    """What the study answers, however long it takes within reason; the first time that it does not is told.

    Raises:
        SweepAbortedError: it stayed silent.
    """
    retry = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(StudyUnavailableError),
        wait=tenacity.wait_exponential(multiplier=0.5, max=15),
        stop=tenacity.stop_after_delay(PATIENCE_S),
        before_sleep=_tell_of_the_first,
        sleep=sleep,
        reraise=True,
    )
    try:
        return retry(call)
    except StudyUnavailableError as error:
        raise SweepAbortedError(f"{error}; nothing is lost: give the same command again when it is back") from None


def _tell_of_the_first(attempt: tenacity.RetryCallState) -> None:
    if attempt.attempt_number == 1 and attempt.outcome is not None:
        _log.warning("%s; trying again for up to %.0f minutes", attempt.outcome.exception(), PATIENCE_S / 60)


def read_records(sweep: Sweep) -> Sequence[TrialRecord]:
    """The trials so far, without disturbing the driver."""
    from orchestrator.optuna_study import answered, read_records

    try:
        return answered(lambda: read_records(name=sweep.config.name, storage_url=sweep.storage_url))
    except (ValueError, StudyUnavailableError) as error:
        raise UserError(str(error), file=sweep.source, key="storage") from None


def _known_points(sweep: Sweep) -> list[KnownPoint]:
    """The points of the study that `search.warm_start` names."""
    from orchestrator.optuna_study import read_records

    source = sweep.config.search.warm_start
    if source.output is not None:
        other = config.load_output(Path(source.output))
        url, name = other.storage_url, other.config.name
    elif source.storage is not None and source.name is not None:
        url, name = source.storage, source.name
    else:
        return []
    try:
        records = read_records(name=name, storage_url=url)
    except ValueError as error:
        raise UserError(str(error), file=sweep.source, key="search.warm_start") from None
    points = known_points(records, source=name, space=sweep.space, goals=sweep.goals, bounds=sweep.bounds)
    if not points:
        metrics = ", ".join([*(goal.name for goal in sweep.goals), *(bound.name for bound in sweep.bounds)])
        problem = (
            f"none of the {len(records)} trials of {name} is complete, lies in this search.space and has {metrics}"
        )
        raise UserError(problem, file=sweep.source, key="search.warm_start")
    return points
