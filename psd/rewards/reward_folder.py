"""The folders that rewards are loaded from: what must be in one. Loads no torch, so that a slip is told at once."""

from __future__ import annotations

from pathlib import Path

from psd.checkpoint_files import check_folder, check_tokenizer, check_weights, read_json

_TRANSFORMERS = "a transformers folder: config.json, model.safetensors, tokenizer, preprocessor_config.json"
_KINDS = {  # what it is called, and the layout of its folder
    "CLIPModel": ("CLIP reward", _TRANSFORMERS),
    "BlipForQuestionAnswering": ("BLIP-VQA reward", _TRANSFORMERS),
    "ImageReward": ("ImageReward", "the folder that `psd convert imagereward` makes"),
    "Reward3D": ("Reward3D", "the folder that `psd convert reward3d` makes"),
}


def check_reward_folder(root: Path, architecture: str, *, has_processor: bool = True, reads_text: bool = True) -> str:
    """The architecture that ``config.json`` names: the one asked for, or a variant of it.

    ``has_processor`` is false where tokenizer and preprocessing are in a folder of their own.

    Raises:
        ValueError: the folder, a file in it or its weights are missing or not whole, or it holds another kind of model.
    """
    title, layout = _KINDS[architecture]
    check_folder(root, kind=title)
    kind = f"{title} ({layout})"
    found = str((read_json(root / "config.json", kind=kind).get("architectures") or ["model without a name"])[0])
    if not found.startswith(architecture):
        raise ValueError(f"{root} holds a {found}; this reward needs a {architecture}")
    if has_processor:
        read_json(root / "preprocessor_config.json", kind=kind)
        if reads_text:
            check_tokenizer(root, kind=kind)
    check_weights(root, "model.safetensors")
    return found


def check_processor_folder(folder: Path) -> None:
    """Raises:
    ValueError: the folder, or its tokenizer or preprocessing, is missing.
    """
    check_folder(folder, kind="processor")
    kind = "processor (a folder with a tokenizer and preprocessor_config.json)"
    read_json(folder / "preprocessor_config.json", kind=kind)
    check_tokenizer(folder, kind=kind)
