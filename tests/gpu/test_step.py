"""On a real device a step computes what the CPU computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from psd.cameras import CameraSampler
from psd.distillation.distillation import Distillation
from psd.distillation.residuals import X0Reconstruction
from psd.distillation.weightings import PreferenceWeighting
from psd.priors.multiview import MultiviewPrior
from psd.prompts import PromptEncoder
from psd.rewards.clip_preference import ClipPreferenceReward
from tests.psd.checkpoints import save_prior, save_reward

pytestmark = pytest.mark.gpu


def make(folder: Path, device: str) -> tuple[MultiviewPrior, Distillation]:
    prior = MultiviewPrior.from_pretrained(save_prior(folder / "prior"), device=device)
    reward = ClipPreferenceReward.from_pretrained(save_reward(folder / "reward"), device=device)
    distillation = Distillation(
        prior=prior, residual=X0Reconstruction(), weighting=PreferenceWeighting(), reward=reward
    )
    return prior, distillation.to(device)


def test_a_gradient_is_that_of_the_cpu(tmp_path: Path) -> None:
    gradients = []
    for device in ("cpu", "cuda"):
        prior, distillation = make(tmp_path / device, device)
        generator = torch.Generator().manual_seed(0)
        cameras = CameraSampler(height=16, width=16)(generator)
        rgb = torch.linspace(0, 1, 4 * 3 * 256).view(4, 3, 16, 16).to(device).requires_grad_()
        prompt = PromptEncoder(prior)("red cube", cameras)
        distillation(rgb, prompt, cameras.to(device), 0, generator).total.backward()
        assert rgb.grad is not None
        gradients.append(rgb.grad.cpu())
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-3, rtol=1e-2)
