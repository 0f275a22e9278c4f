"""Published checkpoint files as the folders that experiments name."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from transformers.utils import logging

from psd.checkpoint_files import check_folder, find_folder
from psd.priors.mvdream import convert_mvdream
from psd.rewards.hpsv2 import convert_hpsv2
from psd.rewards.image_reward import convert_image_reward
from psd.rewards.reward3d import convert_reward3d

_CLIP = "CLIP's, for example laion/CLIP-ViT-H-14-laion2B-s32B-b79K or a Stable Diffusion checkpoint's tokenizer/"
_BERT = "BERT's, for example google-bert/bert-base-uncased"


def convert(model: str, checkpoint: Path, out: Path, tokenizer: str | None, base: str | None) -> None:
    """Writes the folder whole or not at all.

    Raises:
        ValueError: the file is missing, damaged or another model's, what it lacks is missing, or ``out`` is there.
    """
    if not checkpoint.is_file():
        raise ValueError(f"{checkpoint}: no such file; psd weights says how to get it")
    logging.disable_progress_bar()
    match model:
        case "hpsv2":
            words = _needed(tokenizer, _CLIP)
            _write(out, lambda folder: convert_hpsv2(checkpoint, folder, words))
        case "mvdream":
            if base is None:
                raise ValueError("the checkpoint has no tokenizer; give --base FOLDER, that of Stable Diffusion 2.1")
            folder = find_folder(base)
            check_folder(folder, kind="Stable Diffusion 2.1")
            _write(out, lambda converted: convert_mvdream(checkpoint, converted, folder))
        case "imagereward":
            words = _needed(tokenizer, _BERT)
            _write(out, lambda folder: convert_image_reward(checkpoint, folder, words))
        case "reward3d":
            words = _needed(tokenizer, _BERT)
            _write(out, lambda folder: convert_reward3d(checkpoint, folder, words))
        case _:
            raise AssertionError(model)


def _needed(tokenizer: str | None, whose: str) -> Path:
    if tokenizer is None:
        raise ValueError(f"the checkpoint has no tokenizer; give --tokenizer FOLDER, {whose}")
    folder = find_folder(tokenizer)
    if not (folder / "tokenizer_config.json").is_file():
        raise ValueError(f"--tokenizer {tokenizer} holds no tokenizer_config.json; give {whose}")
    return folder


def _write(out: Path, write: Callable[[Path], None]) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already; choose another folder, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        folder = Path(scratch) / "converted"
        folder.mkdir()
        write(folder)
        for weights in folder.rglob("*.safetensors"):  # which nobody but their owner may read
            shutil.copymode(weights.with_name("config.json"), weights)
        if out.exists():
            out.rmdir()
        shutil.move(folder, out)
