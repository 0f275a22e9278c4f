"""The methods beside SDS and PSD, against gradients worked out by hand on a Gaussian prior."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from psd.cameras import Cameras
from psd.distillation.denoising import Denoiser
from psd.distillation.distillation import Distillation, Ranking
from psd.distillation.learned_score import LearnedScore, LearnedScoreConfig
from psd.distillation.negative_embedding import ImplicitReward, NegativeEmbeddingConfig, NegativeObjective
from psd.distillation.residuals import (
    Candidates,
    ClassifierResidual,
    NoiseResidual,
    NoiseWeight,
    VariationalResidual,
    X0Reconstruction,
)
from psd.distillation.reward_gradient import RewardBalance, RewardGradientConfig, RewardImage
from psd.distillation.weightings import (
    BestWeighting,
    DreamDpoVariant,
    DreamDpoWeighting,
    MinMaxWeighting,
    PreferenceBase,
    PreferenceWeighting,
    SoftmaxWeighting,
    Weighting,
)
from psd.priors.gaussian import GaussianAdapter, GaussianPrior
from psd.prompts import PromptEmbeddings
from psd.schedules import Constant, Linear, Steps
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

THREE = TableReward([1.0] * 4 + [2.0] * 4 + [3.0] * 4 + [1.0] * 4 + [2.0] * 4 + [3.0] * 4)  # by candidate, by group
# The first group's rewards are 1, 3, 2 and the second's 2, 1, 3.


def seen(prior: RecordingPrior, rgb: Tensor) -> tuple[Tensor, Tensor, float]:
    """The noise and the noised latents of each candidate, and sigma_t^2."""
    alpha, sigma = alpha_sigma(prior)
    noise = shown_noise(prior, rgb)
    return noise, alpha * rgb.detach() + sigma * noise, sigma**2


def by_group(parts: Tensor, *coefficients: tuple[float, float]) -> Tensor:
    """The sum of candidates' parts, with a coefficient for each candidate and group."""
    per_group = torch.tensor(coefficients, dtype=parts.dtype)
    return (per_group.repeat_interleave(4, dim=1)[..., None, None, None] * parts).sum(0)


class TestClassifier:
    @pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
    def test_gradient_is_the_closed_form(self, prior: RecordingPrior, rgb: Tensor, run: Step, share: float) -> None:
        run(make(prior, ClassifierResidual(negative_weight=Constant(share))))
        _, sigma = alpha_sigma(prior)
        alpha = alpha_sigma(prior)[0]
        z_t = prior.asked[0][0][:8]
        good, empty, bad = (expected_noise(prior, z_t, prompt) for prompt in ("a red cube", "", "blurred"))
        expected = sigma**2 * (good - (1 - share) * empty - share * bad)
        torch.testing.assert_close(rgb.grad, expected / 8)
        # The noise cancels in closed form: what is left is the difference of the means.
        means = [prior.mean(prior.embed([prompt])) for prompt in ("a red cube", "", "blurred")]
        pull = (
            alpha
            * sigma**3
            / (alpha**2 * prior.std**2 + sigma**2)
            * ((1 - share) * means[1] + share * means[2] - means[0])
        )
        torch.testing.assert_close(rgb.grad, pull.expand(8, -1, -1, -1) / 8)

    def test_no_prompt_is_asked_about_only_where_it_counts(self, prior: RecordingPrior, run: Step) -> None:
        assert run(make(prior, ClassifierResidual())).unet_calls == 16
        assert run(make(prior, ClassifierResidual(negative_weight=Constant(0.5)))).unet_calls == 24

    def test_share_follows_a_schedule_within_bounds(self, prior: RecordingPrior, run: Step) -> None:
        distillation = make(prior, ClassifierResidual(negative_weight=Linear(start=0, end=2, end_step=4)))
        run(distillation, step=2)
        with pytest.raises(ValueError, match=r"negative_weight must be between 0 and 1, got 1\.5 at step 3"):
            run(distillation, step=3)


