"""The picture as a scene; what every scene must do is in tests/contracts."""

from __future__ import annotations

import pytest
import torch

from psd.cameras import Cameras, CameraSampler
from psd.distillation.distillation import Distillation
from psd.distillation.residuals import X0Reconstruction
from psd.distillation.weightings import SingleWeighting
from psd.optimization import Optimization
from psd.priors.gaussian import GaussianPrior
from psd.prompts import PromptEncoder
from psd.scenes.backgrounds import FlatBackground, NoBackground
from psd.scenes.image import ImageConfig, ImageScene
from psd.schedules import Constant
from tests.psd.fields import views

SMALL = ImageConfig(height=4, width=4, num_levels=2)


def test_it_is_grey_at_first_and_the_same_for_every_camera() -> None:
    scene = ImageScene(ImageConfig(height=8, width=16, num_levels=3))
    assert [tuple(level.shape[-2:]) for level in scene.levels] == [(8, 16), (4, 8), (2, 4)]
    assert torch.equal(scene.rgb, torch.full((1, 3, 8, 16), 0.5))
    with torch.no_grad():
        scene.levels[0].normal_()
    render = scene.render(views(0.0, 77.0, size=9), torch.zeros(3))
    assert torch.equal(render.rgb[0], render.rgb[1])
    assert torch.equal(render.opacity, torch.ones(2, 1, 9, 9))


def test_finer_levels_learn_half_as_fast() -> None:
    scene = ImageScene(ImageConfig(height=8, width=8, num_levels=3, lr=0.4))
    assert [group["lr"] for group in scene.param_groups()] == pytest.approx([0.1, 0.2, 0.4])


def test_smoothness_by_hand() -> None:
    scene = ImageScene(ImageConfig(height=4, width=4, num_levels=1, smoothness=3.0))
    with torch.no_grad():
        scene.levels[0][..., 2:] = torch.logit(torch.tensor(0.7))  # one edge in three, 0.2 high
    render = scene.render(views(0.0, size=4), torch.zeros(3))
    assert float(scene.regularization(render, 0)["smoothness"].detach()) == pytest.approx(3 * 0.2**2 / 3)


def test_distillation_in_2d_comes_to_what_the_prior_wants_without_cameras() -> None:
    """The prior hears of no cameras, and always of the same background: the picture paints it. It is encoded once."""
    phrases: list[str] = []

    class FlatPrior(GaussianPrior):
        def predict_noise(
            self, z_t: torch.Tensor, t: torch.Tensor, text: torch.Tensor, cameras: Cameras | None
        ) -> torch.Tensor:
            assert cameras is None
            return super().predict_noise(z_t, t, text, cameras)

        def encode(self, rgb: torch.Tensor) -> torch.Tensor:
            assert len(rgb) == 1
            return super().encode(rgb)

        def embed(self, prompts: list[str]) -> torch.Tensor:
            phrases.extend(prompts)
            return super().embed(prompts)

    prior, scene = FlatPrior(std=0.05), ImageScene(SMALL)
    optimization = Optimization(
        scene=scene,
        background=FlatBackground(),
        cameras=CameraSampler(height=4, width=4, group_size=1, num_groups=2),
        distillation=Distillation(
            prior=prior,
            residual=X0Reconstruction(guidance_scale=Constant(1.0), rescale=0.0),
            weighting=SingleWeighting(),
        ),
        prompt_encoder=PromptEncoder(prior),
        prompt="red cube",
        seed=0,
    )
    for _ in range(300):
        optimization.step()
    wanted = prior.mean(GaussianPrior.embed(prior, ["red cube, white background"]))
    inside = (wanted > 0.1) & (wanted < 0.9)  # the picture cannot leave [0, 1]
    assert inside.sum() > 10
    torch.testing.assert_close(scene.rgb.detach()[inside], wanted[inside], atol=0.1, rtol=0)
    assert set(phrases) == {"red cube, white background", "white background"}


def test_no_background_is_black_and_unnamed(generator: torch.Generator) -> None:
    background, cameras = NoBackground(), views(0.0)
    for sample in (background.sample(generator, cameras), background.fixed(cameras)):
        assert torch.equal(sample.rgb, torch.zeros(3))
        assert sample.phrase == ""
    assert background.param_groups() == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"height": 12}, r"height and width must be >= 16 pixels for 4 levels, got 12 and 64"),
        ({"num_levels": 0}, "num_levels must be >= 1"),
        ({"lr": 0.0}, "lr must be > 0"),
        ({"smoothness": -1.0}, "smoothness must be >= 0"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageConfig(**{"height": 64, "width": 64} | wrong)
