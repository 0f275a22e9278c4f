"""Checkpoints that are not what they should be: told by `psd run` before anything starts, with key, file and remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator import cli
from tests.psd.checkpoints import make_tokenizer, save_prior, save_reward
from tests.psd.mvdream_reference import PublishedMvdream
from tests.psd.published_rewards import mlp_head, open_clip_state


@dataclass(frozen=True)
class Shelf:
    """A multi-view prior, a single-view one, a CLIP model, and the head of an aesthetic predictor."""

    root: Path

    def __getattr__(self, name: str) -> Path:
        return self.root / name

    def edit(self, name: str, **changes: Any) -> None:
        file = self.root / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    def cut(self, name: str) -> None:
        file = self.root / name
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    def remove(self, *names: str) -> None:
        for name in names:
            (self.root / name).unlink()

    def pickle(self, folder: str, name: str) -> None:
        self.remove(f"{folder}/{name}.safetensors")
        torch.save({}, self.root / folder / f"{name}.bin")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    save_prior(root / "multiview")
    save_prior(root / "single", cameras=False)
    save_reward(root / "clip")
    torch.save(mlp_head(16), root / "head.pth")
    return root


@pytest.fixture
def shelf(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    """A copy to damage, in the working folder."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Shelf(tmp_path)


MULTIVIEW = ["prior.kind=multiview", "prior.path=multiview"]
CLIP = [f"rewards.{name}={{kind: clip_preference, path: clip}}" for name in ("train", "judge")]
RIGHT = [*MULTIVIEW, *CLIP, "evaluation.oracle=null"]
AESTHETIC = [*RIGHT, "rewards.judge={kind: aesthetic, path: clip, head: head.pth}"]
UNET, TOKENIZER = "multiview/unet/diffusion_pytorch_model.safetensors", "multiview/tokenizer/tokenizer.json"

Damage = Callable[[Shelf], object]
NONE: Damage = lambda shelf: None  # noqa: E731

BAD: dict[str, tuple[Damage, list[str], list[str]]] = {
    "a reward as the prior": (NONE, ["prior.path=clip"], ["prior.path: clip is no multi-view prior", "unet/"]),
    "a prior as the reward": (
        NONE,
        ["rewards.train.path=single"],
        ["rewards.train.path: single is no CLIP reward", "config.json is missing"],
    ),
    "a file as the prior": (NONE, ["prior.path=head.pth"], ["prior.path: ", "is a file; `psd convert` makes folders"]),
    "a prior of single views as one of several": (
        NONE,
        ["prior.path=single"],
        ["prior.path: ", "takes no cameras", "prior.kind=stable_diffusion"],
    ),
    "a prior of several views as one of single ones": (
        NONE,
        ["prior.kind=stable_diffusion", "cameras.group_size=1"],
        ["prior.path: ", "takes cameras: set prior.kind=multiview"],
    ),
    "another reward's kind": (
        NONE,
        ["rewards.judge={kind: image_reward, path: clip}"],
        ["rewards.judge.path: clip holds a CLIPModel; this reward needs a ImageReward"],
    ),
    "a prediction type that is no noise": (
        lambda shelf: shelf.edit("multiview/scheduler/scheduler_config.json", prediction_type="sample"),
        [],
        ["prior.path: ", "prediction_type 'sample' is not supported; it must be 'epsilon' or 'v_prediction'"],
    ),
    "no tokenizer in the prior": (
        lambda shelf: shutil.rmtree(shelf.multiview / "tokenizer"),
        [],
        ["prior.path: ", "tokenizer is no tokenizer: tokenizer_config.json is missing"],
    ),
    "half a tokenizer in the prior": (
        lambda shelf: shelf.remove(TOKENIZER),
        [],
        ["prior.path: ", "the tokenizer's vocabulary is missing", "vocab.json with merges.txt"],
    ),
    "no tokenizer in a reward": (
        lambda shelf: shelf.remove("clip/tokenizer_config.json"),
        [],
        ["rewards.train.path: clip is no CLIP reward", "tokenizer_config.json is missing"],
    ),
    "half a tokenizer in a reward": (
        lambda shelf: shelf.remove("clip/tokenizer.json"),
        [],
        ["rewards.train.path: clip is no CLIP reward", "the tokenizer's vocabulary is missing"],
    ),
    "a pickle in place of the prior's weights": (
        lambda shelf: shelf.pickle("multiview/unet", "diffusion_pytorch_model"),
        [],
        ["prior.path: ", "there is diffusion_pytorch_model.bin, a pickle: save it again with safe_serialization=True"],
    ),
    "a pickle in place of a reward's weights": (
        lambda shelf: shelf.pickle("clip", "model"),
        [],
        ["rewards.train.path: clip has no weights: model.safetensors is missing (there is model.bin, a pickle"],
    ),
    "half of the prior's weights": (
        lambda shelf: shelf.cut(UNET), [], ["prior.path: ", "is not whole: ", "bytes; fetch it again"],
    ),
    "half of a reward's weights": (
        lambda shelf: shelf.cut("clip/model.safetensors"),
        [],
        ["rewards.train.path: ", "clip/model.safetensors is not whole: ", "fetch it again"],
    ),
    "half of a head": (
        lambda shelf: shelf.cut("head.pth"),
        AESTHETIC,
        ["rewards.judge.head: head.pth is damaged or not whole: ", "fetch it again"],
    ),
    "no head": (lambda shelf: shelf.remove("head.pth"), AESTHETIC, ["rewards.judge.head: there is no file head.pth"]),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_bad_checkpoint_is_told_before_anything_starts(
    what: str, shelf: Shelf, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, overrides, told = BAD[what]
    before = {path.name for path in shelf.root.iterdir()}
    damage(shelf)
    assert cli.main(["run", "red cube", *RIGHT, *overrides]) == 2
    error = capsys.readouterr().err
    assert error.startswith("psd: ")
    assert all(part in error for part in told), error
    assert {path.name for path in shelf.root.iterdir()} <= before


@pytest.mark.parametrize("overrides", [RIGHT, AESTHETIC], ids=["clip", "aesthetic"])
def test_undamaged_they_are_taken(shelf: Shelf, overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "red cube", *overrides, "--dry-run"]) == 0


class Code:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("it_ran"),))


