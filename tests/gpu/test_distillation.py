"""A step of distillation on a GPU runs ahead of it: nothing waits for a result before the terms are logged."""

from __future__ import annotations

import pytest
import torch

from orchestrator import config
from orchestrator.config import CONF
from orchestrator.experiment_config.experiment import experiment
from orchestrator.psd_objective.distillation import build_distillation
from psd.cameras import CameraSampler
from psd.priors.multiview import MultiviewPrior
from psd.prompts import PromptEncoder
from tests.psd.checkpoints import save_prior
from tests.psd.fakes import BrightnessReward

METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> MultiviewPrior:
    return MultiviewPrior.from_pretrained(save_prior(tmp_path_factory.mktemp("prior")), device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_a_step_waits_for_nothing(prior: MultiviewPrior, method: str) -> None:
    settings = experiment(config.load_asset("a red cube", [f"method={method}"]).experiment)
    distillation = build_distillation(settings.distillation, prior, BrightnessReward(), num_steps=4).cuda()
    generator = torch.Generator().manual_seed(0)
    drawn = CameraSampler(height=16, width=16)(generator)
    prompt, cameras = PromptEncoder(prior)("red cube", drawn), drawn.to("cuda")
    rgb = torch.rand(4, 3, 16, 16, device="cuda", requires_grad=True)
    for step in range(4):
        try:
            torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first step may set things up
            distillation(rgb, prompt, cameras, step, generator).total.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert rgb.grad is not None
    assert rgb.grad.isfinite().all()
