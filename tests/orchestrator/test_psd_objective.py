"""psd as an objective: its settings are psd's, and a resumed run ends as an uninterrupted one."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from orchestrator.config import CONF
from orchestrator.experiment_config.distillation import NegativeEmbeddingConfig
from orchestrator.experiment_config.experiment import experiment
from orchestrator.experiment_config.scenes import HashGridConfig, ShadingConfig, VoxelGridConfig
from orchestrator.failure import classify
from orchestrator.haste import hasten, relax
from orchestrator.heartbeat import asks_patience
from orchestrator.objective import Progress
from orchestrator.psd_objective.compilation import excuse_compiling
from orchestrator.psd_objective.evaluator import Evaluator
from orchestrator.psd_objective.models import build_prior
from orchestrator.psd_objective.objective import PsdObjective
from orchestrator.psd_objective.remedies import with_remedies
from orchestrator.trial import FailureKind, RunSpec
from psd.distillation import negative_embedding
from psd.optimization import Optimization, StepReport
from psd.priors.base import Prior
from psd.priors.multiview import MultiviewPrior
from psd.rewards.clip_preference import ClipPreferenceReward
from psd.scenes import hash_grid, shading, voxel_grid
from tests.psd.checkpoints import save_prior, save_reward


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> RunSpec:
    folder = tmp_path_factory.mktemp("checkpoints")
    save_prior(folder / "prior")
    save_reward(folder / "reward")
    reward = {"kind": "clip_preference", "path": str(folder / "reward")}
    config = {
        "prior": {"kind": "multiview", "path": str(folder / "prior")},
        "rewards": {"train": reward, "judge": reward},
        "scene": {"kind": "voxel_grid", "resolution": 8, "coarse_resolution": 4, "num_samples": 8},
        "background": {"kind": "learned"},
        "cameras": {"height": 16, "width": 16},
        "distillation": {"negative_embedding": {"enabled": True, "start": 1}},
        "optimization": {"num_steps": 5, "log_every": 2},
        "evaluation": {"num_views": 4, "every": 4, "picture_size": 16},
    }
    return RunSpec(run_id="t0000-p00-s0", trial=0, prompt="a red cube", seed=3, config=config)


@pytest.fixture
def hurry() -> Iterator[None]:
    """Whatever becomes of a test that hastens its process, the next one takes its time."""
    yield
    relax()


def test_models_stay_warm_until_others_need_their_room(spec: RunSpec, tmp_path: Path) -> None:
    """A sweep over the prior's precision never holds two priors; one over a number keeps all."""
    objective, reward = PsdObjective(), spec.config["rewards"]["train"]

    def loaded(**changes: Any) -> tuple[weakref.ref[Prior], dict[Any, int]]:
        objective.start(replace(spec, config=spec.config | changes), tmp_path, None)
        prior = next(model for model in objective._loaded.values() if isinstance(model, MultiviewPrior))
        return weakref.ref(prior), {key: id(model) for key, model in objective._loaded.items()}

    first, warm = loaded()
    assert loaded(optimization={"num_steps": 6, "log_every": 2})[1] == warm
    assert loaded(rewards={"train": reward})[1] == warm, "less is no reason"
    second, others = loaded(prior=spec.config["prior"] | {"dtype": "bfloat16"})
    assert first() is None
    assert second() is not None
    shared = [key for key in warm if key in others]
    assert len(shared) == 1, "the reward is used by both"
    assert warm[shared[0]] == others[shared[0]]