@pytest.mark.parametrize("noise_weight", list(NoiseWeight))
def test_weights_of_noise(prior: RecordingPrior, rgb: Tensor, run: Step, noise_weight: NoiseWeight) -> None:
    run(make(prior, NoiseResidual(guidance_scale=Constant(SCALE), noise_weight=noise_weight)))
    alpha, sigma = alpha_sigma(prior)
    weight = {"variance": sigma**2, "uniform": 1.0, "reconstruction": sigma / alpha}[noise_weight.value]
    torch.testing.assert_close(rgb.grad, weight * expected_deltas(prior, rgb)[0] / 8)


class TestDreamDpo:
    # The first candidate wins the first group by 1, the second the second by 3.
    reward = TableReward([1.0] * 4 + [0.0] * 4 + [0.0] * 4 + [3.0] * 4)

    @pytest.mark.parametrize(
        ("threshold", "coefficients"),
        [(0.0, [(1, -1), (-1, 1)]), (2.0, [(1, -1), (0, 1)]), (1.0, [(1, -1), (-1, 1)]), (4.0, [(1, 0), (0, 1)])],
    )
    def test_published_gradient_is_the_closed_form(
        self,
        prior: RecordingPrior,
        rgb: Tensor,
        run: Step,
        threshold: float,
        coefficients: list[tuple[float, float]],
    ) -> None:
        run(make(prior, weighting=DreamDpoWeighting(threshold=threshold), reward=self.reward))
        _, _, weight = seen(prior, rgb)
        expected = weight * by_group(expected_deltas(prior, rgb), *coefficients)
        torch.testing.assert_close(rgb.grad, expected / 8)

    def test_code_subtracts_an_unguided_loser_and_forgets_the_noise(
        self, prior: RecordingPrior, rgb: Tensor, run: Step
    ) -> None:
        weighting = DreamDpoWeighting(threshold=2.0, variant=DreamDpoVariant.CODE)
        run(make(prior, weighting=weighting, reward=self.reward))
        noise, z_t, weight = seen(prior, rgb)
        deltas = expected_deltas(prior, rgb)
        small_gap = deltas[0, :4] + noise[0, :4]  # the guided prediction itself
        loser = expected_noise(prior, z_t[0, 4:], "a red cube") - noise[0, 4:]
        expected = weight * torch.cat([small_gap, deltas[1, 4:] - loser])
        torch.testing.assert_close(rgb.grad, expected / 8)

    def test_code_on_reconstruction_is_the_same_with_another_weight(
        self, prior: RecordingPrior, rgb: Tensor, run: Step
    ) -> None:
        weighting = DreamDpoWeighting(threshold=2.0, variant=DreamDpoVariant.CODE)
        gradients = []
        for residual in (
            NoiseResidual(guidance_scale=Constant(SCALE), noise_weight=NoiseWeight.RECONSTRUCTION),
            X0Reconstruction(guidance_scale=Constant(SCALE), rescale=0.0),
        ):
            seeded = torch.Generator().manual_seed(1)
            run(make(prior, residual, weighting, self.reward), generator=seeded)
            assert rgb.grad is not None
            gradients.append(rgb.grad.clone())
        torch.testing.assert_close(*gradients)


