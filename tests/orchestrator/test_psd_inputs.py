"""Prompts and checkpoint folders, checked before torch is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.experiment_config.experiment import ExperimentConfig, experiment
from orchestrator.psd_inputs import check_inputs, oracle_folder, prior_folder, reward_folder
from orchestrator.schema import ConfigError

WEIGHTS = ("unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
           "text_encoder/model.safetensors")  # fmt: skip


PRIOR = {
    "model_index.json": {},
    "unet/config.json": {
        "_class_name": "UNet2DConditionModel",
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 16,
        "cross_attention_dim": 512,
    },
    "vae/config.json": {"_class_name": "AutoencoderKL"},
    "text_encoder/config.json": {"architectures": ["CLIPTextModel"]},
    "scheduler/scheduler_config.json": {},
    "tokenizer/tokenizer_config.json": {},
    "tokenizer/tokenizer.json": {},
}
REWARD = {
    "config.json": {"architectures": ["CLIPModel"]},
    "preprocessor_config.json": {},
    "tokenizer_config.json": {},
    "tokenizer.json": {},
}
_HEADER = b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
ONE_NUMBER = len(_HEADER).to_bytes(8, "little") + _HEADER + bytes(4)


def _write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def _experiment(prior: str, reward: str, **changes: Any) -> ExperimentConfig:
    return experiment({"prior": {"kind": "multiview", "path": prior},
                       "rewards": {"train": {"kind": "clip_preference", "path": reward}}, **changes})  # fmt: skip


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A prior and a reward whose files are all there, with weights of one number each."""
    for name, content in PRIOR.items():
        _write(tmp_path / "prior" / name, json.dumps(content).encode())
    for name, content in REWARD.items():
        _write(tmp_path / "reward" / name, json.dumps(content).encode())
    for name in [*(f"prior/{weights}" for weights in WEIGHTS), "reward/model.safetensors"]:
        _write(tmp_path / name, ONE_NUMBER)
    return tmp_path / "prior", tmp_path / "reward"


def test_complete_folders_take_any_prompt(folders: tuple[Path, Path]) -> None:
    check_inputs(_experiment(*map(str, folders)), ["a zebra that plays chess"])


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_prior_without_weights_is_told(folders: tuple[Path, Path], weights: str) -> None:
    (folders[0] / weights).unlink()
    with pytest.raises(ConfigError, match=f"prior.path: .*has no weights: {weights.rpartition('/')[2]} is missing"):
        check_inputs(_experiment(*map(str, folders)), ["a red cube"])


def test_a_reward_without_weights_is_told(folders: tuple[Path, Path]) -> None:
    (folders[1] / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"rewards.train.path: .*has no weights: model.safetensors is missing"):
        check_inputs(_experiment(*map(str, folders)), ["a red cube"])


def _rewards(prior: Path, **rewards: Any) -> ExperimentConfig:
    return experiment({"prior": {"kind": "multiview", "path": str(prior)}, "rewards": rewards})


@pytest.mark.parametrize("file", [*REWARD])
def test_a_reward_without_its_files_is_told(folders: tuple[Path, Path], file: str) -> None:
    (folders[1] / file).unlink()
    what = "the tokenizer's vocabulary" if file == "tokenizer.json" else file
    with pytest.raises(ConfigError, match=f"rewards.train.path: .*reward is no CLIP reward .*: {what} is missing"):
        check_inputs(_experiment(*map(str, folders)), ["a red cube"])


@pytest.mark.parametrize(
    ("kind", "needed"),
    [
        ("image_reward", "ImageReward"),
        ("blip_vqa", "BlipForQuestionAnswering"),
        ("reward3d", "Reward3D"),
        ("clip_score", ""),
    ],
)
def test_each_kind_takes_its_own_checkpoints(folders: tuple[Path, Path], kind: str, needed: str) -> None:
    settings = _rewards(folders[0], train={"kind": kind, "path": str(folders[1])})
    if not needed:
        check_inputs(settings, ["a red cube"])
        return
    with pytest.raises(ConfigError, match=f"rewards.train.path: .* holds a CLIPModel; this reward needs a {needed}"):
        check_inputs(settings, ["a red cube"])


