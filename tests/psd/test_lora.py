"""Low-rank weights beside a frozen network: they change nothing at first, only themselves later, and leave no trace."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor

from psd.cameras import Cameras, CameraSampler
from psd.distillation.distillation import Distillation
from psd.distillation.learned_score import LearnedScoreConfig
from psd.distillation.residuals import VariationalResidual
from psd.distillation.weightings import SingleWeighting
from psd.optimization import Optimization
from psd.priors.base import AdaptablePrior, Adapter
from psd.priors.multiview import MultiviewPrior
from psd.prompts import PromptEncoder
from psd.scenes.backgrounds import FlatBackground
from tests.psd.checkpoints import save_prior
from tests.psd.fakes import ImageScene


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> MultiviewPrior:
    return MultiviewPrior.from_pretrained(save_prior(tmp_path_factory.mktemp("prior")))


@pytest.fixture
def cameras(generator: torch.Generator) -> Cameras:
    return CameraSampler(height=16, width=16)(generator)


@pytest.fixture
def inputs(prior: MultiviewPrior, cameras: Cameras) -> tuple[Tensor, Tensor, Tensor, Cameras]:
    text = prior.embed(["red cube"]).expand(4, -1, -1)
    return torch.randn(4, 4, 8, 8), torch.full((4,), 500), text, cameras


def train(adapter: Adapter, inputs: tuple[Tensor, Tensor, Tensor, Cameras], num_steps: int = 3) -> None:
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.5)
    for _ in range(num_steps):
        adapter(*inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_prior_can_be_adapted(prior: MultiviewPrior) -> None:
    assert isinstance(prior, AdaptablePrior)


def test_new_adapter_predicts_what_the_prior_does(prior: MultiviewPrior, inputs: tuple) -> None:
    expected = prior.predict_noise(*inputs)
    assert torch.equal(prior.make_adapter(2)(*inputs), expected)


def test_training_changes_the_adapter_and_nothing_else(prior: MultiviewPrior, inputs: tuple) -> None:
    before = prior.predict_noise(*inputs)
    one, other = prior.make_adapter(2), prior.make_adapter(3)
    train(one, inputs)
    after = one(*inputs)
    assert after.square().mean() < before.square().mean()
    assert torch.equal(prior.predict_noise(*inputs), before)
    assert torch.equal(other(*inputs), before)
    assert torch.equal(one(*inputs), after)
    assert all(parameter.grad is None for parameter in prior._unet.parameters())
    assert not any(parameter.requires_grad for parameter in prior._unet.parameters())


def test_adapters_of_one_rank_take_turns(prior: MultiviewPrior, inputs: tuple) -> None:
    alone, one, other = (prior.make_adapter(2) for _ in range(3))
    one.load_state_dict(alone.state_dict())
    train(alone, inputs)
    for _ in range(3):
        train(one, inputs, num_steps=1)
        train(other, inputs, num_steps=1)
    assert torch.equal(one(*inputs), alone(*inputs))
    assert not torch.equal(other(*inputs), alone(*inputs))


def test_random_numbers_are_those_of_the_weights_alone(prior: MultiviewPrior) -> None:
    """Whether the network got its layers now or earlier, as in a warm worker, makes no difference."""
    torch.manual_seed(3)
    first = prior.make_adapter(5).state_dict()
    torch.manual_seed(3)
    second = prior.make_adapter(5).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(value.abs().sum() > 0 for name, value in first.items() if name.endswith("lora_A"))
    assert all(value.abs().sum() == 0 for name, value in first.items() if name.endswith("lora_B"))


def test_the_other_gpus_of_a_machine_are_left_alone(prior: MultiviewPrior, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)  # each of which torch would wake, with a warning
    prior.make_adapter(6)


def test_compiled_network_is_refused(prior: MultiviewPrior, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prior, "_is_compiled", True)
    with pytest.raises(ValueError, match=r"set prior\.compile to false"):
        prior.make_adapter(2)


def make(prior: MultiviewPrior) -> Optimization:
    torch.manual_seed(7)
    return Optimization(
        scene=ImageScene(image_size=16, jitter=0.1),
        background=FlatBackground({"": 0.5}),
        cameras=CameraSampler(height=16, width=16),
        distillation=Distillation(
            prior=prior,
            residual=VariationalResidual(),
            weighting=SingleWeighting(),
            learned_score=LearnedScoreConfig(lr=0.01),
        ),
        prompt_encoder=PromptEncoder(prior),
        prompt="red cube",
        seed=0,
    )


def test_vsd_resumes_bit_for_bit_and_stores_no_base_weights(prior: MultiviewPrior) -> None:
    straight, first, second = (make(prior) for _ in range(3))
    expected = [straight.step() for _ in range(4)]
    for _ in range(2):
        first.step()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert [second.step() for _ in range(2)] == expected[2:]
    one, other = straight.distillation.state_dict(), second.distillation.state_dict()
    weights = {name: value for name, value in one.items() if isinstance(value, Tensor)}
    assert all(torch.equal(value, other[name]) for name, value in weights.items())
    learned = {name for name in weights if name.startswith("learned_score.adapter.weights.")}
    assert {name.rpartition("/")[2] for name in learned} == {"lora_A", "lora_B"}
    assert weights.keys() - learned == {"spread.variance", "spread.total_weight"}
    assert any(weights[name].abs().max() > 0 for name in learned if name.endswith("lora_B"))
