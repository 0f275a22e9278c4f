"""A sweep: its settings, as typed and checked values, with the experiment that it varies."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from orchestrator.config.durability import CheckpointsConfig, FailuresConfig
from orchestrator.experiment_config.experiment import experiment
from orchestrator.goals import Bound, Goal
from orchestrator.placement import WorkerShape
from orchestrator.pruning import NoPruning, Pruning, WilcoxonPruning
from orchestrator.schema import ConfigError, Count, Positive, Range, WholeNumber
from orchestrator.search_space import SearchSpace
from orchestrator.settings import leaves, nest, plain_mapping
from orchestrator.storage_url import OF_FILES, without_password
from orchestrator.trial import Scalar

Direction = Literal["maximize", "minimize"]
Seed = Annotated[int, Range(low=0, high=2**63 - 1)]
PopulationSize = Annotated[int, Range(low=2)]
VARIANT = "variant"  # the one parameter of a trial in a sweep of named variants
DEFAULT_TRIALS = 12
# What may change between two starts of one sweep; everything else defines it. None of it is a run's, which would be
# another run with it.
CHANGEABLE = (
    "trials",
    "budget",
    "workers",
    "worker",
    "tracking",
    "storage",
    "share_study",
    "output",
    "checkpoint_every",
    "checkpoints",
    "failures",
)
LIVE = ("trials", "budget.hours", "budget.gpu_hours", "budget.patience", "workers")  # also while the sweep runs


@dataclass(frozen=True, kw_only=True)
class BoundConfig:
    min: float | None = None
    max: float | None = None

    def __post_init__(self) -> None:
        if self.min is None and self.max is None:
            raise ConfigError("", "must have min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ConfigError("min", f"must be <= max ({self.max:g}); got {self.min:g}")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    metric: str = "judge"
    direction: Direction = "maximize"
    against: dict[str, Direction] = field(default_factory=dict)
    constraints: dict[str, BoundConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.metric in self.against:
            raise ConfigError("against", f"must name other metrics than objective.metric ({self.metric})")


@dataclass(frozen=True, kw_only=True)
class WarmStartConfig:
    """Another study to learn from: a sweep's output folder, or any Optuna study by storage and name."""

    output: str | None = None
    storage: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.output is not None and (self.storage is not None or self.name is not None):
            raise ConfigError("output", "stands for storage and name; give it alone, or those two")
        if (self.storage is None) != (self.name is None):
            missing = "storage" if self.storage is None else "name"
            raise ConfigError(missing, "is missing; a study is found by its storage and its name")


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    sampler: Literal["tpe", "gp", "cmaes", "nsga2", "nsga3", "qmc", "random", "grid"] = "tpe"
    seed: WholeNumber = 0
    startup_trials: WholeNumber = 6
    population_size: PopulationSize = 20
    start: tuple[dict[str, Any], ...] = ()
    space: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    pruning: Pruning = NoPruning()
    warm_start: WarmStartConfig = WarmStartConfig()

    def __post_init__(self) -> None:
        fixed = "variants" if self.variants else "sampler" if self.sampler == "grid" else None
        if self.variants and self.space:
            raise ConfigError("variants", "cannot be combined with search.space: each variant is one trial")
        if fixed is not None:
            for key, given in (("start", self.start), ("warm_start", self.warm_start != WarmStartConfig())):
                if given:
                    why = "each variant is one trial" if self.variants else "a grid has an order of its own"
                    raise ConfigError(fixed, f"cannot be combined with search.{key}: {why}")


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """When no further trial is begun, besides the number of trials. Over all sittings of this output folder."""

    hours: Positive | None = None  # of the driver
    gpu_hours: Positive | None = None  # that workers spent on runs, without GPUs worker-hours
    patience: Count | None = None  # trials that ended since the last one that improved on those before


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    kind: Literal["wandb", "none"] = "wandb"
    project: str = "psd-sweeps"
    entity: str | None = None
    mode: Literal["auto", "online", "offline"] = "auto"


