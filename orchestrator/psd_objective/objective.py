"""psd's text-to-3D as an objective that workers can execute."""

from __future__ import annotations

import gc
import io
import math
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import diffusers
import torch
import transformers

from orchestrator.experiment_config.experiment import ExperimentConfig, experiment
from orchestrator.experiment_config.rewards import SingleRewardConfig, single_rewards
from orchestrator.haste import is_hastened
from orchestrator.heartbeat import beat, patience
from orchestrator.objective import Progress
from orchestrator.psd_objective.distillation import build_distillation
from orchestrator.psd_objective.evaluator import Evaluator
from orchestrator.psd_objective.models import build_oracle, build_prior, build_reward, load_reward
from orchestrator.psd_objective.remedies import with_remedies
from orchestrator.psd_objective.scenes import build_background, build_cameras, build_later_cameras, build_scene
from orchestrator.trial import RunSpec
from psd.optimization import Optimization
from psd.prompts import PromptEncoder
from psd.random import forked_devices
from psd.rewards.base import Reward

T = TypeVar("T")

LONG_STEP_S = 5.0  # what comes after a longer step may take as long as loading, before the worker counts as hung
CHUNK_S = 10.0  # after which a chunk ends without a row, so that a run can be stopped wherever it stands
TRAIN_REWARD = "reward"  # the training reward's name among the held-out ones


class PsdObjective:
    """Optimises a scene for a prompt. Priors, rewards and the oracle stay warm between runs that use them."""

    def __init__(self) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._loaded: dict[Hashable, Any] = {}
        for library in (diffusers.utils.logging, transformers.utils.logging):
            library.disable_progress_bar()  # bars and advice of the libraries would break the sweep's table
            library.set_verbosity_error()

    def start(self, spec: RunSpec, output: Path, resume_from: Path | None) -> PsdRun:
        config = experiment(spec.config)
        with with_remedies(config):
            return self._start(config, spec, output, resume_from)

    def _start(self, config: ExperimentConfig, spec: RunSpec, output: Path, resume_from: Path | None) -> PsdRun:
        self._make_room(config)
        prior = self._load(
            _prior_key(config), partial(build_prior, config.prior, config.cameras.group_size, self._device)
        )
        rewards = {
            TRAIN_REWARD if name == "train" else name: build_reward(reward, self._load_reward)
            for name, reward in config.rewards.items()
        }
        path = config.evaluation.oracle
        oracle = None if path is None else self._load(_oracle_key(path), partial(build_oracle, path))
        cameras, later = build_cameras(config.cameras), build_later_cameras(config.cameras)
        with torch.random.fork_rng(forked_devices(self._device)):
            torch.manual_seed(spec.seed)  # networks draw their first weights from the global generator
            scene, background = build_scene(config, spec.seed), build_background(config.background)
            distillation = build_distillation(
                config.distillation, prior, rewards[TRAIN_REWARD], config.optimization.num_steps
            )
        optimization = Optimization(
            scene=scene.to(self._device),
            background=background.to(self._device),
            cameras=cameras,
            later_cameras=later,
            distillation=distillation.to(self._device),
            prompt_encoder=PromptEncoder(
                prior,
                negative_prompt=config.prompting.negative,
                view_dependent=config.prompting.view_dependent,
                perp_neg=config.prompting.perp_neg,
            ),
            prompt=spec.prompt,
            seed=spec.seed,
        )
        judged = cameras if later is None else later.sampler
        evaluator = Evaluator(spec.prompt, judged, rewards, oracle, config.evaluation, output, self._device)
        run = PsdRun(optimization, evaluator, config)
        if resume_from is not None:
            run.load(resume_from)
        return run

    def _make_room(self, config: ExperimentConfig) -> None:
        """Before models join those that are warm, the ones that this run does not use go: a GPU may not hold all."""
        path = config.evaluation.oracle
        used: set[Hashable] = {_prior_key(config)} | (set() if path is None else {_oracle_key(path)})
        for name, reward in config.rewards.items():
            used |= set(single_rewards(reward, name).values())
        if used <= self._loaded.keys() or self._loaded.keys() <= used:
            return
        self._loaded = {key: model for key, model in self._loaded.items() if key in used}
        gc.collect()  # a compiled network refers to itself

    def _load_reward(self, config: SingleRewardConfig) -> Reward:
        return self._load(config, partial(load_reward, config, self._device))

    def _load(self, key: Hashable, make: Callable[[], T]) -> T:
        if key not in self._loaded:
            self._loaded[key] = make()
        return cast(T, self._loaded[key])


