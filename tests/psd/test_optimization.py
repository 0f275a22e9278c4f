"""Optimization: exact resume, its reports, and losses that are not finite."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from psd.cameras import Cameras, CameraSampler, LaterCameras
from psd.distillation.distillation import Distillation
from psd.distillation.negative_embedding import NegativeEmbeddingConfig
from psd.distillation.residuals import VariationalResidual, X0Reconstruction
from psd.distillation.weightings import PreferenceWeighting, SingleWeighting
from psd.optimization import Optimization
from psd.phases import phase, record_phases
from psd.priors.base import Prior
from psd.priors.gaussian import GaussianAdapter, GaussianPrior
from psd.priors.multiview import MultiviewPrior
from psd.prompts import PromptEncoder
from psd.rewards.base import Reward
from psd.rewards.clip_preference import ClipPreferenceReward
from psd.scenes.backgrounds import FlatBackground, LearnedBackground
from psd.scenes.base import Render
from psd.schedules import Constant
from tests.psd.checkpoints import save_prior, save_reward
from tests.psd.fakes import BrightnessReward, ImageScene


def make(
    seed: int = 0, *, scene: ImageScene | None = None, prior: Prior | None = None, reward: Reward | None = None
) -> Optimization:
    """Everything that has state: a jittering scene, a learned background, PSD with its embedding."""
    prior = prior or GaussianPrior(group_size=4)
    torch.manual_seed(7)
    return Optimization(
        scene=scene or ImageScene(jitter=0.1),
        background=LearnedBackground(),
        cameras=CameraSampler(height=4, width=4),
        distillation=Distillation(
            prior=prior,
            residual=X0Reconstruction(),
            weighting=PreferenceWeighting(),
            reward=reward or BrightnessReward(),
            negative_embedding=NegativeEmbeddingConfig(interval=3),
        ),
        prompt_encoder=PromptEncoder(prior),
        prompt="red cube",
        seed=seed,
    )


def through_a_file(state: dict[str, object]) -> dict[str, object]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, object] = torch.load(file, weights_only=True)
    return loaded


def flatten(state: object, name: str = "") -> dict[str, object]:
    match state:
        case dict():
            return {key: leaf for part in state for key, leaf in flatten(state[part], f"{name}.{part}").items()}
        case list() | tuple():
            return {key: leaf for i, part in enumerate(state) for key, leaf in flatten(part, f"{name}.{i}").items()}
    return {name: state}


def assert_same(one: dict[str, object], other: dict[str, object]) -> None:
    one, other = flatten(one), flatten(other)
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, other[name]), name
        else:
            assert value == other[name], name


def test_ten_steps_and_ten_more_are_twenty_bit_for_bit() -> None:
    straight, first, second = make(), make(), make()
    reports = [straight.step() for _ in range(20)]
    for _ in range(10):
        first.step()
    torch.manual_seed(123)  # a resumed process stands elsewhere
    second.load_state_dict(through_a_file(first.state_dict()))
    assert [second.step() for _ in range(10)] == reports[10:]
    assert_same(second.state_dict(), straight.state_dict())
    assert straight.scene.steps_seen == second.next_step == 20


def test_ten_and_ten_are_twenty_with_networks(tmp_path: Path) -> None:
    prior = MultiviewPrior.from_pretrained(save_prior(tmp_path / "prior"))
    reward = ClipPreferenceReward.from_pretrained(save_reward(tmp_path / "reward"))
    straight, first, second = (
        make(scene=ImageScene(image_size=16, jitter=0.1), prior=prior, reward=reward) for _ in range(3)
    )
    for _ in range(6):
        straight.step()
    for _ in range(3):
        first.step()
    state = first.state_dict()
    second.load_state_dict(through_a_file(state))
    for _ in range(3):
        second.step()
    assert_same(second.state_dict(), straight.state_dict())
    stored = [value for value in flatten(state).values() if isinstance(value, Tensor)]
    assert sum(value.numel() for value in stored) < 30_000  # none of the networks' 200,000 weights


def test_a_state_from_another_kind_of_device_is_refused() -> None:
    optimization = make()
    state = optimization.state_dict()
    state["global_rng"] = [*state["global_rng"], torch.zeros(16, dtype=torch.uint8)]  # as a GPU's run has
    with pytest.raises(ValueError, match="is of an optimisation on a GPU, whose random numbers a CPU cannot continue"):
        optimization.load_state_dict(state)


def test_taking_turns_in_one_process_changes_nothing() -> None:
    alone, one, other = make(seed=1), make(seed=1), make(seed=2)
    expected = [alone.step() for _ in range(5)]
    actual = []
    for _ in range(5):
        actual.append(one.step())
        other.step()
    assert actual == expected


def test_the_callers_random_numbers_are_left_alone() -> None:
    optimization = make()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    optimization.step()
    assert torch.equal(torch.rand(3), expected)


def test_seed_decides() -> None:
    assert make(seed=1).step() == make(seed=1).step()
    assert make(seed=1).step() != make(seed=2).step()


def test_other_cameras_take_over_at_their_step() -> None:
    """Also where a resumed run begins after it."""

    class Seeing(ImageScene):
        seen: list[tuple[int, int]]

        def render(self, cameras: Cameras, background: Tensor) -> Render:
            self.seen.append((cameras.height, len(cameras)))
            return super().render(cameras, background)

    def start(next_step: int) -> list[tuple[int, int]]:
        scene = Seeing(num_views=4)
        scene.seen = []
        optimization = make(scene=scene)
        optimization._later_cameras = LaterCameras(start=2, sampler=CameraSampler(height=8, width=8))
        optimization.next_step = next_step
        for _ in range(3):
            optimization.step()
        return scene.seen

    assert start(0) == [(4, 4), (4, 4), (8, 4)]
    assert start(2) == [(8, 4)] * 3


def test_pictures_come_to_what_the_prior_wants() -> None:
    """A Gaussian prior that is sure of itself: the optimum is its mean."""
    prior = GaussianPrior(group_size=4, std=0.05)
    scene, encoder = ImageScene(), PromptEncoder(prior)
    optimization = Optimization(
        scene=scene,
        background=FlatBackground({"grey": 0.5}),
        cameras=CameraSampler(height=4, width=4),
        distillation=Distillation(
            prior=prior,
            residual=X0Reconstruction(guidance_scale=Constant(1.0), rescale=0.0),
            weighting=PreferenceWeighting(),
            reward=BrightnessReward(),
        ),
        prompt_encoder=encoder,
        prompt="red cube",
        seed=0,
    )
    for _ in range(200):
        optimization.step()
    wanted = prior.mean(prior.embed(["red cube, grey"]))
    torch.testing.assert_close(scene.images.data, wanted.expand(4, -1, -1, -1), atol=0.15, rtol=0)


def test_report_names_every_term() -> None:
    report = make().step()
    assert report.step == 0
    assert report.unet_calls == 24  # 4 views, 2 candidates; prompt, negative and its reference
    assert report.terms.keys() == {
        "distillation", "gradient", "negative_drift", "negative_factor", "negative_loss", "reward", "reward_gap",
        "size", "t"
    }  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_stops_with_its_name(value: float) -> None:
    class BrokenScene(ImageScene):
        def regularization(self, render: Render, step: int) -> dict[str, Tensor]:
            return {"sparsity": self.images.mean() * (value if step == 2 else 1.0)}

    optimization = make(scene=BrokenScene())
    optimization.step()
    optimization.step()
    before = optimization.scene.state_dict()["images"].clone()
    with pytest.raises(FloatingPointError, match=f"sparsity is {value} at step 2"):
        optimization.step()
    assert torch.equal(optimization.scene.state_dict()["images"], before)


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    """The slope of a square root at 0, where all losses are finite."""

    class BrokenScene(ImageScene):
        def regularization(self, render: Render, step: int) -> dict[str, Tensor]:
            return {"sparsity": (self.images - self.images.detach() + (step != 2)).abs().sum().sqrt()}

    optimization = make(scene=BrokenScene())
    optimization.step()
    optimization.step()
    before = flatten(optimization.state_dict())
    with pytest.raises(FloatingPointError, match="gradient is nan at step 2"):
        optimization.step()
    after = flatten(optimization.state_dict())
    moved = {
        name for name, value in before.items() if isinstance(value, Tensor) and not torch.equal(value, after[name])
    }
    assert not {name for name in moved if name.startswith((".scene", ".background", ".optimizer"))}


def test_a_learned_score_that_is_not_finite_stops_too() -> None:
    class Broken(GaussianAdapter):
        def forward(self, z_t: Tensor, t: Tensor, text: Tensor, cameras: Cameras | None) -> Tensor:
            return z_t + (self.shift - self.shift.detach()).square().sum().sqrt()

    class BrokenPrior(GaussianPrior):
        def make_adapter(self, rank: int) -> GaussianAdapter:
            return Broken(self)

    prior = BrokenPrior(group_size=4)
    optimization = make(prior=prior)
    optimization.distillation = Distillation(prior=prior, residual=VariationalResidual(), weighting=SingleWeighting())
    with pytest.raises(FloatingPointError, match="learned_score_gradient is nan at step 0"):
        optimization.step()


def test_nan_in_the_render_stops_too() -> None:
    optimization = make()
    with torch.no_grad():
        next(optimization.scene.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="is nan at step 0"):
        optimization.step()


def test_learned_background_is_optimised() -> None:
    class Window(ImageScene):
        """Nothing but background."""

        def render(self, cameras: object, background: Tensor) -> Render:
            rgb = (
                background.expand(4, 3, 4, 4) if background.ndim == 4 else background[:, None, None].expand(4, 3, 4, 4)
            )
            opacity = torch.zeros(4, 1, 4, 4)
            return Render(rgb=rgb + 0 * self.images, opacity=opacity, depth=opacity)

    optimization = make(scene=Window())
    assert isinstance(optimization.background, nn.Module)
    before = [parameter.clone() for parameter in optimization.background.parameters()]
    for _ in range(5):
        optimization.step()
    after = list(optimization.background.parameters())
    assert any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_phases_are_measured_only_on_demand() -> None:
    optimization = make()
    with record_phases() as seconds:
        optimization.step()
    assert seconds.keys() == {"render", "encode", "unet", "decode", "reward", "negative", "backward", "optimizer"}
    assert all(value > 0 for value in seconds.values())
    before = dict(seconds)
    optimization.step()
    assert seconds == before
    assert phase("render") is phase("encode")  # nothing is made