@dataclass(frozen=True, kw_only=True)
class WorkerConfig(WorkerShape):
    """What a worker holds, and the names of what it is told of the driver's environment; values stand in no file."""

    env: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for i, name in enumerate(self.env):
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                named = name.partition("=")[0]
                raise ConfigError(
                    f"env[{i}]", f"must be a variable's name alone, whose value is set here; got {named}…"
                )


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A checked sweep. ``experiment`` holds plain values with every default filled in; ``space`` its searched keys."""

    name: str
    objective: ObjectiveConfig = ObjectiveConfig()
    search: SearchConfig = SearchConfig()
    prompts: tuple[str, ...]
    seeds: tuple[Seed, ...] = (0,)
    trials: Count | None = None
    budget: BudgetConfig = BudgetConfig()
    workers: Count | None = None
    worker: WorkerConfig = WorkerConfig()
    output: str
    storage: str | None = None
    share_study: bool = False
    tracking: TrackingConfig = TrackingConfig()
    failures: FailuresConfig = FailuresConfig()
    checkpoint_every: Count = 50  # steps; each experiment has its own
    checkpoints: CheckpointsConfig = CheckpointsConfig()

    def __post_init__(self) -> None:
        for name in ("prompts", "seeds"):
            values = getattr(self, name)
            if not values:
                raise ConfigError(name, "must list at least one")
            if len(set(values)) < len(values):
                raise ConfigError(name, f"must list each once; got {list(values)}")
        if not self.name.strip() or not self.name.isprintable() or set(self.name) & set("/\\") or self.name[0] == ".":
            raise ConfigError("name", f"must be text without slashes and without a dot at its start; got {self.name!r}")
        if not self.output.strip():
            raise ConfigError("output", "must name a folder; got empty text")
        if not all(self.prompts):
            raise ConfigError("prompts", "must not be empty text")


def live_settings(plain: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in leaves(plain) if key in LIVE}


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep and the experiment it varies, both checked, with where they came from."""

    config: SweepConfig
    experiment: Mapping[str, Any]  # plain YAML values, every default filled in
    space: SearchSpace
    source: str
    is_asset: bool = False  # made by `psd run`: one run, no search and no study
    recorded: Mapping[str, Any] | None = None  # what its output folder held of LIVE, if it was read from there

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    @property
    def goals(self) -> tuple[Goal, ...]:
        """What trials are judged by, the objective first."""
        objective, metrics = self.config.objective, experiment(self.experiment).metrics
        directions = {objective.metric: objective.direction, **objective.against}
        return tuple(
            Goal(name=name, metric=metrics[name], maximize=direction == "maximize")
            for name, direction in directions.items()
        )

    @property
    def bounds(self) -> tuple[Bound, ...]:
        metrics = experiment(self.experiment).metrics
        return tuple(
            Bound(
                name=name,
                metric=metrics[name],
                low=-math.inf if bound.min is None else bound.min,
                high=math.inf if bound.max is None else bound.max,
            )
            for name, bound in self.config.objective.constraints.items()
        )

    @property
    def curve_metric(self) -> str | None:
        """The name, in a run's metrics, of the curve by which trials are pruned; None if none is."""
        match self.config.search.pruning:
            case NoPruning() | WilcoxonPruning():
                return None
            case curve:
                return experiment(self.experiment).metrics[curve.metric or self.config.objective.metric]

    @property
    def walks_a_grid(self) -> bool:
        """Whether trial n is point n of a list: that of the variants, or of all points of the space."""
        return bool(self.config.search.variants) or self.config.search.sampler == "grid"

    @property
    def num_trials(self) -> int:
        """How many there are to be, failed ones included."""
        if self.config.trials is not None:
            return self.config.trials
        if self.walks_a_grid:
            return len(self.space.points())
        return DEFAULT_TRIALS if self.space.domains else 1  # with nothing to search, all would be the same

    def changes(self, params: Mapping[str, Scalar]) -> dict[str, Any]:
        """What a trial changes in the experiment, as a tree."""
        return nest(self.config.search.variants[str(params[VARIANT])] if self.config.search.variants else params)

    @property
    def storage_url(self) -> str:
        return self.config.storage or self.own_storage_url

    @property
    def own_storage_url(self) -> str:
        """In the output folder, with which it may be moved."""
        return f"journal:///{self.output.resolve() / 'study.journal'}"

    @property
    def shown_storage(self) -> str:
        return without_password(self.storage_url)

    def to_plain(self) -> dict[str, Any]:
        """The resolved sweep as a sweep file would say it, without passwords."""
        plain = plain_mapping({**asdict(self.config), **self.experiment})
        for node in (plain, plain["search"]["warm_start"]):
            node["storage"] = node["storage"] and without_password(node["storage"])
        checkpoints = plain["checkpoints"]
        checkpoints["location"] = checkpoints["location"] and without_password(checkpoints["location"], OF_FILES)
        return plain

    def definition(self) -> dict[str, Any]:
        """What makes two sweeps the same one."""
        return {key: value for key, value in self.to_plain().items() if key not in CHANGEABLE}

    def live_settings(self) -> dict[str, Any]:
        """What may change while it runs, by dotted key."""
        return live_settings(self.to_plain())

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.definition(), sort_keys=True).encode()).hexdigest()[:16]
