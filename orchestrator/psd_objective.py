"""Where the halves meet: psd's text-to-3D as an objective that workers can execute."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import diffusers
import torch
import transformers

from orchestrator import experiment_config as configs
from orchestrator.experiment_config import ExperimentConfig
from orchestrator.objective import Progress
from orchestrator.psd_inputs import oracle_folder, prior_folder, reward_folder
from orchestrator.trial import RunSpec
from psd.cameras import Cameras, CameraSampler, turntable
from psd.distillation import negative_embedding as negative
from psd.distillation.distillation import Distillation
from psd.distillation.residuals import NoiseResidual, Residual, X0Reconstruction
from psd.distillation.weightings import PreferenceWeighting, RewardScaling, SingleWeighting, Weighting
from psd.evaluation.held_out import geometry_scores, held_out_cameras, mean_rewards
from psd.export import contact_sheet, field_to_mesh, save_mesh, save_turntable
from psd.optimization import Optimization
from psd.priors.multiview import MultiviewPrior
from psd.prompts import PromptEncoder
from psd.rewards.base import Reward
from psd.rewards.clip_preference import ClipPreferenceReward
from psd.scenes import voxel_grid
from psd.scenes.backgrounds import Background, FlatBackground, LearnedBackground
from psd.scenes.base import Render
from psd.scenes.voxel_grid import VoxelGrid
from psd.schedules import Constant, Cosine, Linear, Piecewise, Schedule
from psd.toybox.oracle import Oracle

T = TypeVar("T")

TURNTABLE_FRAMES = 24
TRAIN_REWARD = "reward"  # the training reward's name among the held-out ones


class PsdObjective:
    """Optimises a scene for a prompt. Priors, rewards and the oracle are loaded once and stay warm between runs."""

    def __init__(self) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._loaded: dict[Hashable, Any] = {}
        for library in (diffusers.utils.logging, transformers.utils.logging):
            library.disable_progress_bar()  # bars and advice of the libraries would break the sweep's table
            library.set_verbosity_error()

    def start(self, spec: RunSpec, output: Path, resume_from: Path | None) -> PsdRun:
        config = configs.experiment(spec.config)
        prior = self._load(("prior", config.prior, config.cameras.group_size), partial(self._prior, config))
        rewards = {
            TRAIN_REWARD if name == "train" else name: self._load(reward, partial(self._reward, reward))
            for name, reward in config.rewards.items()
        }
        path = config.evaluation.oracle
        oracle = None if path is None else self._load(("oracle", path), partial(_oracle, path))
        cameras = _cameras(config.cameras)
        with torch.random.fork_rng():
            torch.manual_seed(spec.seed)  # networks draw their first weights from the global generator
            scene, background = _scene(config.scene, spec.seed), _background(config.background)
        optimization = Optimization(
            scene=scene.to(self._device),
            background=background.to(self._device),
            cameras=cameras,
            distillation=_distillation(config.distillation, prior, rewards[TRAIN_REWARD]).to(self._device),
            prompt_encoder=PromptEncoder(
                prior, negative_prompt=config.prompting.negative, view_dependent=config.prompting.view_dependent
            ),
            prompt=spec.prompt,
            seed=spec.seed,
        )
        evaluator = Evaluator(spec.prompt, cameras, rewards, oracle, config.evaluation, output, self._device)
        run = PsdRun(optimization, evaluator, config)
        if resume_from is not None:
            run.load(resume_from)
        return run

    def _load(self, key: Hashable, make: Callable[[], T]) -> T:
        if key not in self._loaded:
            self._loaded[key] = make()
        return cast(T, self._loaded[key])

    def _prior(self, config: ExperimentConfig) -> MultiviewPrior:
        folder = prior_folder(config.prior.path)
        return MultiviewPrior.from_pretrained(folder, device=self._device, group_size=config.cameras.group_size)

    def _reward(self, config: configs.ClipPreferenceConfig) -> Reward:
        return ClipPreferenceReward.from_pretrained(reward_folder(config.path), device=self._device)


class PsdRun:
    """One optimisation, in chunks that end at fixed steps, so that a resumed run logs the same rows."""

    def __init__(self, optimization: Optimization, evaluator: Evaluator, config: ExperimentConfig) -> None:
        self._optimization = optimization
        self._evaluator = evaluator
        self._num_steps = config.optimization.num_steps
        self._log_every = config.optimization.log_every
        self._evaluate_every = config.evaluation.every
        self._seconds = 0.0  # of optimisation alone
        self._unet_calls = 0

    def advance(self) -> Progress:
        metrics = self._optimize_chunk()
        step = self._optimization.next_step
        done = step == self._num_steps
        files: Mapping[str, Path] = {}
        if done or step % self._evaluate_every == 0:
            scores, files = self._evaluator(self._optimization, final=done)
            metrics |= scores
        if done:
            metrics["seconds"] = self._seconds
        return Progress(step=step, num_steps=self._num_steps, metrics=metrics, files=files, done=done)

    def save(self, directory: Path) -> None:
        state = {
            "optimization": self._optimization.state_dict(),
            "seconds": self._seconds,
            "unet_calls": self._unet_calls,
        }
        torch.save(state, directory / "state.pt")

    def load(self, directory: Path) -> None:
        state = torch.load(directory / "state.pt", map_location="cpu", weights_only=True)
        self._optimization.load_state_dict(state["optimization"])
        self._seconds, self._unet_calls = state["seconds"], state["unet_calls"]

    def close(self) -> None:
        pass

    def _optimize_chunk(self) -> dict[str, float]:
        """The terms' means over the chunk, as ``train/NAME``."""
        started_s = time.perf_counter()
        first = self._optimization.next_step
        last = min(first - first % self._log_every + self._log_every, self._num_steps)
        terms: dict[str, list[float]] = defaultdict(list)
        for _ in range(first, last):
            report = self._optimization.step()
            self._unet_calls += report.unet_calls
            for name, value in report.terms.items():
                terms[name].append(value)
        self._seconds += time.perf_counter() - started_s
        means = {f"train/{name}": sum(values) / len(values) for name, values in terms.items()}
        return means | {"train/unet_calls": float(self._unet_calls)}


