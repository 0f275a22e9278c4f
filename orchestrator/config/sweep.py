"""A sweep: its settings, as typed and checked values, with the experiment that it varies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from orchestrator.config.durability import CheckpointsConfig, FailuresConfig
from orchestrator.experiment_config.experiment import experiment
from orchestrator.placement import WorkerShape
from orchestrator.schema import ConfigError, Count, WholeNumber
from orchestrator.search_space import Domain
from orchestrator.settings import nest, plain_mapping
from orchestrator.trial import Scalar

VARIANT = "variant"  # the one parameter of a trial in a sweep of named variants
DEFAULT_TRIALS = 12
# What may change between two starts of one sweep; everything else defines it.
CHANGEABLE = (
    "trials",
    "workers",
    "worker",
    "tracking",
    "storage",
    "output",
    "checkpoint_every",
    "checkpoints",
    "failures",
)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    metric: str = "judge"
    direction: Literal["maximize", "minimize"] = "maximize"


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    sampler: Literal["tpe", "random", "qmc"] = "tpe"
    seed: WholeNumber = 0
    startup_trials: WholeNumber = 6
    start: tuple[dict[str, Any], ...] = ()
    space: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("space", "start"):
            if self.variants and getattr(self, key):
                raise ConfigError("variants", f"cannot be combined with search.{key}: each variant is one trial")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    kind: Literal["wandb", "none"] = "wandb"
    project: str = "psd-sweeps"
    entity: str | None = None
    mode: Literal["auto", "online", "offline"] = "auto"


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A checked sweep. ``experiment`` holds plain values with every default filled in; ``space`` its searched keys."""

    name: str
    objective: ObjectiveConfig = ObjectiveConfig()
    search: SearchConfig = SearchConfig()
    prompts: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    trials: Count | None = None
    workers: Count | None = None
    worker: WorkerShape = WorkerShape()
    output: str
    storage: str | None = None
    tracking: TrackingConfig = TrackingConfig()
    failures: FailuresConfig = FailuresConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()

    def __post_init__(self) -> None:
        for name in ("prompts", "seeds"):
            values = getattr(self, name)
            if not values:
                raise ConfigError(name, "must list at least one")
            if len(set(values)) < len(values):
                raise ConfigError(name, f"must list each once; got {list(values)}")
        if not all(self.prompts):
            raise ConfigError("prompts", "must not be empty text")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep and the experiment it varies, both checked, with where they came from."""

    config: SweepConfig
    experiment: Mapping[str, Any]  # plain YAML values, every default filled in
    space: Mapping[str, Domain]
    source: str

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    @property
    def metric(self) -> str:
        """The objective's name in a run's metrics."""
        return experiment(self.experiment).metrics[self.config.objective.metric]

    @property
    def sampler(self) -> Literal["tpe", "random", "qmc", "grid"]:
        """What chooses the points; variants are taken in their order."""
        return "grid" if self.config.search.variants else self.config.search.sampler

    @property
    def is_asset(self) -> bool:
        """Whether it is one run and no search: what `psd run` makes."""
        return not self.space and self.num_trials == len(self.config.prompts) == len(self.config.seeds) == 1

    @property
    def num_trials(self) -> int:
        """How many there are to be, failed ones included."""
        return self.config.trials or len(self.config.search.variants) or DEFAULT_TRIALS

    def changes(self, params: Mapping[str, Scalar]) -> dict[str, Any]:
        """What a trial changes in the experiment, as a tree."""
        return nest(self.config.search.variants[str(params[VARIANT])] if self.config.search.variants else params)

    @property
    def storage_url(self) -> str:
        return self.config.storage or f"sqlite:///{self.output.resolve() / 'study.db'}"

    def to_plain(self) -> dict[str, Any]:
        """The resolved sweep as a sweep file would say it."""
        return plain_mapping({**asdict(self.config), **self.experiment})

    def definition(self) -> dict[str, Any]:
        """What makes two sweeps the same one."""
        return {key: value for key, value in self.to_plain().items() if key not in CHANGEABLE}

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.definition(), sort_keys=True).encode()).hexdigest()[:16]