def test_what_goes_is_gone_before_anything_is_loaded(
    spec: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it refers to itself, as a compiled network does."""

    class Compiled:
        def __init__(self) -> None:
            self.itself = self

    def load(*_: object) -> Prior:
        assert gone() is None
        return build_prior(*_)  # type: ignore[arg-type]

    objective = PsdObjective()
    objective._loaded["prior", "of another run"] = Compiled()
    gone = weakref.ref(objective._loaded["prior", "of another run"])
    monkeypatch.setattr("orchestrator.psd_objective.objective.build_prior", load)
    objective.start(spec, tmp_path, None)
    assert gone() is None


def _rows(progress: Progress) -> dict[str, float]:
    return {name: value for name, value in progress.metrics.items() if name != "seconds"}


def test_a_resumed_run_ends_as_an_uninterrupted_one(spec: RunSpec, tmp_path: Path) -> None:
    objective = PsdObjective()
    whole = objective.start(spec, tmp_path, None)
    expected = [whole.advance() for _ in range(3)]
    assert [(progress.step, progress.done) for progress in expected] == [(2, False), (4, False), (5, True)]

    first = objective.start(spec, tmp_path, None)
    assert _rows(first.advance()) == _rows(expected[0])
    (tmp_path / "checkpoint").mkdir()
    first.save(tmp_path / "checkpoint")
    resumed = objective.start(spec, tmp_path, tmp_path / "checkpoint")
    assert [_rows(resumed.advance()) for _ in range(2)] == [_rows(progress) for progress in expected[1:]]


def test_a_run_that_is_hastened_stops_between_two_rows_and_logs_what_it_would_have_logged(
    spec: RunSpec, tmp_path: Path, hurry: None
) -> None:
    config = {**spec.config, "optimization": {"num_steps": 5, "log_every": 4}}
    spec = replace(spec, config=config)
    objective = PsdObjective()
    whole = objective.start(spec, tmp_path, None)
    expected = [whole.advance() for _ in range(2)]

    first = objective.start(spec, tmp_path, None)
    hasten()
    early = [first.advance() for _ in range(2)]
    assert [(progress.step, progress.metrics, progress.files) for progress in early] == [(1, {}, {}), (2, {}, {})]
    (tmp_path / "checkpoint").mkdir()
    first.save(tmp_path / "checkpoint")
    resumed = objective.start(spec, tmp_path, tmp_path / "checkpoint")
    assert resumed.advance().step == 3
    relax()
    assert [_rows(resumed.advance()) for _ in range(2)] == [_rows(progress) for progress in expected]


def test_a_chunk_that_takes_long_ends_before_its_row(
    spec: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 0.0

    def step(optimization: Optimization) -> StepReport:
        nonlocal now_s
        now_s += 6.0
        optimization.next_step += 1
        return StepReport(step=optimization.next_step - 1, terms={"loss": float(optimization.next_step)}, unet_calls=1)

    monkeypatch.setattr(Optimization, "step", step)
    monkeypatch.setattr("orchestrator.psd_objective.objective.time.perf_counter", lambda: now_s)
    config = {**spec.config, "optimization": {"num_steps": 9, "log_every": 3}}
    config["evaluation"] = {**spec.config["evaluation"], "every": 9}
    run = PsdObjective().start(replace(spec, config=config), tmp_path, None)
    chunks = [run.advance() for _ in range(4)]
    assert [progress.step for progress in chunks] == [2, 3, 5, 6]
    row = {"train/loss": 5.0, "train/unet_calls": 6.0}
    assert [progress.metrics for progress in chunks[2:]] == [{}, row]


def test_a_full_disk_under_a_checkpoint_is_an_error_of_the_system(spec: RunSpec, tmp_path: Path) -> None:
    run = PsdObjective().start(spec, tmp_path, None)
    (tmp_path / "state.pt").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        run.save(tmp_path)


def test_scores_and_pictures_come_when_they_are_due(spec: RunSpec, tmp_path: Path) -> None:
    run = PsdObjective().start(spec, tmp_path, None)
    first, second, last = (run.advance() for _ in range(3))
    assert not [name for name in first.metrics if name.startswith("eval/")]
    assert first.files == {}
    assert {"eval/reward", "eval/judge"} <= second.metrics.keys()
    assert list(second.files) == ["contact_sheet"]
    assert experiment(spec.config).metrics.items() <= {n.removeprefix("eval/"): n for n in last.metrics}.items()
    assert {"contact_sheet", "turntable"} <= last.files.keys()
    assert all(path.stat().st_size for path in last.files.values())


def test_a_hash_grid_with_light_is_made_of_its_settings(spec: RunSpec, tmp_path: Path) -> None:
    scene = {
        "kind": "hash_grid", "num_samples": 8, "num_levels": 2, "log2_table_size": 8, "base_resolution": 4,
        "orientation": {"kind": "linear", "start": 0, "end": 1, "end_step": 4},
        "shading": {"enabled": True, "start_step": 1},
    }  # fmt: skip
    run = PsdObjective().start(replace(spec, config={**spec.config, "scene": scene}), tmp_path, None)
    _, _, last = (run.advance() for _ in range(3))
    assert "train/orientation" in last.metrics
    assert {"eval/fog", "eval/floaters", "eval/agreement"} <= last.metrics.keys()


def test_in_2d_a_picture_comes_out(spec: RunSpec, tmp_path: Path) -> None:
    config = {**spec.config, "scene": {"kind": "image", "num_levels": 2}, "background": {"kind": "none"}}
    config["cameras"] = {"height": 16, "width": 24, "group_size": 1, "num_groups": 2}
    run = PsdObjective().start(replace(spec, config=config), tmp_path, None)
    *_, last = (run.advance() for _ in range(3))
    assert experiment(config).metrics.items() <= {n.removeprefix("eval/"): n for n in last.metrics}.items()
    assert not {"eval/fog", "eval/floaters", "eval/agreement"} & last.metrics.keys()
    assert list(last.files) == ["contact_sheet", "image"]
    with Image.open(last.files["image"]) as picture:
        assert picture.size == (24, 16)


def test_the_models_stay_warm(spec: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = PsdObjective()
    objective.start(spec, tmp_path, None)
    monkeypatch.setattr("orchestrator.psd_objective.models.MultiviewPrior", None)
    monkeypatch.setattr("orchestrator.psd_objective.models.ClipPreferenceReward", None)
    objective.start(spec, tmp_path, None)


def test_the_other_gpus_of_a_machine_are_left_alone(
    spec: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = PsdObjective()
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)  # each of which torch would wake, with a warning
    objective.start(spec, tmp_path, None)


def test_what_may_take_long_asks_for_patience(spec: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step whose predecessor took long, and an evaluation after one."""
    durations_s = iter([300.0, 20.0, 1.0, 1.0])
    now_s = 0.0
    asked = []

    def step(optimization: Optimization) -> StepReport:
        nonlocal now_s
        asked.append(("step", asks_patience()))
        now_s += next(durations_s)
        optimization.next_step += 1
        return StepReport(step=optimization.next_step - 1, terms={}, unet_calls=0)

    def evaluate(*_: object, **__: object) -> tuple[dict[str, float], dict[str, Path]]:
        asked.append(("evaluation", asks_patience()))
        return {}, {}

    monkeypatch.setattr(Optimization, "step", step)
    monkeypatch.setattr(Evaluator, "__call__", evaluate)
    monkeypatch.setattr("orchestrator.psd_objective.objective.time.perf_counter", lambda: now_s)
    config = {**spec.config, "evaluation": {**spec.config["evaluation"], "every": 2}}
    run = PsdObjective().start(replace(spec, config=config), tmp_path, None)
    while run.advance().step < 4:
        pass
    names = ["step", "step", "evaluation"] * 2
    assert asked == list(zip(names, [True, True, True, True, False, False], strict=True))
    assert not asks_patience()


def test_numbers_that_overflow_are_told_with_term_step_and_remedy(
    spec: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflow(self: MultiviewPrior, z_t: Tensor, *_: object) -> Tensor:
        return torch.full_like(z_t, math.nan)

    monkeypatch.setattr(MultiviewPrior, "predict_noise", overflow)
    half = replace(spec, config={**spec.config, "prior": {**spec.config["prior"], "dtype": "float16"}})
    with pytest.raises(FloatingPointError, match=r"is nan at step 0.*set prior.dtype=bfloat16$"):
        PsdObjective().start(half, tmp_path, None).advance()
    with pytest.raises(FloatingPointError, match=r"is nan at step 0") as raised:
        PsdObjective().start(spec, tmp_path, None).advance()
    assert "bfloat16" not in str(raised.value)


def test_a_reward_that_overflows_is_told_with_its_own_remedy(
    spec: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflow(self: ClipPreferenceReward, rgb: Tensor, prompts: list[str]) -> Tensor:
        return torch.full((len(rgb),), math.inf)

    monkeypatch.setattr(ClipPreferenceReward, "__call__", overflow)
    rewards = {**spec.config["rewards"], "train": {**spec.config["rewards"]["train"], "dtype": "float16"}}
    with pytest.raises(FloatingPointError, match=r"^reward is inf at step 0.*: set rewards.train.dtype=bfloat16$"):
        PsdObjective().start(replace(spec, config={**spec.config, "rewards": rewards}), tmp_path, None).advance()


def test_out_of_memory_names_the_settings_that_lower_it(
    spec: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any, rgb: Tensor) -> Tensor:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ..."
        )

    monkeypatch.setattr(MultiviewPrior, "encode", refuse)
    with pytest.raises(torch.OutOfMemoryError) as raised:
        PsdObjective().start(spec, tmp_path, None).advance()
    message = str(raised.value)
    assert message.startswith("CUDA out of memory. Tried to allocate 2.00 GiB; what lowers it: ")
    models = ("prior.dtype=bfloat16 (float32 now)", "rewards.train.dtype=bfloat16", "rewards.judge.dtype=bfloat16")
    for setting in (*models, "prior.vae_slicing", "cameras.num_groups", "cameras.height and cameras.width"):
        assert setting in message
    assert classify(raised.value).kind is FailureKind.OUT_OF_MEMORY


@pytest.mark.parametrize(("dtype", "helps"), [("float32", True), ("float16", True), ("bfloat16", False)])
def test_a_prior_that_is_not_in_bfloat16_takes_less_memory_in_it(
    spec: RunSpec, dtype: str, helps: bool
) -> None:  # in float16 its autoencoder may be in float32
    config = experiment({**spec.config, "prior": {**spec.config["prior"], "dtype": dtype}})
    with pytest.raises(torch.OutOfMemoryError) as raised, with_remedies(config):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert (f"prior.dtype=bfloat16 ({dtype} now)" in str(raised.value)) == helps


def test_half_a_rewards_memory_is_not_halved_again(spec: RunSpec) -> None:
    train = {**spec.config["rewards"]["train"], "dtype": "float16"}
    config = experiment({**spec.config, "rewards": {**spec.config["rewards"], "train": train}})
    with pytest.raises(torch.OutOfMemoryError) as raised, with_remedies(config):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert "rewards.train" not in str(raised.value)


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (VoxelGridConfig, voxel_grid.VoxelGridConfig),
        (HashGridConfig, hash_grid.HashGridConfig),
        (ShadingConfig, shading.Shading),
        (NegativeEmbeddingConfig, negative_embedding.NegativeEmbeddingConfig),
    ],
)
def test_settings_and_defaults_are_those_of_psd(mine: Any, theirs: Any) -> None:
    def defaults(schema: Any) -> dict[str, object]:
        values = {field.name: getattr(field.default, "value", field.default) for field in fields(schema)}
        return {name: value for name, value in values.items() if name not in ("kind", "enabled", "shading")}

    assert defaults(mine) == defaults(theirs)


def test_the_toybox_experiment_is_valid() -> None:
    # through Hydra's YAML, which reads 1e-3 as a number where plain YAML 1.1 reads text
    plain = OmegaConf.to_container(OmegaConf.load(CONF / "experiment" / "toybox.yaml"))
    assert isinstance(plain, dict)
    del plain["checkpoint_every"]  # the sweep's
    assert experiment(plain).prior.path == "toybox"  # type: ignore[arg-type]


def test_a_worker_asks_for_patience_while_it_compiles() -> None:
    asked: list[bool] = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        asked.append(asks_patience())
        return graph.forward

    excuse_compiling()
    double = torch.compile(lambda x: 2 * x, backend=compiler, dynamic=False)
    for size in (2, 2, 3):
        assert torch.equal(double(torch.ones(size)), torch.full((size,), 2.0))
        assert not asks_patience()
    assert asked == [True, True], "once for each batch size"
