from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from psd.cameras import Cameras
from psd.priors.gaussian import GaussianPrior
from psd.prompts import PromptEncoder, perp_neg_weights


class ShortSightedPrior(GaussianPrior):
    """Sees five words, and remembers what it was asked to embed."""

    def __init__(self) -> None:
        super().__init__()
        self.embedded: list[str] = []

    def embed(self, prompts: Sequence[str]) -> Tensor:
        self.embedded.extend(prompts)
        return super().embed(prompts)

    def overflow(self, prompt: str) -> str:
        return " ".join(prompt.split()[5:])


def cameras_at(azimuth_deg: Sequence[float], elevation_deg: float = 10.0) -> Cameras:
    ones = torch.ones(len(azimuth_deg))
    return Cameras.orbit(
        azimuth_deg=torch.tensor(azimuth_deg),
        elevation_deg=elevation_deg * ones,
        distance=2 * ones,
        fov_deg=40 * ones,
        height=4,
        width=4,
    )


def test_background_phrase_joins_both_prompts() -> None:
    prior = ShortSightedPrior()
    embeddings = PromptEncoder(prior, negative_prompt="ugly")("a cube", cameras_at([0.0, 90.0]), "grey background")
    positive, negative = prior.embed(["a cube, grey background", "ugly, grey background"])
    assert embeddings.prompt == "a cube"
    assert torch.equal(embeddings.positive, positive.expand(2, -1, -1))
    assert torch.equal(embeddings.negative, negative.expand(2, -1, -1))


def test_empty_negative_prompt_is_the_phrase_alone() -> None:
    prior = ShortSightedPrior()
    PromptEncoder(prior)("a cube", cameras_at([0.0]), "grey background")
    PromptEncoder(prior)("a cube", cameras_at([0.0]))
    assert set(prior.embedded) == {"a cube, grey background", "grey background", "a cube", ""}


def test_view_dependent_prompts_name_the_side() -> None:
    prior = ShortSightedPrior()
    encoder = PromptEncoder(prior, view_dependent=True)
    embeddings = encoder("a cube", cameras_at([10.0, 90.0, 180.0, 330.0]))
    sides = ["a cube, front view", "a cube, side view", "a cube, back view", "a cube, front view"]
    assert torch.equal(embeddings.positive, prior.embed(sides))
    from_above = encoder("a cube", cameras_at([90.0], elevation_deg=75.0))
    assert torch.equal(from_above.positive, prior.embed(["a cube, overhead view"]))


def test_each_text_is_embedded_once() -> None:
    prior = ShortSightedPrior()
    encoder = PromptEncoder(prior)
    for _ in range(3):
        encoder("a cube", cameras_at([0.0, 90.0]))
    assert sorted(prior.embedded) == ["", "a cube"]


def test_warns_once_about_words_that_the_encoder_does_not_see() -> None:
    encoder = PromptEncoder(ShortSightedPrior())
    with pytest.warns(UserWarning, match="'on a sphere'"):
        encoder("a very small red cube on a sphere", cameras_at([0.0]))
    encoder("a very small red cube on a sphere", cameras_at([0.0]))  # a second warning would be an error


def test_perp_neg_blends_neighbouring_sides() -> None:
    prior = ShortSightedPrior()
    encoder = PromptEncoder(prior, view_dependent=True, perp_neg=True)
    front, side, back = prior.embed(["a cube, front view", "a cube, side view", "a cube, back view"])
    embeddings = encoder("a cube", cameras_at([0.0, 30.0, 90.0, 225.0, 330.0]))
    expected = [front, 2 / 3 * front + side / 3, side, side / 2 + back / 2, 2 / 3 * front + side / 3]
    torch.testing.assert_close(embeddings.positive, torch.stack(expected), atol=1e-4, rtol=0)
    assert embeddings.unwanted is not None
    assert torch.equal(embeddings.unwanted.texts[:, 3], torch.stack([front, side]))


def test_perp_neg_fights_the_front_most_at_the_back() -> None:
    """The weights of threestudio, stated for some azimuths; nothing is unwanted seen from above."""
    expected = {0: (0, 4 - 2.426), 90: (4 - 2.426, 0), 180: (1.967, 1 - 0.606), 270: (4 - 2.426, 0)}
    for azimuth_deg, weights in expected.items():
        assert perp_neg_weights(azimuth_deg, 10)[1] == pytest.approx(weights, abs=2e-3)
    assert perp_neg_weights(100, 70) == ((0, 0, 0, 1), (0, 0))


def test_perp_neg_needs_prompts_that_differ() -> None:
    with pytest.raises(ValueError, match="perp_neg needs view_dependent"):
        PromptEncoder(ShortSightedPrior(), perp_neg=True)
