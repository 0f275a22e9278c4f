"""HPSv2.1's published checkpoint as a transformers folder that ``ClipPreferenceReward`` reads."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from psd.checkpoint_files import write_json
from psd.open_clip import num_layers, text_config, text_state, tower_state
from psd.rewards.preprocessing import Preprocessing
from psd.state_dicts import fill, read_state_dict, take

_NUM_HEADS = 16  # of ViT-H/14, in both towers; a state dict does not say it
_NEEDED = ("visual.conv1.weight", "visual.proj", "token_embedding.weight", "text_projection", "logit_scale")
_VISION = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}


def convert_hpsv2(checkpoint: Path, out: Path, tokenizer: Path) -> None:
    """From ``HPS_v2.1_compressed.pt``, open_clip's state dict of a ViT-H/14, to a ``CLIPModel`` in the folder ``out``.

    ``tokenizer`` is a folder with CLIP's own: the checkpoint has none.

    Raises:
        ValueError: the file is no such state dict, or the tokenizer is another model's.
    """
    tensors = read_state_dict(checkpoint)
    if missing := [name for name in _NEEDED if name not in tensors]:
        raise ValueError(f"{checkpoint} is no open_clip state dict of a ViT with a text tower: {missing[0]} is missing")
    words = CLIPTokenizer.from_pretrained(tokenizer, local_files_only=True)
    if len(words) != len(tensors["token_embedding.weight"]):
        raise ValueError(
            f"the tokenizer in {tokenizer} has {len(words)} tokens, {checkpoint} has "
            f"{len(tensors['token_embedding.weight'])}; give a folder with CLIP's tokenizer"
        )
    config = _config(tensors, words)
    with torch.device("meta"):
        model = CLIPModel(config)
    fill(model, _renamed(tensors), what="a CLIPModel", checkpoint=checkpoint)
    model.save_pretrained(out)
    words.save_pretrained(out)
    preprocessing = Preprocessing(image_size=config.vision_config.image_size)
    write_json(out / "preprocessor_config.json", preprocessing.to_json())


def _renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's names and layouts into CLIPModel's; projections are transposed."""
    towers = {"vision_model": tower_state(take(tensors, "visual."), _VISION), "text_model": text_state(tensors)}
    return {
        "logit_scale": tensors["logit_scale"],
        "text_projection.weight": tensors["text_projection"].T.contiguous(),
        "visual_projection.weight": tensors["visual.proj"].T.contiguous(),
        **{f"{tower}.{name}": value for tower, state in towers.items() for name, value in state.items()},
    }


def _config(tensors: dict[str, Tensor], tokenizer: CLIPTokenizer) -> CLIPConfig:
    """The sizes that the tensors have."""
    patches = tensors["visual.conv1.weight"]
    num_positions, vision_width = tensors["visual.positional_embedding"].shape
    patch_size, projection = patches.shape[-1], tensors["text_projection"].shape[1]
    vision = CLIPVisionConfig(
        hidden_size=vision_width,
        intermediate_size=len(tensors["visual.transformer.resblocks.0.mlp.c_fc.bias"]),
        num_hidden_layers=num_layers(take(tensors, "visual.")),
        num_attention_heads=_NUM_HEADS,
        image_size=round((num_positions - 1) ** 0.5) * patch_size,
        patch_size=patch_size,
        hidden_act="gelu",
    )
    text = CLIPTextConfig(
        **text_config(tensors, num_heads=_NUM_HEADS),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=projection)
