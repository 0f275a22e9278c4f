"""MVDream's published checkpoint as the diffusers folder that ``MultiviewPrior`` reads.

The file (hub `MVDream/MVDream`, `sd-v2.1-base-4view.pt`) is in the layout of the first Stable Diffusions: the UNet
under `model.diffusion_model.`, the autoencoder under `first_stage_model.`, OpenCLIP's text tower under
`cond_stage_model.model.`. What it holds is turned, what it does not is taken from a Stable Diffusion 2.1 folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from psd.checkpoint_files import write_json
from psd.open_clip import text_config, text_state
from psd.priors.base import NoiseSchedule
from psd.priors.diffusers_folder import CAMERA_DIM
from psd.state_dicts import fill, read_state_dict, take

_UNET, _AUTOENCODER, _TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.model."
_CAMERAS = "camera_embed."
_HEAD_WIDTH = 64  # of Stable Diffusion 2.x; the weights do not say it
_SCALING_FACTOR = 0.18215
_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
_SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def convert_mvdream(checkpoint: Path, out: Path, base: Path) -> None:
    """Writes the folder ``out``. ``base`` is a folder of Stable Diffusion 2.1 in diffusers' layout: the tokenizer is
    its, and whichever of the text encoder and the autoencoder the checkpoint lacks.

    Raises:
        ValueError: the file is no such checkpoint or not whole, or ``base`` lacks what is needed of it.
    """
    tensors = read_state_dict(checkpoint)
    unet = take(tensors, _UNET)
    if not any(name.startswith(_CAMERAS) for name in unet):
        raise ValueError(
            f"{checkpoint} is no MVDream checkpoint: there is no {_UNET}{_CAMERAS}* in it, "
            f"but for example {next(iter(tensors))}"
        )
    first = unet.get("input_blocks.1.1.proj_in.weight")
    if first is not None and first.dim() == 4:  # a convolution, where 2.x has a linear layer
        raise ValueError(
            f"{checkpoint} is MVDream on Stable Diffusion 1.x, whose layers and text encoder are others; "
            "take sd-v2.1-base-4view.pt"
        )
    _check_schedule(tensors, checkpoint)
    _copy_part(base, out, "tokenizer")
    _save_unet(unet, out, checkpoint)
    autoencoder, text = take(tensors, _AUTOENCODER), take(tensors, _TEXT)
    if autoencoder:
        _save_autoencoder(autoencoder, out, checkpoint)
    else:
        _copy_part(base, out, "vae")
    if text:
        _save_text_encoder(text, out, checkpoint)
    else:
        _copy_part(base, out, "text_encoder")
    write_json(out / "scheduler" / "scheduler_config.json", _SCHEDULER)
    write_json(out / "model_index.json", _INDEX)


def _check_schedule(tensors: Mapping[str, Tensor], checkpoint: Path) -> None:
    found, expected = tensors.get("alphas_cumprod"), NoiseSchedule.scaled_linear().alphas_cumprod
    if found is not None and (found.shape != expected.shape or not torch.allclose(found.float(), expected, atol=1e-4)):
        raise ValueError(f"{checkpoint} was trained with another noise schedule than Stable Diffusion's; not supported")


def _save_unet(tensors: dict[str, Tensor], out: Path, checkpoint: Path) -> None:
    """diffusers knows the layout but for the camera's embedding, which is a class embedding to it."""
    renamed = {
        _UNET + (f"label_emb.0.{name.removeprefix(_CAMERAS)}" if name.startswith(_CAMERAS) else name): value
        for name, value in tensors.items()
    }
    try:
        config = unet_config(tensors)
    except KeyError as error:
        raise ValueError(f"{checkpoint} does not fill the unet: {error} is missing") from None
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    _save_filled(unet, convert_ldm_unet_checkpoint(renamed, config), out / "unet", checkpoint)


def unet_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """diffusers' configuration of a UNet with these tensors, named as in the checkpoint but without its prefix."""
    num_blocks = _count(tensors, "input_blocks.")
    num_levels = 1 + sum(f"input_blocks.{i}.0.op.weight" in tensors for i in range(num_blocks))
    per_level = (num_blocks - num_levels) // num_levels
    firsts = [1 + level * (per_level + 1) for level in range(num_levels)]  # each level's first block
    widths = [len(tensors[f"input_blocks.{i}.0.out_layers.3.bias"]) for i in firsts]
    attends = [f"input_blocks.{i}.1.norm.weight" in tensors for i in firsts]
    text = tensors["middle_block.1.transformer_blocks.0.attn2.to_k.weight"]
    return {
        "sample_size": 32,
        "in_channels": tensors["input_blocks.0.0.weight"].shape[1],
        "out_channels": len(tensors["out.2.bias"]),
        "down_block_types": ["CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attends)],
        "block_out_channels": widths,
        "layers_per_block": per_level,
        "cross_attention_dim": text.shape[1],
        "attention_head_dim": [width // _HEAD_WIDTH for width in widths],  # diffusers means the number of heads
        "use_linear_projection": True,
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": CAMERA_DIM,
    }


def _save_autoencoder(tensors: dict[str, Tensor], out: Path, checkpoint: Path) -> None:
    num_levels = _count(tensors, "encoder.down.")
    config = {
        "sample_size": 256,
        "latent_channels": len(tensors["post_quant_conv.bias"]),
        "block_out_channels": [len(tensors[f"encoder.down.{i}.block.0.conv1.bias"]) for i in range(num_levels)],
        "down_block_types": ["DownEncoderBlock2D"] * num_levels,
        "up_block_types": ["UpDecoderBlock2D"] * num_levels,
        "layers_per_block": _count(tensors, "encoder.down.0.block."),
        "scaling_factor": _SCALING_FACTOR,
    }
    with torch.device("meta"):
        autoencoder = AutoencoderKL.from_config(config)
    named = {_AUTOENCODER + name: value for name, value in tensors.items()}
    _save_filled(autoencoder, convert_ldm_vae_checkpoint(named, config), out / "vae", checkpoint)


def _save_text_encoder(tensors: dict[str, Tensor], out: Path, checkpoint: Path) -> None:
    """Without the last layer: Stable Diffusion 2.x reads the last but one."""
    config = text_config(tensors, num_heads=len(tensors["ln_final.weight"]) // _HEAD_WIDTH)
    last = config["num_hidden_layers"] - 1
    with torch.device("meta"):
        text_encoder = CLIPTextModel(CLIPTextConfig(**(config | {"num_hidden_layers": last})))
    state = {name: value for name, value in text_state(tensors).items() if f".layers.{last}." not in name}
    _save_filled(text_encoder, state, out / "text_encoder", checkpoint)


def _save_filled(
    model: UNet2DConditionModel | AutoencoderKL | CLIPTextModel,
    tensors: Mapping[str, Tensor],
    folder: Path,
    checkpoint: Path,
) -> None:
    fill(model, tensors, what=f"the {folder.name}", checkpoint=checkpoint)
    model.save_pretrained(folder)


def _copy_part(base: Path, out: Path, part: str) -> None:
    if not (base / part).is_dir():
        raise ValueError(f"{base} has no {part}/, which the checkpoint lacks, too; give a Stable Diffusion 2.1 folder")
    shutil.copytree(base / part, out / part)


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)})
