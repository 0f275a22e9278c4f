"""Distillation against closed forms: a Gaussian prior, whose denoiser is known, and rewards with known answers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from psd.cameras import CameraSampler
from psd.distillation.distillation import Distillation
from psd.distillation.negative_embedding import (
    ImplicitReward,
    NegativeEmbedding,
    NegativeEmbeddingConfig,
    NegativeObjective,
)
from psd.distillation.residuals import NoiseResidual, X0Reconstruction, guide
from psd.distillation.weightings import PreferenceWeighting, SingleWeighting
from psd.priors.multiview import MultiviewPrior
from psd.prompts import PromptEmbeddings, PromptEncoder
from psd.rewards.clip_preference import ClipPreferenceReward
from psd.schedules import Constant
from tests.psd.checkpoints import save_prior, save_reward
from tests.psd.closed_form import (
    CONSTANT,
    SCALE,
    Step,
    T,
    alpha_sigma,
    expected_deltas,
    expected_noise,
    make,
    shown_noise,
)
from tests.psd.fakes import BrightnessReward, RecordingPrior, TableReward


class InvertedPreviews(RecordingPrior):
    def preview(self, z: Tensor) -> Tensor:
        return -z


class TestSds:
    def test_gradient_is_the_closed_form(self, prior: RecordingPrior, rgb: Tensor, run: Step) -> None:
        run(make(prior))
        _, sigma = alpha_sigma(prior)
        torch.testing.assert_close(rgb.grad, sigma**2 * expected_deltas(prior, rgb)[0] / 8)

    def test_expected_gradient_pulls_to_the_guided_mean(
        self, prior: RecordingPrior, rgb: Tensor, run: Step, generator: torch.Generator
    ) -> None:
        """Averaged over noise, ``sigma^2 alpha sigma (z - mean) / (alpha^2 std^2 + sigma^2)``."""
        total = torch.zeros_like(rgb)
        for _ in range(1000):
            run(make(prior))
            assert rgb.grad is not None
            total += rgb.grad
        alpha, sigma = alpha_sigma(prior)
        good, bad = (prior.mean(prior.embed([prompt])) for prompt in ("a red cube", "blurred"))
        pull = alpha * sigma**3 * (rgb.detach() - bad - SCALE * (good - bad)) / (alpha**2 * prior.std**2 + sigma**2)
        torch.testing.assert_close(total / 1000, pull / 8, atol=0.02, rtol=0)

    def test_reconstruction_without_rescale_is_sds_with_another_weight(
        self, prior: RecordingPrior, rgb: Tensor, run: Step
    ) -> None:
        loss = run(make(prior, X0Reconstruction(guidance_scale=Constant(SCALE), rescale=0.0)))
        alpha, sigma = alpha_sigma(prior)
        pull = sigma / alpha * expected_deltas(prior, rgb)[0]
        torch.testing.assert_close(rgb.grad, pull / 8)
        # MVDream's loss: half the squared distance to the reconstruction, over the number of views.
        torch.testing.assert_close(loss.total.detach(), 0.5 * pull.square().sum() / 8)

    def test_rescale_pulls_the_spread_of_a_group_to_the_unguided_one(
        self, prior: RecordingPrior, rgb: Tensor, run: Step
    ) -> None:
        run(make(prior, X0Reconstruction(guidance_scale=Constant(SCALE), rescale=0.3)))
        alpha, sigma = alpha_sigma(prior)
        z, noise = rgb.detach(), shown_noise(prior, rgb)[0]
        z_t = alpha * z + sigma * noise
        guided = (z_t - sigma * (noise + expected_deltas(prior, rgb)[0])) / alpha
        unguided = (z_t - sigma * expected_noise(prior, z_t, "a red cube")) / alpha
        for group in (slice(0, 4), slice(4, 8)):
            rescaled = guided[group] * unguided[group].std() / guided[group].std()
            target = 0.3 * rescaled + 0.7 * guided[group]
            assert rgb.grad is not None
            torch.testing.assert_close(rgb.grad[group], (z[group] - target) / 8)

    def test_guidance_one_is_the_prompt_alone(self) -> None:
        positive, negative = torch.randn(3), torch.randn(3)
        torch.testing.assert_close(guide(positive, negative, 1.0), positive)

    def test_nothing_is_decoded(self, prior: RecordingPrior, run: Step) -> None:
        loss = run(make(prior, reward=BrightnessReward()))
        assert not prior.decoded
        assert "reward" not in loss.terms

    def test_timestep_is_shared_by_a_group_and_drawn_in_range(self, prior: RecordingPrior, run: Step) -> None:
        distillation = make(prior)
        distillation.min_t, distillation.max_t = Constant(0.2), Constant(0.4)
        drawn = []
        for _ in range(300):
            run(distillation)
            t = prior.asked[-1][1].unflatten(0, (-1, 4))
            assert (t == t[:, :1]).all()
            assert torch.equal(t[:2], t[2:])  # with and without the prompt
            drawn.append(t[:2, 0])
        every = torch.cat(drawn)
        assert 199 <= every.min() < 215
        assert 385 < every.max() <= 399
        assert (every.view(-1, 2)[:, 0] != every.view(-1, 2)[:, 1]).any()

    @pytest.mark.parametrize(("low", "high"), [(0.5, 0.4), (-0.1, 0.4), (0.5, 1.1)])
    def test_impossible_timesteps(self, prior: RecordingPrior, run: Step, low: float, high: float) -> None:
        distillation = make(prior)
        distillation.min_t, distillation.max_t = Constant(low), Constant(high)
        with pytest.raises(ValueError, match=r"need 0 <= min_t <= max_t <= 1, got .* at step 3"):
            run(distillation, step=3)


class TestPreference:
    def test_scale_zero_is_sds_on_the_winner(self, prior: RecordingPrior, rgb: Tensor, run: Step) -> None:
        """Per group: the first candidate wins the first group, the second the second."""
        reward = TableReward([1.0] * 4 + [0.0] * 4 + [0.0] * 4 + [1.0] * 4)
        run(make(prior, weighting=PreferenceWeighting(scale=Constant(0.0)), reward=reward))
        _, sigma = alpha_sigma(prior)
        deltas = expected_deltas(prior, rgb)
        winner = torch.cat([deltas[0, :4], deltas[1, 4:]])
        torch.testing.assert_close(rgb.grad, sigma**2 * winner / 8)

    def test_gradient_favours_the_winner_over_the_loser(self, prior: RecordingPrior, rgb: Tensor, run: Step) -> None:
        reward = TableReward([0.0] * 8 + [1.0] * 8)
        run(make(prior, weighting=CONSTANT, reward=reward))
        _, sigma = alpha_sigma(prior)
        loser, winner = expected_deltas(prior, rgb)
        torch.testing.assert_close(rgb.grad, sigma**2 * (winner + 2 * (winner - loser)) / 8)

    def test_a_group_wins_by_its_mean(self, prior: RecordingPrior, rgb: Tensor, run: Step) -> None:
        """Three views of a candidate are better, but the fourth is worse by more."""
        reward = TableReward([1.0, 1.0, 1.0, 0.0] * 2 + [0.0, 0.0, 0.0, 4.0] * 2)
        loss = run(make(prior, weighting=PreferenceWeighting(scale=Constant(0.0)), reward=reward))
        _, sigma = alpha_sigma(prior)
        torch.testing.assert_close(rgb.grad, sigma**2 * expected_deltas(prior, rgb)[1] / 8)
        assert loss.terms["reward_gap"].item() == pytest.approx(0.25)
        assert loss.terms["reward"].item() == pytest.approx(0.875)

    def test_reward_sees_the_decoded_estimates(self, prior: RecordingPrior, rgb: Tensor, run: Step) -> None:
        run(make(prior, weighting=CONSTANT, reward=BrightnessReward()))
        alpha, sigma = alpha_sigma(prior)
        noise = shown_noise(prior, rgb)
        estimates = (alpha * rgb.detach() - sigma * expected_deltas(prior, rgb)) / alpha
        assert noise.shape[0] == 2
        torch.testing.assert_close(torch.stack(prior.decoded), estimates)

    def test_a_reward_that_only_ranks_sees_previews(self, rgb: Tensor, run: Step) -> None:
        prior = InvertedPreviews()
        loss = run(make(prior, weighting=CONSTANT, reward=BrightnessReward()))
        assert not prior.decoded
        alpha, sigma = alpha_sigma(prior)
        estimates = (alpha * rgb.detach() - sigma * expected_deltas(prior, rgb)) / alpha
        torch.testing.assert_close(loss.terms["reward"], -estimates.mean())

    def test_candidates_share_their_timestep_and_differ_in_noise(
        self, prior: RecordingPrior, rgb: Tensor, run: Step
    ) -> None:
        run(make(prior, weighting=CONSTANT, reward=BrightnessReward()))
        first, second = shown_noise(prior, rgb)
        assert not torch.allclose(first, second)
        assert (prior.asked[0][1] == T).all()

    @pytest.mark.parametrize(("weighting", "views"), [(SingleWeighting(), 16), (CONSTANT, 32)])
    def test_the_network_is_asked_once(
        self, prior: RecordingPrior, run: Step, weighting: SingleWeighting | PreferenceWeighting, views: int
    ) -> None:
        loss = run(make(prior, weighting=weighting, reward=BrightnessReward()))
        assert [len(z_t) for z_t, _, _ in prior.asked] == [views]
        assert loss.unet_calls == views

    def test_needs_a_reward(self, prior: RecordingPrior) -> None:
        with pytest.raises(ValueError, match="PreferenceWeighting compares candidates by a reward"):
            make(prior, weighting=CONSTANT)


ASCENT = NegativeObjective.REWARD_ASCENT


class TestNegativeEmbedding:
    def test_implicit_reward_by_hand(self) -> None:
        """One group of one view of one value: errors 4 and 1 for the winner, 9 and 1 for the loser."""
        as_noise = lambda *values: torch.tensor(values, dtype=torch.float64).view(2, 1, 1, 1, 1)  # noqa: E731
        text = torch.zeros(2, 1, 1, 1, dtype=torch.float64, requires_grad=True)
        reward = ImplicitReward.measure(
            positive=as_noise(0.0, 0.0),
            moved=as_noise(2.0, 3.0) + text[..., None] * 0.5,
            reference=as_noise(1.0, 1.0),
            noise=as_noise(0.0, 0.0),
            text=text,
            guidance_scale=0.0,
            group_size=1,
        )
        assert reward.gain.tolist() == [[3.0], [8.0]]
        assert reward.slope.flatten().tolist() == [2 * 2.0 * 0.5, 2 * 3.0 * 0.5]
        loss = reward.loss(torch.tensor([[1.0], [0.0]]), beta=0.1)
        # -log sigmoid(-0.1 ((4 - 1) - (9 - 1))) = -log sigmoid(0.5)
        factor = 1 / (1 + math.exp(0.5))
        assert loss.value.item() == pytest.approx(-math.log(1 - factor))
        assert loss.factor.item() == pytest.approx(factor)
        assert loss.gradient.item() == pytest.approx(0.1 * factor * (2.0 - 3.0))

    @pytest.mark.parametrize("scale", [0.5, 1.0, SCALE])
    def test_implicit_reward_gradient_is_that_of_the_published_loss(
        self, prior: RecordingPrior, rgb: Tensor, scale: float
    ) -> None:
        """Three candidates of two groups; Diffusion-DPO's loss written out, and its gradient by autograd."""
        t, noise = torch.full((8,), T), torch.randn(3, 8, 3, 4, 4, dtype=torch.float64)
        noised = torch.stack([prior.noise_schedule.add_noise(rgb.detach(), each, t) for each in noise])
        positive, negative = prior.embed(["a red cube"]), prior.embed(["blurred"])
        rewards = torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, 3.0]])
        offset = torch.randn(3, 8, dtype=torch.float64).div(10).requires_grad_()

        def predict(text: Tensor) -> Tensor:
            texts = text.expand(3, 8, -1, -1)
            return torch.stack([prior.predict_noise(*each, None) for each in zip(noised, [t] * 3, texts, strict=True)])

        guided = [guide(predict(positive), predict(text), scale) for text in (negative + offset, negative)]
        errors = [(each - noise).square().unflatten(1, (2, 4)).mean((2, 3, 4, 5)) for each in guided]
        gain = (errors[0] - errors[1]) / max(1, abs(scale - 1)) ** 2
        margin = 0.1 * torch.stack([gain[1, 0] - gain[2, 0], gain[2, 1] - gain[0, 1]])
        expected = -F.logsigmoid(-margin).mean()

        text = (negative + offset.detach()).repeat(3, 8, 1, 1).requires_grad_()
        reward = ImplicitReward.measure(
            positive=predict(positive),
            moved=predict(text),
            reference=predict(negative),
            noise=noise,
            text=text,
            guidance_scale=scale,
            group_size=4,
        )
        loss = reward.loss(rewards, beta=0.1)
        torch.testing.assert_close(loss.value, expected.detach())
        torch.testing.assert_close(loss.factor, margin.detach().sigmoid().mean())
        torch.testing.assert_close(loss.gradient, torch.autograd.grad(expected, offset)[0])

    @pytest.mark.parametrize("scale", [2.0, 7.5, 50.0, 100.0])
    def test_beta_means_the_same_under_any_guidance(self, scale: float) -> None:
        """Predictions with rounding errors of bfloat16, at Diffusion-DPO's beta, a trained model's size of error."""
        generator = torch.Generator().manual_seed(0)

        def draw(spread: float) -> Tensor:
            return spread * torch.randn(2, 4, 4, 32, 32, generator=generator)

        noise = draw(1.0)
        reference = noise + draw(0.3)
        text = torch.zeros(2, 4, 1, 1, requires_grad=True)
        reward = ImplicitReward.measure(
            positive=reference + draw(0.05),
            moved=reference * (1 + draw(2**-8)) + 0 * text[..., None],
            reference=reference * (1 + draw(2**-8)),
            noise=noise,
            text=text,
            guidance_scale=scale,
            group_size=4,
        )
        factor = reward.loss(torch.tensor([[1.0], [0.0]]), beta=5000.0).factor.item()
        assert factor == pytest.approx(0.5, abs=0.1)

    @pytest.mark.parametrize("objective", list(NegativeObjective))
    def test_first_update_follows_the_objective(
        self, prior: RecordingPrior, rgb: Tensor, run: Step, objective: NegativeObjective
    ) -> None:
        """Adam's first step moves every value by lr against the gradient, whose sign finite differences tell."""
        config = NegativeEmbeddingConfig(objective=objective, lr=1e-6, beta=1.0)

        def loss_at(offset: Tensor) -> float:
            distillation = make(prior, weighting=CONSTANT, reward=BrightnessReward(), negative=config)
            assert distillation.negative_embedding is not None
            with torch.no_grad():
                distillation.negative_embedding.offset.copy_(offset)
            return run(distillation, generator=torch.Generator().manual_seed(1)).terms["negative_loss"].item()

        distillation = make(prior, weighting=CONSTANT, reward=BrightnessReward(), negative=config)
        run(distillation, generator=torch.Generator().manual_seed(1))
        assert distillation.negative_embedding is not None
        moved = distillation.negative_embedding.offset.detach()
        for index in [(0, 0), (1, 3), (2, 7)]:
            probe = torch.zeros_like(moved)
            probe[index] = 1e-4
            slope = (loss_at(probe) - loss_at(-probe)) / 2e-4
            assert moved[index].item() == pytest.approx(-1e-6 if slope > 0 else 1e-6)

    def test_ascent_raises_the_reward(self, prior: RecordingPrior, run: Step) -> None:
        config = NegativeEmbeddingConfig(objective=ASCENT, lr=0.05)
        distillation = make(prior, reward=BrightnessReward(), negative=config)
        rewards = [run(distillation, step).terms["reward"].item() for step in range(40)]
        assert sum(rewards[-5:]) > sum(rewards[:5]) + 0.5

    def test_implicit_reward_tells_a_winner_from_a_loser(self, prior: RecordingPrior, run: Step) -> None:
        """The same two noises again and again."""
        config = NegativeEmbeddingConfig(lr=0.03, beta=400.0)
        distillation = make(prior, weighting=CONSTANT, reward=BrightnessReward(), negative=config)
        losses = [
            run(distillation, step, torch.Generator().manual_seed(1)).terms["negative_loss"].item()
            for step in range(30)
        ]
        assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # log 2: nothing has moved yet
        assert losses[-1] < losses[15] < 0.6

    def test_no_graph_is_left_when_candidates_are_decoded(self, run: Step) -> None:
        class Watching(RecordingPrior):
            def preview(self, z: Tensor) -> Tensor:
                assert not z.requires_grad
                return super().preview(z)

        distillation = make(
            Watching(), weighting=CONSTANT, reward=BrightnessReward(), negative=NegativeEmbeddingConfig()
        )
        assert run(distillation).terms["negative_drift"] > 0

    def test_a_step_uses_the_embedding_as_it_was(self, prior: RecordingPrior, rgb: Tensor, run: Step) -> None:
        reward, same = BrightnessReward(), {"generator": torch.Generator().manual_seed(1)}
        run(make(prior, weighting=CONSTANT, reward=reward), **same)
        assert rgb.grad is not None
        plain = rgb.grad.clone()
        same["generator"].manual_seed(1)
        run(make(prior, weighting=CONSTANT, reward=reward, negative=NegativeEmbeddingConfig(lr=1.0)), **same)
        torch.testing.assert_close(rgb.grad, plain)

    @pytest.mark.parametrize("objective", list(NegativeObjective))
    def test_learning_rate_zero_changes_nothing(
        self, prior: RecordingPrior, rgb: Tensor, run: Step, objective: NegativeObjective
    ) -> None:
        gradients = []
        for negative in (None, NegativeEmbeddingConfig(objective=objective, lr=0.0)):
            seeded = torch.Generator().manual_seed(1)
            distillation = make(prior, weighting=CONSTANT, reward=BrightnessReward(), negative=negative)
            for step in range(3):
                run(distillation, step, seeded)
            assert rgb.grad is not None
            gradients.append(rgb.grad.clone())
        torch.testing.assert_close(*gradients)

    def test_trust_region_holds(self, prior: RecordingPrior, run: Step) -> None:
        config = NegativeEmbeddingConfig(objective=ASCENT, lr=0.1, max_norm=0.3)
        distillation = make(prior, reward=BrightnessReward(), negative=config)
        drifts = [run(distillation, step).terms["negative_drift"].item() for step in range(10)]
        assert max(drifts) <= 0.3 + 1e-9
        assert drifts[-1] == pytest.approx(0.3)

    def test_schedule_and_cost(self, prior: RecordingPrior, run: Step) -> None:
        """Sixteen views and two texts on idle steps; the reference as a third text on steps that compare with it.

        Reference and moved text are asked about in calls of one shape.
        """
        config = NegativeEmbeddingConfig(start=2, interval=3, stop=8)
        distillation = make(prior, weighting=CONSTANT, reward=BrightnessReward(), negative=config)
        losses = [run(distillation, step) for step in range(10)]
        assert [step for step, loss in enumerate(losses) if "negative_loss" in loss.terms] == [2, 5]
        assert [loss.unet_calls for loss in losses] == [48 if step in (2, 5) else 32 for step in range(10)]
        assert [len(z_t) for z_t, _, _ in prior.asked[:5]] == [32, 32, 16, 16, 16]

    def test_ascent_costs_no_extra_call(self, prior: RecordingPrior, run: Step) -> None:
        config = NegativeEmbeddingConfig(objective=ASCENT)
        assert run(make(prior, reward=BrightnessReward(), negative=config)).unet_calls == 16

    def test_learning_rate_decays_with_each_update(self) -> None:
        embedding = NegativeEmbedding(NegativeEmbeddingConfig(lr=0.1, lr_decay=0.5), like=torch.zeros(1, 1))
        positions = [0.0]
        for step in range(3):
            embedding.update(torch.tensor([[-1.0]]), step)
            positions.append(embedding.offset.item())
        assert positions == pytest.approx([0.0, 0.1, 0.15, 0.175])

    def test_state_goes_on_where_it_stopped(self) -> None:
        config = NegativeEmbeddingConfig(lr=0.1, lr_decay=0.9)
        through, before, after = (NegativeEmbedding(config, like=torch.zeros(2, 2)) for _ in range(3))
        targets = torch.randn(6, 2, 2)

        def climb(embedding: NegativeEmbedding, steps: range) -> None:
            for step in steps:
                embedding.update(embedding.offset.detach() - targets[step], step)

        climb(through, range(6))
        climb(before, range(3))
        after.load_state_dict(before.state_dict())
        climb(after, range(3, 6))
        assert torch.equal(after.offset, through.offset)

    def test_impossible_combinations(self, prior: RecordingPrior) -> None:
        with pytest.raises(ValueError, match="needs a winner and a loser"):
            make(prior, reward=BrightnessReward(), negative=NegativeEmbeddingConfig())
        with pytest.raises(ValueError, match="needs a differentiable reward"):
            make(prior, reward=TableReward([0.0]), negative=NegativeEmbeddingConfig(objective=ASCENT))

    @pytest.mark.parametrize(
        "setting",
        [{"interval": 0}, {"lr": -1.0}, {"max_norm": -1.0}, {"beta": 0.0}, {"lr_decay": 0.0}, {"lr_decay": 1.1}],
    )
    def test_impossible_settings(self, setting: dict[str, float]) -> None:
        with pytest.raises(ValueError, match=next(iter(setting))):
            NegativeEmbeddingConfig(**setting)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> MultiviewPrior:
    return MultiviewPrior.from_pretrained(save_prior(tmp_path_factory.mktemp("prior")))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> ClipPreferenceReward:
    return ClipPreferenceReward.from_pretrained(save_reward(tmp_path_factory.mktemp("reward")))


