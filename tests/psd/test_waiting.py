"""A step of distillation never asks the device for a number: on a GPU each such question is a wait."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from psd.cameras import CameraSampler
from psd.distillation.distillation import Distillation
from psd.distillation.negative_embedding import NegativeEmbeddingConfig, NegativeObjective
from psd.distillation.residuals import NoiseResidual, X0Reconstruction
from psd.distillation.reward_gradient import RewardGradientConfig
from psd.distillation.weightings import PreferenceWeighting, SingleWeighting
from psd.priors.multiview import MultiviewPrior
from psd.priors.stable_diffusion import StableDiffusionPrior
from psd.prompts import PromptEncoder
from psd.rewards.clip_preference import ClipPreferenceReward
from tests.psd.checkpoints import save_prior, save_reward

# What makes a number, or a shape that depends on numbers, out of a tensor.
QUESTIONS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "is_nonzero",
    "_unique2",
    "unique_dim",
    "bincount",
}
READERS = ("tolist", "numpy", "cpu")


class Questions(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if (name in QUESTIONS or by_mask) and not _in_optimizer():
            self.asked.append(name)
        return func(*args, **(kwargs or {}))


def _in_optimizer() -> bool:
    """torch's Adam counts its steps on the CPU, wherever the parameters are."""
    return any("torch/optim/" in frame.filename for frame in traceback.extract_stack())


@contextmanager
def questions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the questions that are asked inside."""
    with monkeypatch.context() as patch, Questions() as mode:
        for name in READERS:
            original = getattr(Tensor, name)

            def read(self: Tensor, *args: Any, name: str = name, original: Callable[..., Any] = original) -> Any:
                mode.asked.append(name)
                return original(self, *args)

            patch.setattr(Tensor, name, read)
        yield mode.asked


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "multiview": MultiviewPrior.from_pretrained(save_prior(folder / "multiview")),
        "single": StableDiffusionPrior.from_pretrained(save_prior(folder / "single", cameras=False)),
        "reward": ClipPreferenceReward.from_pretrained(save_reward(folder / "reward")),
    }


@pytest.mark.parametrize(
    "method",
    [
        {"prior": "multiview", "weighting": SingleWeighting()},
        {"prior": "single", "weighting": SingleWeighting(), "residual": NoiseResidual()},
        {"prior": "multiview", "weighting": PreferenceWeighting()},
        {"prior": "multiview", "weighting": SingleWeighting(), "reward_gradient": RewardGradientConfig()},
        *(
            {
                "prior": "multiview",
                "weighting": PreferenceWeighting(),
                "negative_embedding": NegativeEmbeddingConfig(objective=objective),
            }
            for objective in NegativeObjective
        ),
    ],
)
def test_a_step_asks_for_nothing(
    models: dict[str, Any], method: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    prior, generator = models[method["prior"]], torch.Generator().manual_seed(0)
    settings = {"residual": X0Reconstruction(), **method, "prior": prior}
    distillation = Distillation(reward=models["reward"], **settings)
    cameras = CameraSampler(height=16, width=16)(generator)
    prompt = PromptEncoder(prior, view_dependent=True)("red cube", cameras)
    rgb = torch.rand(4, 3, 16, 16).requires_grad_()
    for step in range(2):
        with questions(monkeypatch) as asked:
            loss = distillation(rgb, prompt, cameras, step, generator)
            loss.total.backward()
        assert asked == [] or step == 0  # the first step embeds the prompt for the reward
    with questions(monkeypatch) as asked:
        float(loss.total.detach())
    assert asked == ["_local_scalar_dense"]  # the questions would have been heard
