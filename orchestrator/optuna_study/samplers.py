"""Samplers: from a name in a sweep file to Optuna's own, seeded so that a restart neither repeats nor contradicts."""

from __future__ import annotations

import warnings
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import optuna
from optuna.samplers import (
    BaseSampler,
    CmaEsSampler,
    GPSampler,
    NSGAIIISampler,
    NSGAIISampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)

from orchestrator.search_space import SearchSpace

SamplerKind = Literal["tpe", "gp", "cmaes", "nsga2", "nsga3", "qmc", "random", "grid"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    kind: SamplerKind = "tpe"
    seed: int = 0
    startup_trials: int = 6  # drawn at random before a model is made: tpe, gp, cmaes
    population_size: int = 20  # nsga2, nsga3


def make_sampler(sampling: Sampling, space: SearchSpace, *, num_trials: int, stream: str) -> BaseSampler:
    """The sampler of a driver that finds ``num_trials`` in the study.

    ``stream`` tells drivers of one study apart, which would otherwise draw the same points side by side.
    """
    seed = _seed(sampling.seed, num_trials, stream)
    startup_trials, population_size = sampling.startup_trials, sampling.population_size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        match sampling.kind:
            case "tpe":
                # The constant liar keeps trials that run side by side from asking for the same point.
                return TPESampler(
                    seed=seed,
                    n_startup_trials=startup_trials,
                    multivariate=True,
                    group=bool(space.conditions),
                    constant_liar=True,
                )
            case "gp":
                return GPSampler(seed=seed, n_startup_trials=startup_trials, warn_independent_sampling=False)
            case "cmaes":
                return CmaEsSampler(seed=seed, n_startup_trials=max(1, startup_trials), warn_independent_sampling=False)
            case "nsga2":
                return NSGAIISampler(seed=seed, population_size=population_size)
            case "nsga3":
                return NSGAIIISampler(seed=seed, population_size=population_size)
            case "qmc":  # one sequence for all drivers and restarts; the storage knows how far it is
                return QMCSampler(seed=sampling.seed, scramble=True, warn_independent_sampling=False)
            case "random" | "grid":  # the points of a grid are given, as start points are
                return RandomSampler(seed=seed)


def _seed(seed: int, num_trials: int, stream: str) -> int:
    """Not the same after a restart, or the sampler would ask for the same points again."""
    return int(np.random.SeedSequence([seed, num_trials, zlib.crc32(stream.encode())]).generate_state(1)[0])