@pytest.mark.parametrize("objective", [None, *NegativeObjective])
def test_only_the_picture_gets_a_gradient(
    network: MultiviewPrior, clip: ClipPreferenceReward, objective: NegativeObjective | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    negative = None if objective is None else NegativeEmbeddingConfig(objective=objective)
    distillation = Distillation(
        prior=network, residual=X0Reconstruction(), weighting=CONSTANT, reward=clip, negative_embedding=negative
    )
    cameras = CameraSampler(height=16, width=16)(generator)
    prompt = PromptEncoder(network)("red cube", cameras)
    rgb = torch.rand(4, 3, 16, 16).requires_grad_()
    loss = distillation(rgb, prompt, cameras, 0, generator)
    loss.total.backward()
    assert rgb.grad is not None
    assert rgb.grad.abs().max() > 0
    for model in (network._unet, network._autoencoder, network._text_encoder, clip._model):
        assert all(parameter.grad is None for parameter in model.parameters())
    own = {"spread.variance", "spread.total_weight"}
    if objective is not None:
        own |= {"negative_embedding.offset", "negative_embedding._extra_state"}
        assert loss.terms["negative_drift"] > 0
    assert distillation.state_dict().keys() == own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embedding_that_has_not_moved_has_no_implicit_reward(
    tmp_path: Path, clip: ClipPreferenceReward, dtype: torch.dtype
) -> None:
    """To the last bit, or guidance would make a reward of rounding errors."""
    prior = MultiviewPrior.from_pretrained(save_prior(tmp_path), dtype=dtype)
    distillation = Distillation(
        prior=prior,
        residual=X0Reconstruction(guidance_scale=Constant(50.0)),
        weighting=CONSTANT,
        reward=clip,
        negative_embedding=NegativeEmbeddingConfig(),
    )
    generator = torch.Generator().manual_seed(0)
    cameras = CameraSampler(height=16, width=16)(generator)
    prompt = PromptEncoder(prior)("red cube", cameras)
    terms = distillation(torch.rand(4, 3, 16, 16).requires_grad_(), prompt, cameras, 0, generator).terms
    assert terms["negative_factor"] == 0.5
    assert terms["negative_drift"] > 0


def test_works_in_2d(network: MultiviewPrior, clip: ClipPreferenceReward) -> None:
    text = network.embed(["red cube"]).expand(3, -1, -1)
    null = network.embed([""]).expand(3, -1, -1)
    prompt = PromptEmbeddings("red cube", positive=text, negative=null, null=null)
    distillation = Distillation(prior=network, residual=NoiseResidual(), weighting=CONSTANT, reward=clip)
    rgb = torch.rand(3, 3, 16, 16).requires_grad_()
    loss = distillation(rgb, prompt, None, 0, torch.Generator().manual_seed(0))
    loss.total.backward()
    assert loss.unet_calls == 12
    assert rgb.grad is not None
