import math

import pytest
import torch
from torch import Tensor

from psd.distillation.weightings import (
    BestWeighting,
    DreamDpoWeighting,
    MinMaxWeighting,
    PreferenceWeighting,
    RewardScaling,
    RunningSpread,
    SingleWeighting,
    SoftmaxWeighting,
    Weighting,
)
from psd.schedules import Constant, Linear

REWARDS = torch.tensor([[1.0, 5.0, 2.0], [3.0, 4.0, 2.0]])  # gaps 2, 1, 0; winners 1, 0, 0 (the first on a tie)
TWO, ONE = 1 / (1 + math.exp(-0.5 * 2)), 1 / (1 + math.exp(-0.5 * 1))  # sigmoid(temperature * gap)
SPREAD = math.sqrt((2 + 0.5 + 0) / 3)  # the variance of two values is half their squared difference


@pytest.mark.parametrize(
    ("scaling", "factors"),
    [
        (RewardScaling.CONSTANT, [1.0, 1.0, 1.0]),
        (RewardScaling.BRADLEY_TERRY, [1 - TWO, 1 - ONE, 0.5]),
        (RewardScaling.GAP, [2 * TWO - 1, 2 * ONE - 1, 0.0]),
        (RewardScaling.NORMALIZED, [2 / SPREAD, 1 / SPREAD, 0.0]),
    ],
)
def test_coefficients_of_each_scaling(scaling: RewardScaling, factors: list[float]) -> None:
    weighting = PreferenceWeighting(scale=Constant(3.0), scaling=scaling, temperature=0.5)
    first, second, tie = (3 * factor for factor in factors)
    expected = torch.tensor([[-first, 1 + second, 1 + tie], [1 + first, -second, -tie]])
    torch.testing.assert_close(weighting.coefficients(REWARDS, RunningSpread(), 0).delta, expected)


def test_coefficients_sum_to_one_whatever_the_scale() -> None:
    weighting = PreferenceWeighting(scale=Constant(7.0))
    torch.testing.assert_close(weighting.coefficients(REWARDS, RunningSpread(), 0).delta.sum(0), torch.ones(3))


def test_scale_may_follow_a_schedule() -> None:
    weighting = PreferenceWeighting(scale=Linear(start=0.0, end=2.0, end_step=10), scaling=RewardScaling.CONSTANT)
    winner = [weighting.coefficients(REWARDS, RunningSpread(), step).delta[1, 0].item() for step in (0, 5, 10)]
    assert winner == [1.0, 2.0, 3.0]


def test_normalized_does_not_care_for_the_rewards_unit() -> None:
    weighting, small, large = PreferenceWeighting(), RunningSpread(), RunningSpread()
    for step in range(5):
        rewards = torch.randn(2, 3)
        torch.testing.assert_close(
            weighting.coefficients(rewards, small, step).delta,
            weighting.coefficients(1000 * rewards + 5, large, step).delta,
        )


def test_equal_rewards_give_no_preference() -> None:
    coefficients = PreferenceWeighting().coefficients(torch.ones(2, 3), RunningSpread(), 0).delta
    assert torch.equal(coefficients, torch.tensor([[1.0] * 3, [0.0] * 3]))


def test_spread_is_the_decayed_mean_of_variances() -> None:
    spread = RunningSpread(decay=0.5)
    assert spread.update(torch.tensor([[0.0], [2.0]])).item() == pytest.approx(math.sqrt(2))
    # Variances 2 and 8 with weights 1/4 and 1/2.
    assert spread.update(torch.tensor([[0.0], [4.0]])).item() == pytest.approx(math.sqrt((0.25 * 2 + 0.5 * 8) / 0.75))


def test_spread_estimates_the_standard_deviation(generator: torch.Generator) -> None:
    spread = RunningSpread(decay=0.999)
    for _ in range(3000):
        estimate = spread.update(10 + 3 * torch.randn(2, 1, generator=generator))
    assert estimate.item() == pytest.approx(3, rel=0.1)


