"""A Gaussian prior in double precision, eight views in two groups, and a step of distillation on them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from psd.cameras import Cameras, CameraSampler
from psd.distillation.distillation import Distillation, DistillationLoss
from psd.prompts import PromptEncoder
from tests.psd.closed_form import Step
from tests.psd.fakes import RecordingPrior


@pytest.fixture
def prior() -> RecordingPrior:
    return RecordingPrior()


@pytest.fixture
def cameras(generator: torch.Generator) -> Cameras:
    return CameraSampler(height=4, width=4, num_groups=2)(generator)


@pytest.fixture
def rgb(generator: torch.Generator) -> Tensor:
    return torch.rand(8, 3, 4, 4, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.fixture
def run(prior: RecordingPrior, cameras: Cameras, rgb: Tensor, generator: torch.Generator) -> Step:
    prompt = PromptEncoder(prior, negative_prompt="blurred")("a red cube", cameras)

    def run(distillation: Distillation, step: int = 0, generator: torch.Generator = generator) -> DistillationLoss:
        rgb.grad = None
        loss: DistillationLoss = distillation(rgb, prompt, cameras, step, generator)
        loss.total.backward()
        return loss

    return run