class TestRewardSds:
    @pytest.mark.parametrize(
        ("weighting", "coefficients"),
        [
            (BestWeighting(num_candidates=3, num_best=1), [(0, 0), (1, 0), (0, 1)]),
            (BestWeighting(num_candidates=3, num_best=2), [(0, 0.5), (0.5, 0), (0.5, 0.5)]),
            (MinMaxWeighting(num_candidates=3, num_best=1, num_worst=1), [(-0.1, 0), (0.9, -0.1), (0, 0.9)]),
            (MinMaxWeighting(num_candidates=3, num_best=2, num_worst=1), [(-0.1, 0.45), (0.45, -0.1), (0.45, 0.45)]),
        ],
    )
    def test_gradient_is_the_closed_form(
        self,
        prior: RecordingPrior,
        rgb: Tensor,
        run: Step,
        weighting: Weighting,
        coefficients: list[tuple[float, float]],
    ) -> None:
        run(make(prior, weighting=weighting, reward=THREE))
        _, _, weight = seen(prior, rgb)
        expected = weight * by_group(expected_deltas(prior, rgb), *coefficients)
        torch.testing.assert_close(rgb.grad, expected / 8)

    def test_softmax_gradient_is_the_closed_form(self, prior: RecordingPrior, rgb: Tensor, run: Step) -> None:
        run(make(prior, weighting=SoftmaxWeighting(num_candidates=3, temperature=0.5), reward=THREE))
        e = [math.exp(reward / 0.5) for reward in (1, 2, 3)]
        one, two, three = (part / sum(e) for part in e)
        _, _, weight = seen(prior, rgb)
        expected = weight * by_group(expected_deltas(prior, rgb), (one, two), (three, one), (two, three))
        torch.testing.assert_close(rgb.grad, expected / 8, rtol=1e-6, atol=1e-7)

    def test_all_candidates_share_one_call_and_one_timestep(self, prior: RecordingPrior, run: Step) -> None:
        loss = run(make(prior, weighting=MinMaxWeighting(), reward=BrightnessReward()))
        assert [len(z_t) for z_t, _, _ in prior.asked] == [2 * 7 * 8]
        assert loss.unet_calls == 112
        assert (prior.asked[0][1] == T).all()


class TestManyCandidates:
    def test_best_and_worst_are_the_pair(self, prior: RecordingPrior, rgb: Tensor, run: Step) -> None:
        weighting = PreferenceWeighting(num_candidates=3, scale=CONSTANT.scale, scaling=CONSTANT.scaling)
        run(make(prior, weighting=weighting, reward=THREE))
        _, _, weight = seen(prior, rgb)
        expected = weight * by_group(expected_deltas(prior, rgb), (-2, 0), (3, -2), (0, 3))
        torch.testing.assert_close(rgb.grad, expected / 8)

    def test_mean_base_at_scale_zero_is_sds_on_all(self, prior: RecordingPrior, rgb: Tensor, run: Step) -> None:
        weighting = PreferenceWeighting(num_candidates=3, scale=Constant(0.0), base=PreferenceBase.MEAN)
        run(make(prior, weighting=weighting, reward=THREE))
        _, _, weight = seen(prior, rgb)
        torch.testing.assert_close(rgb.grad, weight * expected_deltas(prior, rgb).mean(0) / 8)

    def test_implicit_reward_of_three(self, prior: RecordingPrior, run: Step) -> None:
        """The best and the worst speak; the one between adds a third to the cost."""
        weighting = PreferenceWeighting(num_candidates=3)
        distillation = make(prior, weighting=weighting, reward=THREE, negative=NegativeEmbeddingConfig(beta=1.0))
        loss = run(distillation)
        assert loss.unet_calls == 3 * 3 * 8
        assert loss.terms["negative_loss"].item() == pytest.approx(math.log(2))
        assert loss.terms["negative_drift"] > 0