def test_single_takes_its_only_noise_as_it_is() -> None:
    assert SingleWeighting().num_candidates == 1
    assert not SingleWeighting().needs_rewards
    assert torch.equal(SingleWeighting().coefficients(None, RunningSpread(), 0).delta, torch.ones(1, 1))


def test_impossible_settings() -> None:
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        PreferenceWeighting(temperature=0.0)
    with pytest.raises(ValueError, match="preference scale must be >= 0, got -1"):
        PreferenceWeighting(scale=Constant(-1.0)).coefficients(REWARDS, RunningSpread(), 0)


def coefficients(weighting: Weighting, rewards: Tensor = REWARDS) -> Tensor:
    return weighting.coefficients(rewards, RunningSpread(), 0).delta


def test_dreamdpo_is_what_psds_preference_term_is_made_of() -> None:
    """PSD less its base is its scale times DreamDPO without a threshold."""
    scale, won = 3.0, coefficients(PreferenceWeighting(scale=Constant(0.0)))
    preferred = coefficients(PreferenceWeighting(scale=Constant(scale), scaling=RewardScaling.CONSTANT))
    torch.testing.assert_close((preferred - won) / scale, coefficients(DreamDpoWeighting()))


def test_dreamdpo_after_small_gaps_is_psd_at_scale_zero() -> None:
    torch.testing.assert_close(
        coefficients(DreamDpoWeighting(threshold=10.0)), coefficients(PreferenceWeighting(scale=Constant(0.0)))
    )


def test_psd_becomes_dreamdpo_as_its_scale_grows() -> None:
    large = coefficients(PreferenceWeighting(scale=Constant(1e6), scaling=RewardScaling.CONSTANT)) / 1e6
    torch.testing.assert_close(large, coefficients(DreamDpoWeighting()), atol=2e-6, rtol=0)


def test_best_of_two_is_psd_at_scale_zero() -> None:
    assert BestWeighting().num_best == 1, "as in RewardSDS's code"
    best = BestWeighting(num_candidates=2, num_best=1)
    torch.testing.assert_close(coefficients(best), coefficients(PreferenceWeighting(scale=Constant(0.0))))


def test_a_cold_softmax_is_the_best_and_a_hot_one_the_mean() -> None:
    rewards = torch.tensor([[1.0], [3.0], [2.0]])
    cold, hot = (
        coefficients(SoftmaxWeighting(num_candidates=3, temperature=temperature), rewards)
        for temperature in (1e-3, 1e6)
    )
    torch.testing.assert_close(cold, coefficients(BestWeighting(num_candidates=3, num_best=1), rewards))
    torch.testing.assert_close(hot, torch.full((3, 1), 1 / 3))


def test_of_equal_rewards_the_first_are_better() -> None:
    equal = torch.ones(4, 2)
    published = MinMaxWeighting()
    assert (published.num_best, published.num_worst) == (2, 2)
    assert (published.best_weight, published.worst_weight) == (0.9, 0.1)
    weighting = MinMaxWeighting(num_candidates=4, num_best=1, num_worst=1)
    assert coefficients(weighting, equal)[:, 0].tolist() == pytest.approx([0.9, 0, 0, -0.1])
    assert coefficients(PreferenceWeighting(num_candidates=4), equal)[:, 1].tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("weighting", "settings", "message"),
    [
        (PreferenceWeighting, {"num_candidates": 1}, "num_candidates must be >= 2, got 1"),
        (SoftmaxWeighting, {"temperature": 0.0}, "temperature must be > 0"),
        (BestWeighting, {"num_candidates": 3, "num_best": 4}, "num_best must be between 1 and 3, got 4"),
        (MinMaxWeighting, {"num_candidates": 3}, "at most num_candidates .3. together, got 2 and 2"),
        (MinMaxWeighting, {"worst_weight": -0.1}, "weights must be >= 0"),
        (DreamDpoWeighting, {"threshold": -1.0}, "threshold must be >= 0"),
    ],
)
def test_impossible_weightings(weighting: type, settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weighting(**settings)
