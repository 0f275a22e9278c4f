"""open_clip's names and layouts for a transformer tower, as transformers' CLIP has them.

Projections are the same, attention is packed: the three parts of `attn.in_proj` become three layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TEXT = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_LAYER = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)\.(in_proj_)?(weight|bias)")


def tower_state(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """A tower's tensors under CLIP's names; ``names`` renames what stands outside of its layers."""
    renamed = {new: tensors[old] for old, new in names.items() if old in tensors}
    for name, value in tensors.items():
        if found := _LAYER.fullmatch(name):
            layer, module, packed, kind = found.groups()
            stem = f"encoder.layers.{layer}"
            if packed:
                for letter, third in zip("qkv", value.chunk(3), strict=True):
                    renamed[f"{stem}.self_attn.{letter}_proj.{kind}"] = third.clone()
            elif module in _BLOCK:
                renamed[f"{stem}.{_BLOCK[module]}.{kind}"] = value
    return renamed


def text_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The text tower's; the other tensors of the model are left out."""
    return tower_state(tensors, _TEXT)


def num_layers(tensors: Mapping[str, Tensor]) -> int:
    """Of a tower."""
    return len({found[1] for name in tensors if (found := _LAYER.fullmatch(name))})


def text_config(tensors: Mapping[str, Tensor], num_heads: int) -> dict[str, Any]:
    """The sizes that the text tower's tensors have; ``num_heads`` they do not say."""
    num_words, width = tensors["token_embedding.weight"].shape
    return {
        "vocab_size": num_words,
        "hidden_size": width,
        "intermediate_size": len(tensors["transformer.resblocks.0.mlp.c_fc.bias"]),
        "num_hidden_layers": num_layers(tensors),
        "num_attention_heads": num_heads,
        "max_position_embeddings": len(tensors["positional_embedding"]),
        "hidden_act": "gelu",
    }