class TestRanking:
    @pytest.mark.parametrize(
        ("steps", "ranked"),
        [(Steps(interval=3), {0, 3, 6}), (Steps(stop=2), {0, 1}), (Steps(interval=2, stop=5), {0, 2, 4})],
    )
    def test_other_steps_take_one_noise_as_it_is(
        self, prior: RecordingPrior, run: Step, steps: Steps, ranked: set[int]
    ) -> None:
        distillation = make(prior, weighting=CONSTANT, reward=BrightnessReward(), ranking=Ranking(steps=steps))
        losses = [run(distillation, step) for step in range(8)]
        assert [loss.unet_calls for loss in losses] == [32 if step in ranked else 16 for step in range(8)]
        assert [step for step, loss in enumerate(losses) if "reward" in loss.terms] == sorted(ranked)
        assert [len(views) for views in prior.decoded] == [8, 8] * len(ranked)  # candidates one after another

    def test_a_climb_between_ranked_steps_has_a_reward_and_no_gap(self, prior: RecordingPrior, run: Step) -> None:
        ascent = NegativeEmbeddingConfig(objective=NegativeObjective.REWARD_ASCENT)
        ranking = Ranking(steps=Steps(interval=2))
        distillation = make(prior, weighting=CONSTANT, reward=BrightnessReward(), ranking=ranking, negative=ascent)
        terms = [run(distillation, step).terms for step in range(4)]
        assert ["reward" in found for found in terms] == [True] * 4
        assert ["reward_gap" in found for found in terms] == [True, False] * 2

    def test_between_it_is_sds(self, prior: RecordingPrior, rgb: Tensor, run: Step) -> None:
        ranking = Ranking(steps=Steps(interval=2))
        run(make(prior, weighting=CONSTANT, reward=BrightnessReward(), ranking=ranking), step=1)
        _, _, weight = seen(prior, rgb)
        torch.testing.assert_close(rgb.grad, weight * expected_deltas(prior, rgb)[0] / 8)

    @pytest.mark.parametrize(
        ("negative", "updates"),
        [
            (NegativeEmbeddingConfig(interval=3), [0, 4, 8]),
            (NegativeEmbeddingConfig(start=1, interval=2), [2, 4, 6, 8, 10]),  # which never meets an even step
            (NegativeEmbeddingConfig(start=3, interval=5, stop=9), [4]),
            (NegativeEmbeddingConfig(start=1, interval=4, objective=NegativeObjective.REWARD_ASCENT), [1, 5, 9]),
        ],
    )
    def test_implicit_reward_waits_for_ranked_candidates(
        self, prior: RecordingPrior, run: Step, negative: NegativeEmbeddingConfig, updates: list[int]
    ) -> None:
        """Of which every second step has some. Resumed in between, it counts on."""
        ranking = Ranking(steps=Steps(interval=2))
        straight, first, second = (
            make(prior, weighting=CONSTANT, reward=BrightnessReward(), ranking=ranking, negative=negative)
            for _ in range(3)
        )
        terms = [run(straight, step).terms for step in range(11)]
        assert [step for step, found in enumerate(terms) if "negative_loss" in found] == updates
        assert all("negative_drift" in found for found in terms)
        resumed = [run(first, step).terms for step in range(3)]
        second.load_state_dict(first.state_dict())
        resumed += [run(second, step).terms for step in range(3, 11)]
        assert [step for step, found in enumerate(resumed) if "negative_loss" in found] == updates

    @pytest.mark.parametrize(
        "weighting",
        [CONSTANT, DreamDpoWeighting(), SoftmaxWeighting(num_candidates=2), BestWeighting(num_candidates=2),
         MinMaxWeighting(num_candidates=2, num_best=1, num_worst=1)],
        ids=lambda weighting: type(weighting).__name__,
    )  # fmt: skip
    def test_rewards_without_gradient_will_do(self, prior: RecordingPrior, run: Step, weighting: Weighting) -> None:
        def reward(rgb: Tensor, prompts: object) -> Tensor:
            assert not rgb.requires_grad
            return rgb.mean(dim=(1, 2, 3))

        reward.differentiable, reward.group_size = False, 1  # type: ignore[attr-defined]
        negative = NegativeEmbeddingConfig()
        assert run(make(prior, weighting=weighting, reward=reward, negative=negative)).terms["reward_gap"] > 0