def _prior_key(config: ExperimentConfig) -> Hashable:
    return "prior", config.prior, config.cameras.group_size


def _oracle_key(path: str) -> Hashable:
    return "oracle", path


class PsdRun:
    """One optimisation, with rows of metrics at fixed steps.

    A chunk may end between two rows: what was measured since the last one is part of the state, so that a resumed run
    logs the same rows.
    """

    def __init__(self, optimization: Optimization, evaluator: Evaluator, config: ExperimentConfig) -> None:
        self._optimization = optimization
        self._evaluator = evaluator
        self._config = config
        self._num_steps = config.optimization.num_steps
        self._log_every = config.optimization.log_every
        self._evaluate_every = config.evaluation.every
        self._seconds = 0.0  # of optimisation alone
        self._step_s = math.inf  # of the last step; nobody knows yet
        self._unet_calls = 0
        self._terms: defaultdict[str, list[float]] = defaultdict(list)  # of the steps since the last row

    def advance(self) -> Progress:
        with with_remedies(self._config):
            return self._advance()

    def save(self, directory: Path) -> None:
        state = {
            "optimization": self._optimization.state_dict(),
            "seconds": self._seconds,
            "unet_calls": self._unet_calls,
            "terms": dict(self._terms),
        }
        content = io.BytesIO()
        torch.save(state, content)  # which would tell of a full disk by a RuntimeError
        (directory / "state.pt").write_bytes(content.getbuffer())

    def load(self, directory: Path) -> None:
        state = torch.load(directory / "state.pt", map_location="cpu", weights_only=True)
        self._optimization.load_state_dict(state["optimization"])
        self._seconds, self._unet_calls = state["seconds"], state["unet_calls"]
        self._terms = defaultdict(list, state["terms"])

    def close(self) -> None:
        pass

    def _advance(self) -> Progress:
        self._optimize_chunk()
        step = self._optimization.next_step
        done = step == self._num_steps
        metrics = self._take_row() if done or step % self._log_every == 0 else {}
        files: Mapping[str, Path] = {}
        if done or step % self._evaluate_every == 0:
            with self._patience():
                scores, files = self._evaluator(self._optimization, final=done)
            metrics |= scores
        if done:
            metrics["seconds"] = self._seconds
        return Progress(step=step, num_steps=self._num_steps, metrics=metrics, files=files, done=done)

    def _patience(self) -> AbstractContextManager[None]:
        """Around what has no sign of life in it, on a machine on which that may take long, since steps do."""
        return patience() if self._step_s > LONG_STEP_S else nullcontext()

    def _optimize_chunk(self) -> None:
        """The steps up to the next row; fewer where they take long, or where the run is to stop."""
        started_s = time.perf_counter()
        first = self._optimization.next_step
        last = min(first - first % self._log_every + self._log_every, self._num_steps)
        for _ in range(first, last):
            step_started_s = time.perf_counter()
            with self._patience():
                report = self._optimization.step()
            self._step_s = time.perf_counter() - step_started_s
            beat()
            self._unet_calls += report.unet_calls
            for name, value in report.terms.items():
                self._terms[name].append(value)
            if is_hastened() or time.perf_counter() - started_s > CHUNK_S:
                break
        self._seconds += time.perf_counter() - started_s

    def _take_row(self) -> dict[str, float]:
        """The terms' means over the steps since the last row, as ``train/NAME``."""
        means = {f"train/{name}": sum(values) / len(values) for name, values in self._terms.items()}
        self._terms.clear()
        return means | {"train/unet_calls": float(self._unet_calls)}
