"""An optimisation step asks the device for nothing before its terms are logged: each question is a wait on a GPU.

The meta device has no numbers, so it refuses whoever asks for one, or for a shape that depends on some; and it needs no
GPU. A hash grid is left out: on a GPU nerfacc's kernels wait by themselves, see ``psd.scenes.volume_rendering``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from orchestrator import config
from orchestrator.config import CONF
from orchestrator.experiment_config.experiment import experiment
from orchestrator.psd_objective.distillation import build_distillation
from psd.cameras import CameraSampler
from psd.distillation.distillation import Distillation
from psd.distillation.negative_embedding import NegativeEmbeddingConfig, NegativeObjective
from psd.distillation.residuals import X0Reconstruction
from psd.distillation.weightings import PreferenceWeighting
from psd.optimization import Optimization
from psd.priors.base import Prior
from psd.priors.multiview import MultiviewPrior
from psd.priors.stable_diffusion import StableDiffusionPrior
from psd.prompts import PromptEncoder
from psd.rewards.base import Reward
from psd.rewards.clip_preference import ClipPreferenceReward
from psd.scenes.backgrounds import Background, FlatBackground, LearnedBackground
from psd.scenes.base import Scene
from psd.scenes.image import ImageConfig, ImageScene
from psd.scenes.shading import Shading
from psd.scenes.voxel_grid import VoxelGrid, VoxelGridConfig
from psd.schedules import Constant
from tests.contracts.test_rewards import REWARDS, Shelf
from tests.psd.checkpoints import save_prior, save_reward

METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
NUM_STEPS = 2  # the first may set things up
PLAIN = VoxelGridConfig(resolution=8, coarse_resolution=4, num_samples=8)
LIT = replace(
    PLAIN, sparsity=Constant(1.0), opacity_entropy=Constant(1.0), orientation=Constant(1.0), smoothness=1.0,
    shading=Shading(start_step=0, probability=1.0),
)  # fmt: skip

Make = Callable[[Prior, Reward], Distillation]


class BlockingTransfers(TorchDispatchMode):
    """Refuses what goes from the CPU to the device while the CPU waits."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if func.overloadpacket.__name__ == "_to_copy" and args[0].device.type == "cpu":
            target = options.get("device")
            assert target is None or target.type == "cpu" or options.get("non_blocking"), "a transfer is waited for"
        return func(*args, **options)


@contextmanager
def refused_waits(device: str) -> Iterator[None]:
    if device == "meta":
        with BlockingTransfers():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="module", params=["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_prior(root / "multiview", channels=(16,))
    save_prior(root / "single", channels=(16,), cameras=False)
    save_reward(root / "reward")
    return root


@pytest.fixture(scope="module")
def prior(folders: Path, device: str) -> Prior:
    return MultiviewPrior.from_pretrained(folders / "multiview", device=device)


@pytest.fixture(scope="module")
def reward(folders: Path, device: str) -> Reward:
    return ClipPreferenceReward.from_pretrained(folders / "reward", device=device)


@pytest.fixture(autouse=True)
def logs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one wait of a step, for the numbers that are logged."""
    monkeypatch.setattr("psd.optimization._finite", lambda terms, step: dict.fromkeys(terms, 0.0))


def preference(prior: Prior, reward: Reward) -> Distillation:
    return Distillation(prior=prior, residual=X0Reconstruction(), weighting=PreferenceWeighting(), reward=reward)


def optimize(
    prior: Prior,
    reward: Reward,
    device: str,
    make: Make = preference,
    scene: Scene | None = None,
    background: Background | None = None,
    **prompting: bool,
) -> None:
    in_2d = scene is not None and scene.num_dimensions == 2
    optimization = Optimization(
        scene=(scene or VoxelGrid(PLAIN)).to(device),
        background=(background or FlatBackground({"red": 0.9, "blue": 0.1})).to(device),
        cameras=CameraSampler(height=20, width=20, group_size=1 if in_2d else 4),
        distillation=make(prior, reward).to(device),
        prompt_encoder=PromptEncoder(prior, **prompting),
        prompt="cube",
        seed=0,
    )
    optimization.step()
    with refused_waits(device):
        for _ in range(1, NUM_STEPS):
            optimization.step()


@pytest.mark.parametrize("method", METHODS)
def test_methods(prior: Prior, reward: Reward, device: str, method: str) -> None:
    short = ["distillation.ranking={ddim_steps: 2, stop_fraction: 1}"] if method == "rewardsds" else []
    settings = experiment(config.load_asset("a red cube", [f"method={method}", *short]).experiment)
    optimize(
        prior, reward, device, lambda prior, reward: build_distillation(settings.distillation, prior, reward, NUM_STEPS)
    )


@pytest.mark.parametrize("objective", NegativeObjective)
def test_negative_embedding(prior: Prior, reward: Reward, device: str, objective: NegativeObjective) -> None:
    def make(prior: Prior, reward: Reward) -> Distillation:
        return Distillation(
            prior=prior,
            residual=X0Reconstruction(),
            weighting=PreferenceWeighting(),
            reward=reward,
            negative_embedding=NegativeEmbeddingConfig(objective=objective),
        )

    optimize(prior, reward, device, make)


@pytest.mark.parametrize("name", [name for name in REWARDS if name != "function"])
def test_rewards(device: str, name: str, shelf: Path) -> None:
    """A function is given the images as numbers, and so waits for them."""
    reward = REWARDS[name](shelf, torch.float32, device)
    rgb = torch.rand(4, 3, 20, 20, device=device, requires_grad=True)
    reward(rgb, ["a red cube"] * 4)
    with refused_waits(device):
        reward(rgb, ["a red cube"] * 4).sum().backward()


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rewards")
    Shelf(root).fill()
    return root


def test_light_losses_and_a_learned_background(prior: Prior, reward: Reward, device: str) -> None:
    optimize(prior, reward, device, scene=VoxelGrid(LIT), background=LearnedBackground())


def test_picture(prior: Prior, reward: Reward, device: str) -> None:
    optimize(prior, reward, device, scene=ImageScene(ImageConfig(height=20, width=20, num_levels=2, smoothness=1.0)))


@pytest.mark.filterwarnings("ignore:the prior's text encoder does not see the end")
def test_prompts_of_views(folders: Path, reward: Reward, device: str) -> None:
    prior = StableDiffusionPrior.from_pretrained(folders / "single", device=device)
    optimize(prior, reward, device, view_dependent=True, perp_neg=True)


def test_who_asks_is_heard(prior: Prior, device: str) -> None:
    class Asking(ClipPreferenceReward):
        def __init__(self) -> None:
            pass

        def __call__(self, rgb: Tensor, prompts: Any) -> Tensor:
            return rgb.flatten(1).mean(1) if float(rgb.sum()) > 0 else rgb.flatten(1).sum(1)

    class Fetching(Asking):
        def __call__(self, rgb: Tensor, prompts: Any) -> Tensor:
            return rgb.flatten(1).mean(1) * torch.ones(len(rgb)).to(rgb.device)

    with pytest.raises(RuntimeError, match=r"called on meta tensors|synchronizing CUDA operation"):
        optimize(prior, Asking(), device)
    with pytest.raises((AssertionError, RuntimeError), match=r"a transfer is waited for|synchronizing CUDA operation"):
        optimize(prior, Fetching(), device)