class TestDdim:
    def denoise(self, num_steps: int, fraction: float = 0.8) -> tuple[Tensor, Tensor, GaussianPrior, Denoiser, Tensor]:
        """Estimates by DDIM, the noised latents, and what they came from; the prompt's own prediction guides."""
        prior = GaussianPrior(dtype=torch.float64)
        generator = torch.Generator().manual_seed(3)
        drawn = torch.tensor([int(fraction * 999), int(fraction * 999) // 2])
        latents = torch.rand(2, 3, 4, 4, generator=generator, dtype=torch.float64)
        noise = torch.randn(3, 2, 3, 4, 4, generator=generator, dtype=torch.float64)
        noised = torch.stack([prior.noise_schedule.add_noise(latents, each, drawn) for each in noise])
        candidates = Candidates(latents, drawn, drawn, noise, noised, 1)
        text = prior.embed(["red cube"]).expand(2, -1, -1)
        denoise = Denoiser(prior, None)
        guided = denoise(noised, drawn, text)[0]
        clean = denoise.follow_ddim(candidates, guided, text, text, guidance_scale=1.0, num_steps=num_steps)
        return clean, noised, prior, denoise, drawn

    def test_many_steps_follow_the_probability_flow(self) -> None:
        """For a Gaussian the flow keeps ``(z_t - alpha mu) / sqrt(alpha^2 std^2 + sigma^2)``."""
        clean, noised, prior, _, t = self.denoise(800)
        alpha, sigma = prior.noise_schedule.alpha(t), prior.noise_schedule.sigma(t)
        mean = prior.mean(prior.embed(["red cube"]))
        expected = mean + (noised - alpha * mean) * prior.std / (alpha**2 * prior.std**2 + sigma**2).sqrt()
        torch.testing.assert_close(clean, expected, atol=0.02, rtol=0)

    def test_few_steps_are_between_the_estimate_and_the_flow(self) -> None:
        one, few, many = (self.denoise(num_steps)[0] for num_steps in (1, 8, 800))
        assert (few - many).abs().mean() < 0.3 * (one - many).abs().mean()

    @pytest.mark.parametrize(("num_steps", "fraction", "calls"), [(15, 0.999, 15), (15, 0.5, 8), (15, 0.01, 1)])
    def test_a_candidate_gets_its_share_of_the_steps(self, num_steps: int, fraction: float, calls: int) -> None:
        """The first call is the residual's, with one text; the others ask with and without the prompt."""
        _, _, _, denoise, _ = self.denoise(num_steps, fraction)
        assert denoise.num_calls == 6 + (calls - 1) * 12

    def test_reward_sees_what_ddim_ends_with(self, prior: RecordingPrior, rgb: Tensor, run: Step) -> None:
        run(make(prior, weighting=CONSTANT, reward=BrightnessReward(), ranking=Ranking(num_ddim_steps=4)))
        alpha, sigma = alpha_sigma(prior)
        estimate = rgb.detach() - sigma / alpha * expected_deltas(prior, rgb)
        assert len(prior.asked) == 2  # half of the way in half of the steps, the first of which is the residual's
        assert not torch.allclose(torch.stack(prior.decoded), estimate)
        half = {value.item() for value in prior.asked[1][1].unique()}
        assert half == {T // 2}

    def test_reward_ascent_refuses_it(self, prior: RecordingPrior) -> None:
        ascent = NegativeEmbeddingConfig(objective=NegativeObjective.REWARD_ASCENT)
        with pytest.raises(ValueError, match="goes through the one-step estimate"):
            make(prior, reward=BrightnessReward(), negative=ascent, ranking=Ranking(num_ddim_steps=2))


class HalfReward(BrightnessReward):
    """In float16, where its gradient at one value of eight pictures is nothing, and 4096 times it is something."""

    def __call__(self, rgb: Tensor, prompts: Sequence[str]) -> Tensor:
        return (rgb.half() * self.slope).double().mean(dim=(1, 2, 3))


def test_ascent_in_float16(prior: RecordingPrior, run: Step) -> None:
    ascent = NegativeEmbeddingConfig(objective=NegativeObjective.REWARD_ASCENT, lr=0.01)
    assert run(make(prior, reward=HalfReward(1e-5), negative=ascent)).terms["negative_drift"] > 0.01


def test_implicit_reward_in_float16() -> None:
    """Two views of 16384 values: the gradient of a mean at one of them is nothing in float16."""
    text = torch.zeros(2, 2, 1, 1, requires_grad=True)
    values = torch.ones(2, 2, 4, 64, 64)
    reward = ImplicitReward.measure(
        positive=values,
        moved=(text.half()[..., None].expand_as(values) * 1e-4).float(),
        reference=values,
        noise=-values,
        text=text,
        guidance_scale=0.0,
        group_size=2,
    )
    torch.testing.assert_close(reward.gain, torch.full((2, 1), 1.0 - 4.0))
    torch.testing.assert_close(reward.slope, torch.full((2, 1, 1, 1), 2e-4), rtol=0.01, atol=0)


def plain(**settings: object) -> RewardGradientConfig:
    return RewardGradientConfig(balance=RewardBalance.NONE, **settings)  # type: ignore[arg-type]


class TestRewardGradient:
    @pytest.mark.parametrize("image", list(RewardImage))
    def test_it_adds_to_the_distillation(
        self, prior: RecordingPrior, rgb: Tensor, run: Step, image: RewardImage
    ) -> None:
        """Brightness has the same slope everywhere, and encoder and decoder are the identity."""
        loss = run(make(prior, reward=BrightnessReward(), reward_gradient=plain(weight=Constant(3.0), image=image)))
        _, _, weight = seen(prior, rgb)
        expected = weight * expected_deltas(prior, rgb)[0] / 8 - 3.0 / rgb.numel()
        torch.testing.assert_close(rgb.grad, expected)
        assert loss.terms["direct_loss"].item() == pytest.approx(-loss.terms["direct_reward"].item())

    @pytest.mark.parametrize("image", [RewardImage.DENOISED, RewardImage.LATENTS])
    def test_estimate_is_what_it_looks_at(
        self, prior: RecordingPrior, rgb: Tensor, run: Step, image: RewardImage
    ) -> None:
        loss = run(make(prior, reward=BrightnessReward(), reward_gradient=plain(image=image)))
        alpha, sigma = alpha_sigma(prior)
        estimate = rgb.detach() - sigma / alpha * expected_deltas(prior, rgb)[0]
        assert loss.terms["direct_reward"].item() == pytest.approx(estimate.mean().item())

    def test_late_estimates_are_replaced_by_the_render(self, prior: RecordingPrior, rgb: Tensor, run: Step) -> None:
        config = plain(image=RewardImage.DENOISED, max_t=0.4)
        loss = run(make(prior, reward=BrightnessReward(), reward_gradient=config))
        assert loss.terms["direct_reward"].item() == pytest.approx(rgb.mean().item())
        assert not prior.decoded

    def test_nothing_beyond_the_margin(self, prior: RecordingPrior, rgb: Tensor, run: Step) -> None:
        with torch.no_grad():
            rgb[0] = 2.0
        loss = run(make(prior, reward=BrightnessReward(), reward_gradient=plain(margin=1.5)))
        _, _, weight = seen(prior, rgb)
        pushed = torch.full_like(rgb, 1.0 / rgb.numel())
        pushed[0] = 0
        torch.testing.assert_close(rgb.grad, weight * expected_deltas(prior, rgb)[0] / 8 - pushed)
        missing = (1.5 - rgb.detach().mean(dim=(1, 2, 3))).clamp(min=0).mean()
        assert loss.terms["direct_loss"].item() == pytest.approx(missing.item())

    def test_balance_by_gradients(self, prior: RecordingPrior, rgb: Tensor, run: Step) -> None:
        config = RewardGradientConfig(weight=Constant(0.5))
        loss = run(make(prior, reward=BrightnessReward(), reward_gradient=config))
        _, _, weight = seen(prior, rgb)
        pull = weight * expected_deltas(prior, rgb)[0] / 8
        push = torch.full_like(pull, -1 / math.sqrt(pull.numel()))
        torch.testing.assert_close(rgb.grad, pull + 0.5 * pull.norm() * push)
        assert loss.total.item() == pytest.approx(
            (loss.terms["distillation"] + loss.terms["direct_factor"] * loss.terms["direct_loss"]).item()
        )

    def test_balance_by_losses_is_a_power_of_ten(self, prior: RecordingPrior, rgb: Tensor, run: Step) -> None:
        config = RewardGradientConfig(weight=Constant(0.6), balance=RewardBalance.LOSSES, margin=25.0)
        loss = run(make(prior, reward=BrightnessReward(), reward_gradient=config))
        decades = len(str(int(loss.terms["distillation"]))) - len(str(int(loss.terms["direct_loss"])))
        assert len(str(int(loss.terms["direct_loss"]))) == 2
        assert loss.terms["direct_factor"].item() == pytest.approx(0.6 * 10**decades)
        _, _, weight = seen(prior, rgb)
        expected = weight * expected_deltas(prior, rgb)[0] / 8 - 0.6 * 10**decades / rgb.numel()
        torch.testing.assert_close(rgb.grad, expected)

    @pytest.mark.parametrize("balance", list(RewardBalance))
    def test_starts_late_and_ends_alone(
        self, prior: RecordingPrior, rgb: Tensor, run: Step, balance: RewardBalance
    ) -> None:
        config = RewardGradientConfig(balance=balance, steps=Steps(start=2), alone_from=3)
        distillation = make(prior, reward=BrightnessReward(), reward_gradient=config)
        assert "direct_loss" not in run(distillation, 1).terms
        run(distillation, 2)
        assert rgb.grad is not None
        assert rgb.grad.std() > 0
        run(distillation, 3)
        assert rgb.grad is not None
        torch.testing.assert_close(rgb.grad, rgb.grad.mean().expand_as(rgb))  # brightness pushes all pixels alike
        assert rgb.grad.mean() < 0

    @pytest.mark.parametrize("balance", [RewardBalance.NONE, RewardBalance.GRADIENTS])
    def test_gradients_that_float16_cannot_hold_arrive(
        self, prior: RecordingPrior, rgb: Tensor, run: Step, balance: RewardBalance
    ) -> None:
        config = RewardGradientConfig(balance=balance, steps=Steps(start=1), alone_from=1)
        loss = run(make(prior, reward=HalfReward(1e-5), reward_gradient=config), 1)
        pushed = loss.terms["direct_factor"] * 1e-5 / rgb.numel()
        torch.testing.assert_close(rgb.grad, -pushed.expand_as(rgb), rtol=0.02, atol=0)

    def test_needs_a_differentiable_reward(self, prior: RecordingPrior) -> None:
        for reward in (None, TableReward([0.0])):
            with pytest.raises(ValueError, match="the reward gradient needs a differentiable reward"):
                make(prior, reward=reward, reward_gradient=plain())


class TestVariational:
    def test_gradient_is_the_closed_form(self, prior: RecordingPrior, rgb: Tensor, run: Step) -> None:
        distillation = make(prior, VariationalResidual(guidance_scale=Constant(SCALE)))
        assert distillation.learned_score is not None
        with torch.no_grad():
            distillation.learned_score.adapter.shift.fill_(0.3)  # type: ignore[union-attr]
        loss = run(distillation)
        noise, z_t, weight = seen(prior, rgb)
        alpha, _ = alpha_sigma(prior)
        learned = expected_noise(prior, z_t[0] - alpha * 0.3, "a red cube")
        expected = weight * (expected_deltas(prior, rgb)[0] + noise[0] - learned)
        torch.testing.assert_close(rgb.grad, expected / 8)
        assert loss.unet_calls == 16 + 8 + 8  # prior, learned score, its training

    def test_nothing_is_learned_at_first_and_guidance_one_has_nothing_to_say(
        self, prior: RecordingPrior, rgb: Tensor, run: Step
    ) -> None:
        run(make(prior, VariationalResidual(guidance_scale=Constant(1.0))))
        assert rgb.grad is not None
        torch.testing.assert_close(rgb.grad, torch.zeros_like(rgb))

    def test_learned_score_is_that_of_the_renders(self, generator: torch.Generator) -> None:
        """Renders from a Gaussian of the prior's spread: the shift goes to the difference of the means."""
        prior = GaussianPrior(dtype=torch.float64)
        score = LearnedScore(LearnedScoreConfig(lr=0.03), prior)
        text, offset = prior.embed(["red cube"]).expand(64, -1, -1), torch.linspace(-0.5, 0.5, 16).view(4, 4)
        for _ in range(300):
            noise = torch.randn(64, 3, 4, 4, generator=generator, dtype=torch.float64)
            score.update(prior.mean(text) + offset + prior.std * noise, text, None, generator)
        shift = next(score.adapter.parameters()).detach()
        torch.testing.assert_close(shift, offset.expand(3, -1, -1).double(), atol=0.15, rtol=0)

    def test_gradients_that_float16_cannot_hold_arrive(self, generator: torch.Generator) -> None:
        class HalfAdapter(GaussianAdapter):
            def forward(self, z_t: Tensor, t: Tensor, text: Tensor, cameras: Cameras | None) -> Tensor:
                return ((z_t + self.shift).half() * 1e-5).double()

        prior = GaussianPrior(dtype=torch.float64)
        score = LearnedScore(LearnedScoreConfig(lr=0.01), prior)
        score.adapter = HalfAdapter(prior)
        score._optimizer = torch.optim.SGD(score.adapter.parameters(), lr=1.0)
        latents, text = torch.zeros(64, 3, 4, 4, dtype=torch.float64), prior.embed(["red cube"]).expand(64, -1, -1)
        error, norm = score.update(latents, text, None, generator)
        assert error.item() == pytest.approx(1.0, abs=0.1)  # of noise that nobody predicts
        shift = next(score.adapter.parameters())
        assert norm.item() == pytest.approx(shift.norm().item() / latents.numel())
        assert norm > 0

    def test_state_goes_on_where_it_stopped(self, prior: RecordingPrior, run: Step) -> None:
        def steps(distillation: Distillation, seeds: range) -> None:
            for seed in seeds:
                run(distillation, seed, torch.Generator().manual_seed(seed))

        straight, first, second = (make(prior, VariationalResidual()) for _ in range(3))
        steps(straight, range(6))
        steps(first, range(3))
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second.load_state_dict(torch.load(file, weights_only=True))
        steps(second, range(3, 6))
        one, other = straight.state_dict(), second.state_dict()
        assert one.keys() == other.keys() == {
            "spread.variance", "spread.total_weight", "learned_score.adapter.shift", "learned_score._extra_state"
        }  # fmt: skip
        assert torch.equal(one["learned_score.adapter.shift"], other["learned_score.adapter.shift"])
        assert one["learned_score.adapter.shift"].abs().max() > 0

    def test_a_prior_without_adapters_is_refused(self, prior: RecordingPrior) -> None:
        class Rigid:
            """All of a prior but its adapters."""

            noise_schedule, group_size = prior.noise_schedule, 4
            embed, overflow = prior.embed, prior.overflow
            encode, decode, preview, predict_noise = prior.encode, prior.decode, prior.preview, prior.predict_noise

        with pytest.raises(ValueError, match="Rigid cannot learn the renders' score"):
            make(Rigid(), VariationalResidual())  # type: ignore[arg-type]


@pytest.mark.parametrize("image", list(RewardImage))
def test_one_picture_stands_for_all_groups_in_2d(prior: RecordingPrior, rgb: Tensor, image: RewardImage) -> None:
    """It is encoded once. Its gradient is the sum of those that a picture for each group would get."""
    text, null = prior.embed(["red cube"]).expand(3, -1, -1), prior.embed([""]).expand(3, -1, -1)
    prompt = PromptEmbeddings("red cube", text, null, null)
    gradients, losses = [], []
    for num_pictures in (1, 3):
        distillation = make(
            prior, weighting=CONSTANT, reward=BrightnessReward(), reward_gradient=plain(image=image, max_t=0.9)
        )
        picture = rgb.detach()[:1].clone().requires_grad_()
        loss = distillation(picture.expand(num_pictures, -1, -1, -1), prompt, None, 0, torch.Generator().manual_seed(0))
        loss.total.backward()
        assert picture.grad is not None
        gradients.append(picture.grad)
        losses.append(loss.terms)
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(*losses)


def test_prompt_has_a_null_for_methods_in_2d(prior: RecordingPrior, rgb: Tensor) -> None:
    text, null = prior.embed(["red cube"]).expand(8, -1, -1), prior.embed([""]).expand(8, -1, -1)
    distillation = make(prior, ClassifierResidual(negative_weight=Constant(0.0)))
    loss = distillation(rgb, PromptEmbeddings("red cube", text, text, null), None, 0, torch.Generator().manual_seed(0))
    assert loss.unet_calls == 24
    assert loss.terms["distillation"] > 0