class Evaluator:
    """Judges a scene from held-out views, and makes the pictures and the mesh that people look at."""

    def __init__(
        self,
        prompt: str,
        sampler: CameraSampler,
        rewards: Mapping[str, Reward],
        oracle: Oracle | None,
        config: configs.EvaluationConfig,
        output: Path,
        device: torch.device,
    ) -> None:
        self._prompt = prompt
        self._cameras = held_out_cameras(sampler, config.num_views).to(device)
        size = config.picture_size
        self._picture_cameras = self._cameras.at_resolution(size, size)
        self._turntable = turntable(sampler, TURNTABLE_FRAMES, sum(sampler.elevation_deg) / 2).to(device)
        self._turntable = self._turntable.at_resolution(size, size)
        self._rewards = rewards
        self._oracle = oracle
        self._output = output

    @torch.no_grad()
    def __call__(self, optimization: Optimization, *, final: bool) -> tuple[dict[str, float], dict[str, Path]]:
        """The scores, and the files it wrote."""
        scene, background = optimization.scene, optimization.background
        assert isinstance(scene, VoxelGrid)
        scene.eval()
        try:
            render = scene.render(self._cameras, background.fixed(self._cameras).rgb)
            scores = mean_rewards(render, self._prompt, self._rewards)
            if self._oracle is not None:
                verdict = self._oracle.judge(render.rgb, self._prompt)
                scores |= {f"eval/{name}": share for name, share in verdict.items()}
            files = {"contact_sheet": self._save_contact_sheet(scene, background)}
            if final:
                scores |= geometry_scores(render, self._cameras, scene.field())
                files |= self._save_asset(scene, background)
        finally:
            scene.train()
        return scores, files

    def _save_contact_sheet(self, scene: VoxelGrid, background: Background) -> Path:
        cameras = self._picture_cameras
        rgb = _render(scene, background, cameras).rgb
        captions = [f"{azimuth:.0f}°" for azimuth in cameras.azimuth_deg.tolist()]
        order = cameras.azimuth_deg.argsort()
        sheet = contact_sheet(rgb[order], [captions[i] for i in order.tolist()], columns=4, title=self._prompt)
        path = self._output / "contact_sheet.png"
        sheet.save(path)
        return path

    def _save_asset(self, scene: VoxelGrid, background: Background) -> dict[str, Path]:
        files = {"turntable": self._output / "turntable.gif"}
        save_turntable(_render(scene, background, self._turntable).rgb, files["turntable"])
        try:
            mesh = field_to_mesh(scene.field())
        except ValueError:  # nothing is solid: the scores say how bad that is, and there is no surface to save
            return files
        files["mesh"] = self._output / "mesh.glb"
        save_mesh(mesh, files["mesh"])
        return files


