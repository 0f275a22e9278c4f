"""Perp-Neg: what is pushed away is perpendicular to what is wanted, worked out by hand and in a whole step."""

from __future__ import annotations

import torch
from torch import Tensor

from psd.distillation.distillation import Distillation
from psd.distillation.perp_neg import push_away
from psd.distillation.residuals import NoiseResidual
from psd.distillation.weightings import SingleWeighting
from psd.prompts import PromptEmbeddings, PromptEncoder
from psd.schedules import Constant
from tests.psd.fakes import RecordingPrior
from tests.psd.test_prompts import cameras_at


def _images(*values: list[int | float]) -> Tensor:
    """Of two values each, one candidate."""
    return torch.tensor(values, dtype=torch.float32).view(1, len(values), 1, 1, 2)


def test_by_hand() -> None:
    """Wanted (2, 0); unwanted (1, 3) loses its part along it, so (0, 3) is subtracted, half and twice."""
    positive, negative = _images([3, 1], [3, 1]), _images([1, 1], [1, 1])
    unwanted = _images([2, 4], [2, 4])[None]
    pushed = push_away(positive, negative, unwanted, torch.tensor([[0.5, 2.0]]))
    torch.testing.assert_close(pushed, _images([3, 1 - 1.5], [3, 1 - 6]))


def test_what_agrees_with_the_prompt_is_left_alone() -> None:
    positive, negative = torch.randn(2, 3, 4, 2, 2), torch.randn(2, 3, 4, 2, 2)
    unwanted = torch.stack([negative + 5 * (positive - negative), positive])
    torch.testing.assert_close(push_away(positive, negative, unwanted, torch.ones(2, 3)), positive)


def test_a_step_guides_by_it() -> None:
    """Against the gradient of SDS written out from the prior's predictions; both other sides are asked about once."""
    prior, cameras = RecordingPrior(group_size=1), cameras_at([40.0, 170.0])
    prompt = PromptEncoder(prior, view_dependent=True, perp_neg=True)("a cube", cameras)
    assert prompt.unwanted is not None
    scale = 7.5
    distillation = Distillation(
        prior=prior, residual=NoiseResidual(guidance_scale=Constant(scale)), weighting=SingleWeighting()
    )
    rgb = torch.rand(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    loss = distillation(rgb, prompt, cameras, 0, torch.Generator().manual_seed(0))
    loss.total.backward()
    assert loss.unet_calls == 2 * 4
    [(z_t, t, _)] = prior.asked
    z_t, t = z_t[:2], t[:2]

    def ask(text: Tensor) -> Tensor:
        return prior.predict_noise(z_t, t, text, cameras)[None]

    positive, negative = ask(prompt.positive), ask(prompt.negative)
    pushed = push_away(
        positive, negative, torch.stack([ask(x) for x in prompt.unwanted.texts]), prompt.unwanted.weights
    )
    noise = (z_t - prior.noise_schedule.alpha(t) * rgb.detach()) / prior.noise_schedule.sigma(t)
    guided = (negative + scale * (pushed - negative))[0]
    expected = prior.noise_schedule.sigma(t) ** 2 * (guided - noise) / 2
    torch.testing.assert_close(rgb.grad, expected)
    plain = PromptEmbeddings(prompt.prompt, prompt.positive, prompt.negative, prompt.null)
    other = distillation(rgb, plain, cameras, 0, torch.Generator().manual_seed(0))
    assert other.unet_calls == 2 * 2
    assert not torch.allclose(other.total, loss.total)