def published(name: str) -> dict[str, Any]:
    tokenizer = make_tokenizer()
    if name == "hpsv2":
        return dict(open_clip_state())
    return dict(PublishedMvdream(len(tokenizer), tokenizer.model_max_length).state_dict())


def as_stable_diffusion_1(state: dict[str, Any]) -> dict[str, Any]:
    projections = ("proj_in.weight", "proj_out.weight")
    return {key: value[..., None, None] if key.endswith(projections) else value for key, value in state.items()}


@pytest.mark.parametrize(
    ("model", "make", "message"),
    [
        ("mvdream", lambda state: state | {"epoch": Code()}, "could run code, and was not read"),
        ("hpsv2", lambda state: state | {"epoch": Code()}, "could run code, and was not read"),
        ("mvdream", as_stable_diffusion_1, "is MVDream on Stable Diffusion 1.x"),
        ("mvdream", lambda state: open_clip_state(), "is no MVDream checkpoint"),
        ("hpsv2", lambda state: mlp_head(16), "is no open_clip state dict of a ViT with a text tower"),
        ("hpsv2", lambda state: {"epoch": 3}, "holds no state dict"),
        ("hpsv2", None, "is damaged or not whole"),
        ("imagereward", None, "is damaged or not whole"),
    ],
)
def test_a_bad_file_is_not_converted(
    model: str,
    make: Callable[[dict[str, Any]], Any] | None,
    message: str,
    shelf: Shelf,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without ``make``: a download that broke off."""
    state = published(model)
    torch.save(state if make is None else make(state), "file.pt")
    if make is None:
        shelf.cut("file.pt")
    where = ["--base", "multiview"] if model == "mvdream" else ["--tokenizer", "clip"]
    assert cli.main(["convert", model, "file.pt", "out", *where]) == 2
    error = capsys.readouterr().err
    assert error.startswith("psd: file.pt")
    assert message in error
    assert error.count("\n") == 1
    assert not Path("out").exists()
    assert not Path("it_ran").exists()


@pytest.mark.filterwarnings("ignore:the reward's text encoder does not see the end")
def test_a_prompt_that_is_too_long_is_warned_about_with_what_was_cut(shelf: Shelf) -> None:
    small = [
        "scene={resolution: 8, coarse_resolution: 4, num_samples: 8}",
        "evaluation={num_views: 4, picture_size: 16}",
    ]
    steps = ["optimization={num_steps: 1, log_every: 1}", "cameras={height: 8, width: 8}", "background.kind=none"]
    with pytest.warns(UserWarning, match=r"the prior's text encoder does not see the end of '.*': 'blue blue red'"):
        assert cli.main(["run", "red cube " + "blue " * 14 + "red", *RIGHT, *small, *steps]) == 0
