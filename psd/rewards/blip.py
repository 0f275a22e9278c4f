"""BLIP (arXiv 2201.12086) as rewards use it: an image read by a text encoder that attends to it.

ImageReward and Reward3D were published with BLIP's own code. Here they are transformers' BLIP parts with a head.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertTokenizer
from transformers.models.blip.configuration_blip import BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from psd.checkpoint_files import read_json, write_json
from psd.rewards.preprocessing import Preprocessing
from psd.rewards.prompt_tokens import PromptTokens
from psd.rewards.reward_folder import check_reward_folder
from psd.state_dicts import take

# Of ViT-L/16 and BERT-base. State dicts do not say them, and transformers' defaults for BLIP differ in all but one.
_VISION_HEADS, _TEXT_HEADS = 16, 12
_VISION_EPS, _TEXT_EPS = 1e-6, 1e-12
_VISION_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
}


class ImageTextEncoder(nn.Module):
    """A vision transformer, and a BERT whose tokens attend to its patches. The first token is the feature."""

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig) -> None:
        super().__init__()
        self.vision_model = BlipVisionModel(vision)
        self.text_encoder = BlipTextModel(text, add_pooling_layer=False)

    def forward(
        self, pixels: Float[Tensor, "b 3 h w"], ids: Int[Tensor, "b tokens"], mask: Int[Tensor, "b tokens"] | None
    ) -> Float[Tensor, "b dim"]:
        patches = self.vision_model(pixels.to(self.vision_model.dtype)).last_hidden_state
        hidden: Tensor = self.text_encoder(ids, attention_mask=mask, encoder_hidden_states=patches).last_hidden_state
        return hidden[:, 0].float()


class BlipScorer(nn.Module):
    """An encoder with a head, and the words and pictures that go into it: what a converted folder holds."""

    def __init__(
        self,
        encoder: ImageTextEncoder,
        head: nn.Module,
        tokenizer: BertTokenizer,
        preprocessing: Preprocessing,
        max_tokens: int,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.tokens = PromptTokens(tokenizer, max_tokens)
        self.preprocess = preprocessing
        self.requires_grad_(False).eval()

    def features(self, rgb: Float[Tensor, "b 3 h w"], prompts: list[str]) -> Float[Tensor, "b dim"]:
        ids, mask = self.tokens(prompts, rgb.device)
        features: Tensor = self.encoder(self.preprocess(rgb), ids, mask)
        return features


def load_scorer(
    root: Path,
    make_head: Callable[[str, int], nn.Module],
    *,
    architecture: str,
    max_tokens: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> BlipScorer:
    """A scorer from the folder that ``psd convert`` made; the encoder in ``dtype``, the head in float32.

    ``make_head`` gets the architecture's name, which must start with ``architecture``, and the width of the features.

    Raises:
        ValueError: the folder, a file in it or its weights are missing or damaged, or it holds another kind of model.
    """
    found = check_reward_folder(root, architecture)
    config = read_json(root / "config.json", kind=architecture)
    preprocessing = Preprocessing.from_json(root / "preprocessor_config.json")
    vision, text = BlipVisionConfig(**config["vision_config"]), BlipTextConfig(**config["text_config"])
    tokenizer = BertTokenizer.from_pretrained(root, local_files_only=True)
    head = make_head(found, text.hidden_size)
    scorer = BlipScorer(ImageTextEncoder(vision, text), head, tokenizer, preprocessing, max_tokens)
    try:
        scorer.load_state_dict(load_file(root / "model.safetensors"))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"the weights in {root} do not fit a {found}: {str(error)[:300]}") from error
    scorer.encoder.to(dtype)
    return scorer.to(device)


def convert_blip(
    tensors: dict[str, Tensor], head: dict[str, Tensor], architecture: str, out: Path, tokenizer: Path
) -> None:
    """Writes the folder that ``load_scorer`` reads, from tensors under BLIP's own names (``blip.visual_encoder``,
    ``blip.text_encoder``) and those of a head.

    Raises:
        ValueError: the tensors are no BLIP's, or the tokenizer is another model's.
    """
    vision, text = take(tensors, "blip.visual_encoder."), take(tensors, "blip.text_encoder.")
    needed = [(vision, "pos_embed"), (vision, "patch_embed.proj.weight"), (text, "embeddings.word_embeddings.weight")]
    if missing := [name for part, name in needed if name not in part]:
        raise ValueError(f"no BLIP with a head: {missing[0]} is missing among its tensors")
    vision_config, text_config = _vision_config(vision), _text_config(text, len(vision["pos_embed"][0, 0]))
    words = BertTokenizer.from_pretrained(tokenizer, local_files_only=True)
    if not text_config.vocab_size - 2 <= len(words) <= text_config.vocab_size:  # BLIP added [DEC] and [ENC]
        raise ValueError(
            f"the tokenizer in {tokenizer} has {len(words)} tokens, the checkpoint {text_config.vocab_size}; "
            "give a folder with bert-base-uncased's tokenizer"
        )
    renamed = {f"encoder.vision_model.{_vision_name(name)}": value for name, value in vision.items()}
    renamed |= {f"encoder.text_encoder.{name}": value for name, value in text.items() if "position_ids" not in name}
    renamed |= {f"head.{name}": value for name, value in head.items()}
    save_file({name: value.contiguous() for name, value in renamed.items()}, out / "model.safetensors")
    config = {
        "architectures": [architecture],
        "vision_config": vision_config.to_diff_dict(),
        "text_config": text_config.to_diff_dict(),
    }
    write_json(out / "config.json", config)
    preprocessing = Preprocessing(image_size=int(vision_config.image_size))
    write_json(out / "preprocessor_config.json", preprocessing.to_json())
    words.save_pretrained(out)


def _vision_name(name: str) -> str:
    """timm's name of a vision transformer's tensor, as BLIP uses it, into transformers'."""
    if found := re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name):
        layer, module, kind = found.groups()
        return f"encoder.layers.{layer}.{_VISION_NAMES.get(module, module)}.{kind}"
    stem, _, kind = name.rpartition(".")
    return f"{_VISION_NAMES[stem]}.{kind}" if stem in _VISION_NAMES else _VISION_NAMES.get(name, name)


def _vision_config(tensors: dict[str, Tensor]) -> BlipVisionConfig:
    """The sizes that the tensors have."""
    patch_size = tensors["patch_embed.proj.weight"].shape[-1]
    return BlipVisionConfig(
        hidden_size=tensors["pos_embed"].shape[-1],
        intermediate_size=len(tensors["blocks.0.mlp.fc1.bias"]),
        num_hidden_layers=len({name.split(".")[0] for name in take(tensors, "blocks.")}),
        num_attention_heads=_VISION_HEADS,
        image_size=round((tensors["pos_embed"].shape[1] - 1) ** 0.5) * patch_size,
        patch_size=patch_size,
        layer_norm_eps=_VISION_EPS,
    )


def _text_config(tensors: dict[str, Tensor], vision_width: int) -> BlipTextConfig:
    vocab_size, width = tensors["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        encoder_hidden_size=vision_width,
        intermediate_size=len(tensors["encoder.layer.0.intermediate.dense.bias"]),
        num_hidden_layers=len({name.split(".")[0] for name in take(tensors, "encoder.layer.")}),
        num_attention_heads=_TEXT_HEADS,
        max_position_embeddings=len(tensors["embeddings.position_embeddings.weight"]),
        layer_norm_eps=_TEXT_EPS,
        is_decoder=True,  # in transformers, what gives its layers cross-attention
    )