def describe_device() -> str:
    """What torch would compute on here."""
    if torch.cuda.is_available():
        return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return f"no GPU (torch {torch.__version__}, {torch.get_num_threads()} threads)"


def _render(scene: VoxelGrid, background: Background, cameras: Cameras) -> Render:
    return scene.render(cameras, background.fixed(cameras).rgb)


def _oracle(path: str) -> Oracle:
    return Oracle.from_pretrained(oracle_folder(path))


def _cameras(config: configs.CamerasConfig) -> CameraSampler:
    return CameraSampler(
        height=config.height,
        width=config.width,
        num_groups=config.num_groups,
        group_size=config.group_size,
        elevation_deg=config.elevation_deg,
        fov_deg=config.fov_deg,
        distance_scale=config.distance_scale,
    )


def _scene(config: configs.VoxelGridConfig, seed: int) -> VoxelGrid:
    settings = {name: value for name, value in vars(config).items() if name != "kind"}
    return VoxelGrid(voxel_grid.VoxelGridConfig(**settings), seed=seed)


def _background(config: configs.FlatBackgroundConfig | configs.LearnedBackgroundConfig) -> Background:
    match config:
        case configs.FlatBackgroundConfig():
            return FlatBackground()
        case configs.LearnedBackgroundConfig(lr=lr):
            return LearnedBackground(lr=lr)


def _distillation(config: configs.DistillationConfig, prior: MultiviewPrior, reward: Reward) -> Distillation:
    return Distillation(
        prior=prior,
        residual=_residual(config.residual, _schedule(config.guidance_scale)),
        weighting=_weighting(config.weighting),
        reward=reward,
        negative_embedding=_negative_embedding(config.negative_embedding),
        min_t=_schedule(config.min_t),
        max_t=_schedule(config.max_t),
    )


def _residual(
    config: configs.NoiseResidualConfig | configs.X0ReconstructionConfig, guidance_scale: Schedule
) -> Residual:
    match config:
        case configs.NoiseResidualConfig():
            return NoiseResidual(guidance_scale=guidance_scale)
        case configs.X0ReconstructionConfig(rescale=rescale):
            return X0Reconstruction(guidance_scale=guidance_scale, rescale=rescale)


def _weighting(config: configs.SingleWeightingConfig | configs.PreferenceWeightingConfig) -> Weighting:
    match config:
        case configs.SingleWeightingConfig():
            return SingleWeighting()
        case configs.PreferenceWeightingConfig(scale=scale, scaling=scaling, temperature=temperature):
            return PreferenceWeighting(scale=_schedule(scale), scaling=RewardScaling(scaling), temperature=temperature)


def _negative_embedding(config: configs.NegativeEmbeddingConfig) -> negative.NegativeEmbeddingConfig | None:
    if not config.enabled:
        return None
    settings = {name: value for name, value in vars(config).items() if name not in ("enabled", "objective")}
    return negative.NegativeEmbeddingConfig(objective=negative.NegativeObjective(config.objective), **settings)


def _schedule(config: configs.ScheduleConfig) -> Schedule:
    match config:
        case configs.LinearConfig(start=start, end=end, start_step=start_step, end_step=end_step):
            return Linear(start=start, end=end, start_step=start_step, end_step=end_step)
        case configs.CosineConfig(start=start, end=end, start_step=start_step, end_step=end_step):
            return Cosine(start=start, end=end, start_step=start_step, end_step=end_step)
        case configs.PiecewiseConfig(knots=knots):
            return Piecewise(knots)
        case float(value):
            return Constant(value)