def test_members_heads_and_processors_are_looked_at_too(folders: tuple[Path, Path], tmp_path: Path) -> None:
    clip = {"kind": "clip_preference", "path": str(folders[1])}
    (folders[1] / "tokenizer_config.json").unlink()
    aesthetic = {"kind": "aesthetic", "path": str(folders[1]), "head": str(tmp_path / "head.pth")}
    with pytest.raises(ConfigError, match=r"rewards.train.members.nice.reward.head: there is no file .*head\.pth"):
        check_inputs(
            _rewards(folders[0], train={"kind": "ensemble", "members": {"nice": {"reward": aesthetic}}}), ["a red cube"]
        )
    with pytest.raises(ConfigError, match=r"rewards.train.processor: no processor at .*nowhere: no such folder$"):
        check_inputs(_rewards(folders[0], train={**clip, "processor": str(tmp_path / "nowhere")}), ["a red cube"])


def test_a_function_that_nobody_offers_is_told(folders: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match=r"rewards.train.name: no installed package offers a reward function 'mine'"):
        check_inputs(_rewards(folders[0], train={"kind": "function", "name": "mine"}), ["a red cube"])


def test_published_rewards_come_with_the_commands_that_fetch_them(folders: tuple[Path, Path], tmp_path: Path) -> None:
    train = {"kind": "clip_score", "path": "checkpoints/hpsv2.1"}
    with pytest.raises(ConfigError) as raised:
        check_inputs(_rewards(folders[0], train=train), ["a red cube"])
    lines = str(raised.value).splitlines()
    assert any("HPSv2.1: xswu/HPSv2, 2 GB" in line for line in lines)
    assert any("hf download laion/CLIP-ViT-H-14-laion2B-s32B-b79K" in line for line in lines)
    assert lines[-1].strip().startswith("psd convert hpsv2 downloads/HPS_v2.1_compressed.pt checkpoints/hpsv2.1")


def test_a_previewer_is_looked_at(folders: tuple[Path, Path]) -> None:
    def check(previewer: str) -> None:
        settings = _experiment(*map(str, folders))
        check_inputs(replace(settings, prior=replace(settings.prior, previewer=previewer)), ["a red cube"])

    with pytest.raises(ConfigError, match=r"prior.previewer: .*vae holds a AutoencoderKL; previews take an"):
        check(str(folders[0] / "vae"))
    with pytest.raises(ConfigError) as raised:
        check("madebyollin/taesd")
    lines = str(raised.value).splitlines()
    assert lines[0].startswith("prior.previewer: no tiny autoencoder at madebyollin/taesd: neither a folder nor")
    assert lines[-1].strip() == "hf download madebyollin/taesd config.json diffusion_pytorch_model.safetensors"


def test_a_folder_that_is_not_there_is_told(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prior.path: .*nowhere: no such folder"):
        check_inputs(_experiment(str(tmp_path / "nowhere"), str(folders[1])), ["a red cube"])


def test_a_prompt_outside_the_grammar_is_told_with_what_the_grammar_knows() -> None:
    with pytest.raises(ConfigError, match=r'prompts\[1\]: .*does not know "zebra".*SHAPE in sphere, cube'):
        check_inputs(_experiment("toybox", "toybox/reward"), ["a red cube", "a red zebra"])


def test_the_built_in_oracle_reads_no_other_prompts_whatever_the_prior(folders: tuple[Path, Path]) -> None:
    settings = _experiment(*map(str, folders), evaluation={"oracle": "toybox"})
    check_inputs(settings, ["a red cube"])
    with pytest.raises(ConfigError, match=r"prompts\[0\]: .*cannot read .*; evaluation\.oracle=null takes any prompt$"):
        check_inputs(settings, ["a zebra"])


def test_names_of_the_built_in_world_are_its_folders() -> None:
    assert prior_folder("toybox").parts[-4:] == ("psd", "toybox", "checkpoints", "prior")
    assert reward_folder("toybox/judge").parts[-2:] == ("checkpoints", "judge")
    assert oracle_folder("toybox").parts[-2:] == ("checkpoints", "classifier")
    assert prior_folder("models/mvdream") == Path("models/mvdream")


def test_checking_loads_no_torch() -> None:
    code = (
        "import sys; from orchestrator import config, psd_inputs; from orchestrator.cli import sweep; "
        "print(*sorted({'torch', 'ray', 'optuna', 'wandb', 'diffusers'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == ""
