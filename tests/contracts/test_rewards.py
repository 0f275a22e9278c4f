"""What every reward keeps to, whatever model is behind it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from psd.rewards.aesthetic import AestheticReward
from psd.rewards.base import Reward
from psd.rewards.clip_preference import ClipPreferenceReward
from psd.rewards.ensemble import EnsembleMember, EnsembleReward
from psd.rewards.function import FunctionReward
from psd.rewards.hpsv2 import convert_hpsv2
from psd.rewards.image_reward import ImageReward, convert_image_reward
from psd.rewards.reward3d import Reward3D, convert_reward3d
from psd.rewards.vqa import BlipVqaReward
from tests.psd.checkpoints import make_tokenizer, save_reward
from tests.psd.published_rewards import (
    image_reward_state,
    make_bert_tokenizer,
    mlp_head,
    open_clip_state,
    reward3d_state,
    save_tokenizer,
    save_vqa,
)


@dataclass(frozen=True)
class Shelf:
    """All the checkpoints, once for the module."""

    root: Path

    def fill(self) -> None:
        for name in ("hpsv2", "image_reward", "reward3d_scorer", "reward3d_fusion"):
            (self.root / name).mkdir()
        clip = save_tokenizer(self.root / "clip_tokenizer", make_tokenizer())
        bert = save_tokenizer(self.root / "bert_tokenizer", make_bert_tokenizer())
        save_reward(self.root / "clip")
        save_vqa(self.root / "vqa")
        file = self.root / "published.pt"
        torch.save(mlp_head(16), self.root / "aesthetic.pth")
        torch.save(open_clip_state(), file)
        convert_hpsv2(file, self.root / "hpsv2", clip)
        torch.save(image_reward_state(), file)
        convert_image_reward(file, self.root / "image_reward", bert)
        for version, name in (("Scorer", "reward3d_scorer"), ("CrossViewFusion", "reward3d_fusion")):
            torch.save(reward3d_state(version), file)
            convert_reward3d(file, self.root / name, bert)


Make = Callable[[Path, torch.dtype, str], Reward]


def _ensemble(root: Path, dtype: torch.dtype, device: str) -> Reward:
    members = {name: REWARDS[name](root, dtype, device) for name in ("clip_preference", "aesthetic", "reward3d_scorer")}
    return EnsembleReward([EnsembleMember(reward=reward, weight=2, mean=1, std=3) for reward in members.values()])


def redness(images: NDArray[np.uint8], prompts: list[str]) -> Sequence[float]:
    return [float(image[..., 0].mean()) / 255 + len(prompt) for image, prompt in zip(images, prompts, strict=True)]


REWARDS: dict[str, Make] = {
    "clip_preference": lambda root, dtype, device: ClipPreferenceReward.from_pretrained(
        root / "clip", dtype=dtype, device=device
    ),
    "hpsv2": lambda root, dtype, device: ClipPreferenceReward.from_pretrained(
        root / "hpsv2", scaled=False, dtype=dtype, device=device
    ),
    "image_reward": lambda root, dtype, device: ImageReward.from_pretrained(
        root / "image_reward", dtype=dtype, device=device
    ),
    "aesthetic": lambda root, dtype, device: AestheticReward.from_pretrained(
        root / "clip", root / "aesthetic.pth", dtype=dtype, device=device
    ),
    "blip_vqa": lambda root, dtype, device: BlipVqaReward.from_pretrained(root / "vqa", dtype=dtype, device=device),
    "reward3d_scorer": lambda root, dtype, device: Reward3D.from_pretrained(
        root / "reward3d_scorer", dtype=dtype, device=device
    ),
    "reward3d_fusion": lambda root, dtype, device: Reward3D.from_pretrained(
        root / "reward3d_fusion", dtype=dtype, device=device
    ),
    "function": lambda root, dtype, device: FunctionReward(redness),
    "ensemble": _ensemble,
}
READS_TEXT = [name for name in REWARDS if name not in ("aesthetic", "function")]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rewards")
    Shelf(root).fill()
    return root


@pytest.fixture(scope="module")
def float32(shelf: Path) -> dict[str, Reward]:
    return {name: make(shelf, torch.float32, "cpu") for name, make in REWARDS.items()}


@pytest.fixture(params=REWARDS)
def reward(request: pytest.FixtureRequest, float32: dict[str, Reward]) -> Reward:
    found: Reward = float32[request.param]
    return found


def images(num: int, size: tuple[int, int] = (16, 16), device: str = "cpu") -> Tensor:
    """Away from 0 and 1, where a resize would be cut off and a gradient with it."""
    generator = torch.Generator().manual_seed(1)
    return (0.3 + 0.4 * torch.rand(num, 3, *size, generator=generator)).to(device)


def prompts(num: int) -> list[str]:
    """The same for the views of a group of four."""
    return [("a red cube", "blue")[i // 4 % 2] for i in range(num)]


def test_is_a_reward(reward: Reward) -> None:
    assert isinstance(reward, Reward)
    assert reward.group_size in (1, 4)


def test_one_finite_number_an_image(reward: Reward) -> None:
    scores = reward(images(8), prompts(8))
    assert scores.shape == (8,)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()


def test_images_of_any_size(reward: Reward) -> None:
    for size in ((7, 7), (40, 40), (24, 33)):
        assert reward(images(4, size), prompts(4)).isfinite().all()


def test_groups_score_the_same_alone_and_in_company(reward: Reward) -> None:
    """A longer prompt in the batch, which pads the others, changes nothing either."""
    rgb, texts = images(8), prompts(8)
    together = reward(rgb, texts)
    size = reward.group_size
    alone = [reward(rgb[i : i + size], texts[i : i + size]) for i in range(0, 8, size)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_views_of_a_group_share_its_score(float32: dict[str, Reward]) -> None:
    for name in ("reward3d_scorer", "reward3d_fusion"):
        first, second = float32[name](images(8), prompts(8)).view(2, 4)
        assert (first == first[0]).all()
        assert (second == second[0]).all()
        assert first[0] != second[0]


def test_the_same_twice(reward: Reward) -> None:
    state = torch.get_rng_state()
    rgb, texts = images(4), prompts(4)
    assert torch.equal(reward(rgb, texts), reward(rgb, texts))
    assert torch.equal(torch.get_rng_state(), state)


def test_whole_groups_and_a_prompt_for_each(reward: Reward) -> None:
    with pytest.raises(ValueError, match="every image needs its prompt, got 4 images and 3 prompts"):
        reward(images(4), prompts(3))
    if reward.group_size > 1:
        with pytest.raises(ValueError, match="judges 4 views together, got 6 images; give whole groups of 4"):
            reward(images(6), prompts(6))


def test_differentiable_is_true_to_its_word(reward: Reward) -> None:
    """Along its gradient a score rises as fast as the gradient says; without one it has no graph.

    On images that need no resize, in which the preprocessing would round (its gradients have a test of their own).
    """
    rgb, texts = images(4).requires_grad_(), prompts(4)
    score = reward(rgb, texts).sum()
    if not reward.differentiable:
        assert not score.requires_grad
        return
    (gradient,) = torch.autograd.grad(score, rgb)
    assert gradient.isfinite().all()
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    direction = gradient / gradient.norm()
    step = 0.02
    with torch.no_grad():
        rise = reward(rgb + step * direction, texts).sum() - reward(rgb - step * direction, texts).sum()
    torch.testing.assert_close(rise / (2 * step), gradient.norm(), rtol=0.03, atol=1e-3)


def test_ranking_builds_no_graph(reward: Reward) -> None:
    with torch.no_grad():
        assert not reward(images(4).requires_grad_(), prompts(4)).requires_grad
    assert not reward(images(4), prompts(4)).requires_grad  # nothing of the model itself is trained


@pytest.mark.parametrize("name", READS_TEXT)
def test_a_prompt_that_is_too_long_is_cut_and_told_once(name: str, shelf: Path) -> None:
    fresh = REWARDS[name](shelf, torch.float32, "cpu")
    texts = ["blue " * 60 + "cube"] * 4
    with pytest.warns(UserWarning, match="the reward's text encoder does not see the end of .*cube"):
        scores = fresh(images(4), texts)
    assert scores.isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(fresh(images(4), texts), scores)


@pytest.mark.parametrize("name", [name for name in REWARDS if name != "function"])
def test_half_precision_scores_alike_and_in_float32(name: str, shelf: Path, float32: dict[str, Reward]) -> None:
    rgb, texts = images(8), prompts(8)
    half, full = REWARDS[name](shelf, torch.bfloat16, "cpu")(rgb, texts), float32[name](rgb, texts)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, atol=0.15, rtol=0.15)


@pytest.mark.gpu
@pytest.mark.parametrize("name", REWARDS)
def test_on_a_gpu_as_on_a_cpu(name: str, shelf: Path, float32: dict[str, Reward]) -> None:
    scores = REWARDS[name](shelf, torch.float32, "cuda")(images(8, device="cuda"), prompts(8))
    assert scores.device.type == "cuda"
    torch.testing.assert_close(scores.cpu(), float32[name](images(8), prompts(8)), atol=1e-3, rtol=1e-3)
