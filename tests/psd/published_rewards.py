"""Tiny random checkpoints in the layouts in which rewards are published, and plain statements of what they compute.

The statements take tensors under their published names and share nothing with psd or transformers.
"""

from __future__ import annotations

import itertools
import string
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BertTokenizer, BlipForQuestionAnswering, PreTrainedTokenizerBase
from transformers.models.blip.configuration_blip import BlipConfig, BlipTextConfig, BlipVisionConfig
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from tests.psd.checkpoints import make_tokenizer

State: TypeAlias = dict[str, Tensor]

NUM_HEADS = 16
WORDS = ("red", "blue", "cube", "a", "yes", "no", "does", "this", "figure", "show", "?", '"')
LETTERS = string.ascii_lowercase
BERT_VOCABULARY = {
    word: i
    for i, word in enumerate(
        dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *LETTERS, *(f"##{x}" for x in LETTERS)])
    )
}


def weight(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator) / max(shape[-1], 1) ** 0.5


def open_clip_state(*, width: int = 32, layers: int = 2, patch: int = 4, image: int = 16, dim: int = 16) -> State:
    """open_clip's names for a ViT with its text tower, as in `HPS_v2.1_compressed.pt`."""
    generator = torch.Generator().manual_seed(3)
    tokenizer = make_tokenizer()

    def draw(*shape: int) -> Tensor:
        return weight(*shape, generator=generator)

    state = {
        "positional_embedding": draw(tokenizer.model_max_length, width),
        "text_projection": draw(width, dim),
        "logit_scale": torch.tensor(4.6),
        "visual.class_embedding": draw(width),
        "visual.positional_embedding": draw((image // patch) ** 2 + 1, width),
        "visual.proj": draw(width, dim),
        "visual.conv1.weight": draw(width, 3, patch, patch) / patch,
        "token_embedding.weight": draw(len(tokenizer), width),
    }
    for norm in ("visual.ln_pre", "visual.ln_post", "ln_final"):
        state |= {f"{norm}.weight": 1 + 0.1 * draw(width), f"{norm}.bias": 0.1 * draw(width)}
    for tower in ("visual.transformer", "transformer"):
        for layer in range(layers):
            block = f"{tower}.resblocks.{layer}"
            for norm in ("ln_1", "ln_2"):
                state |= {f"{block}.{norm}.weight": 1 + 0.1 * draw(width), f"{block}.{norm}.bias": 0.1 * draw(width)}
            state |= {
                f"{block}.attn.in_proj_weight": draw(3 * width, width),
                f"{block}.attn.in_proj_bias": 0.1 * draw(3 * width),
                f"{block}.attn.out_proj.weight": draw(width, width),
                f"{block}.attn.out_proj.bias": 0.1 * draw(width),
                f"{block}.mlp.c_fc.weight": draw(2 * width, width),
                f"{block}.mlp.c_fc.bias": 0.1 * draw(2 * width),
                f"{block}.mlp.c_proj.weight": draw(width, 2 * width),
                f"{block}.mlp.c_proj.bias": 0.1 * draw(width),
            }
    return state


def open_clip_cosine(state: State, pixels: Tensor, ids: Tensor) -> Tensor:
    """open_clip's `image_features * text_features`, from its names; the end of text has the highest id."""
    image = _open_clip_image(state, pixels) @ state["visual.proj"]
    text = state["token_embedding.weight"][ids] + state["positional_embedding"][: ids.shape[1]]
    mask = torch.full((ids.shape[1], ids.shape[1]), float("-inf")).triu(1)
    text = _norm(state, "ln_final", _open_clip_blocks(state, "transformer", text, mask))
    text = text[torch.arange(len(text)), ids.argmax(-1)] @ state["text_projection"]
    return (F.normalize(image, dim=-1) * F.normalize(text, dim=-1)).sum(-1)


def _open_clip_image(state: State, pixels: Tensor) -> Tensor:
    patches = F.conv2d(pixels, state["visual.conv1.weight"], stride=state["visual.conv1.weight"].shape[-1])
    patches = patches.flatten(2).transpose(1, 2)
    first = state["visual.class_embedding"].expand(len(patches), 1, -1)
    x = torch.cat([first, patches], dim=1) + state["visual.positional_embedding"]
    x = _open_clip_blocks(state, "visual.transformer", _norm(state, "visual.ln_pre", x), None)
    return _norm(state, "visual.ln_post", x[:, 0])


def _open_clip_blocks(state: State, tower: str, x: Tensor, mask: Tensor | None) -> Tensor:
    layer = 0
    while (block := f"{tower}.resblocks.{layer}") + ".ln_1.weight" in state:
        y = _norm(state, f"{block}.ln_1", x)
        packed = F.linear(y, state[f"{block}.attn.in_proj_weight"], state[f"{block}.attn.in_proj_bias"])
        attended = attention(*packed.chunk(3, dim=-1), num_heads=NUM_HEADS, mask=mask)
        x = x + _linear(state, f"{block}.attn.out_proj", attended)
        y = F.gelu(_linear(state, f"{block}.mlp.c_fc", _norm(state, f"{block}.ln_2", x)))
        x = x + _linear(state, f"{block}.mlp.c_proj", y)
        layer += 1
    return x


def attention(q: Tensor, k: Tensor, v: Tensor, *, num_heads: int, mask: Tensor | None = None) -> Tensor:
    """softmax(q k / sqrt(d)) v, head by head; the mask is added to the scores."""
    heads = [x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v)]
    scores = heads[0] @ heads[1].transpose(-1, -2) / heads[0].shape[-1] ** 0.5
    scores = scores if mask is None else scores + mask
    return (scores.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2)


def _linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def _norm(state: State, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def blip_state(*, width: int = 32, text_width: int = 24, layers: int = 2, patch: int = 4, image: int = 16) -> State:
    """BLIP's names for its vision transformer and its text encoder, under `blip.`, as in `ImageReward.pt`."""
    generator = torch.Generator().manual_seed(4)

    def linear(name: str, outputs: int, inputs: int) -> State:
        return {
            f"{name}.weight": weight(outputs, inputs, generator=generator),
            f"{name}.bias": 0.1 * weight(outputs, generator=generator) * outputs**0.5,
        }

    def norm(name: str, size: int) -> State:
        drawn = torch.randn(2, size, generator=generator)
        return {f"{name}.weight": 1 + 0.1 * drawn[0], f"{name}.bias": 0.1 * drawn[1]}

    state = {
        "visual_encoder.cls_token": torch.randn(1, 1, width, generator=generator),
        "visual_encoder.pos_embed": torch.randn(1, (image // patch) ** 2 + 1, width, generator=generator),
        "visual_encoder.patch_embed.proj.weight": weight(width, 3, patch, patch, generator=generator) / patch,
        "visual_encoder.patch_embed.proj.bias": torch.zeros(width),
        **norm("visual_encoder.norm", width),
        "text_encoder.embeddings.word_embeddings.weight": torch.randn(len(BERT_VOCABULARY) + 2, text_width,
                                                                      generator=generator),
        "text_encoder.embeddings.position_embeddings.weight": torch.randn(40, text_width, generator=generator),
        "text_encoder.embeddings.position_ids": torch.arange(40)[None],
        **norm("text_encoder.embeddings.LayerNorm", text_width),
        **linear("vision_proj", 8, width),
        **linear("text_proj", 8, text_width),
    }  # fmt: skip
    for layer in range(layers):
        block = f"visual_encoder.blocks.{layer}"
        state |= norm(f"{block}.norm1", width) | norm(f"{block}.norm2", width)
        state |= linear(f"{block}.attn.qkv", 3 * width, width) | linear(f"{block}.attn.proj", width, width)
        state |= linear(f"{block}.mlp.fc1", 2 * width, width) | linear(f"{block}.mlp.fc2", width, 2 * width)
        block = f"text_encoder.encoder.layer.{layer}"
        for kind, source in (("attention", text_width), ("crossattention", width)):
            state |= linear(f"{block}.{kind}.self.query", text_width, text_width)
            state |= linear(f"{block}.{kind}.self.key", text_width, source)
            state |= linear(f"{block}.{kind}.self.value", text_width, source)
            state |= linear(f"{block}.{kind}.output.dense", text_width, text_width)
            state |= norm(f"{block}.{kind}.output.LayerNorm", text_width)
        state |= linear(f"{block}.intermediate.dense", 2 * text_width, text_width)
        state |= linear(f"{block}.output.dense", text_width, 2 * text_width)
        state |= norm(f"{block}.output.LayerNorm", text_width)
    return {f"blip.{name}": value for name, value in state.items()}


def mlp_head(inputs: int, *, prefix: str = "") -> State:
    """The five layers of ImageReward's and LAION's heads, numbered with the dropout between them."""
    generator = torch.Generator().manual_seed(5)
    widths = (inputs, 1024, 128, 64, 16, 1)
    state = {}
    for layer, (a, b) in zip((0, 2, 4, 6, 7), itertools.pairwise(widths), strict=True):
        state[f"{prefix}layers.{layer}.weight"] = 2 * weight(b, a, generator=generator)
        state[f"{prefix}layers.{layer}.bias"] = 0.1 * torch.randn(b, generator=generator)
    return state


def image_reward_state() -> State:
    return blip_state() | mlp_head(24, prefix="mlp.")


def reward3d_state(version: str) -> State:
    generator = torch.Generator().manual_seed(6)

    def linear(name: str, outputs: int, inputs: int, separator: str = ".") -> State:
        return {
            f"{name}{separator}weight": 2 * weight(outputs, inputs, generator=generator),
            f"{name}{separator}bias": 0.1 * torch.randn(outputs, generator=generator),
        }

    if version == "Scorer":
        head = linear("Scorer.fc1", 256, 512) | linear("Scorer.fc2", 64, 256) | linear("Scorer.fc3", 1, 64)
    else:
        head = linear("cross_view_adapter.self_attn.in_proj", 72, 24, "_")
        head |= linear("cross_view_adapter.self_attn.out_proj", 24, 24)
        head |= linear("cross_view_adapter.fusion_gate.0", 24, 48)
    return image_reward_state() | head


def blip_features(state: State, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The first token of BLIP's text encoder, which reads the words and looks at the picture."""
    vision = "blip.visual_encoder"
    x = F.conv2d(pixels, state[f"{vision}.patch_embed.proj.weight"], state[f"{vision}.patch_embed.proj.bias"], stride=4)
    x = torch.cat([state[f"{vision}.cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
    x = x + state[f"{vision}.pos_embed"]
    for layer in range(2):
        block = f"{vision}.blocks.{layer}"
        packed = _linear(state, f"{block}.attn.qkv", _norm(state, f"{block}.norm1", x, 1e-6))
        x = x + _linear(state, f"{block}.attn.proj", attention(*packed.chunk(3, dim=-1), num_heads=16))
        y = F.gelu(_linear(state, f"{block}.mlp.fc1", _norm(state, f"{block}.norm2", x, 1e-6)))
        x = x + _linear(state, f"{block}.mlp.fc2", y)
    patches = _norm(state, f"{vision}.norm", x, 1e-6)

    text = "blip.text_encoder"
    x = state[f"{text}.embeddings.word_embeddings.weight"][ids]
    x = x + state[f"{text}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = _norm(state, f"{text}.embeddings.LayerNorm", x, 1e-12)
    hidden = torch.where(mask == 1, 0.0, float("-inf"))[:, None, None, :]
    for layer in range(2):
        block = f"{text}.encoder.layer.{layer}"
        x = _bert_attention(state, f"{block}.attention", x, x, hidden)
        x = _bert_attention(state, f"{block}.crossattention", x, patches, None)
        y = F.gelu(_linear(state, f"{block}.intermediate.dense", x))
        x = _norm(state, f"{block}.output.LayerNorm", _linear(state, f"{block}.output.dense", y) + x, 1e-12)
    return x[:, 0]


def _bert_attention(state: State, name: str, x: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
    query = _linear(state, f"{name}.self.query", x)
    key, value = (_linear(state, f"{name}.self.{part}", source) for part in ("key", "value"))
    attended = attention(query, key, value, num_heads=12, mask=mask)
    return _norm(state, f"{name}.output.LayerNorm", _linear(state, f"{name}.output.dense", attended) + x, 1e-12)


def mlp(state: State, x: Tensor, *, prefix: str = "", last: int = 7) -> Tensor:
    """The head's layers up to the one with the number ``last``."""
    for layer in (0, 2, 4, 6, 7):
        if layer <= last:
            x = _linear(state, f"{prefix}layers.{layer}", x)
    return x


def reward3d_score(state: State, features: Tensor) -> Tensor:
    """Of groups of four features, as DreamReward's program says, with dropout off."""
    if "Scorer.fc1.weight" in state:
        x = mlp(state, features, prefix="mlp.", last=2).reshape(-1, 4 * 128)
        for layer in ("Scorer.fc1", "Scorer.fc2", "Scorer.fc3"):
            x = _linear(state, layer, x)
        return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072
    adapter = "cross_view_adapter"
    views = features.reshape(-1, 4, features.shape[-1])
    packed = F.linear(views, state[f"{adapter}.self_attn.in_proj_weight"], state[f"{adapter}.self_attn.in_proj_bias"])
    attended = attention(*packed.chunk(3, dim=-1), num_heads=12)
    attended = _linear(state, f"{adapter}.self_attn.out_proj", attended)
    gate = _linear(state, f"{adapter}.fusion_gate.0", torch.cat([views, attended], dim=-1)).sigmoid()
    fused = (gate * attended + (1 - gate) * views).mean(1)
    return (mlp(state, fused, prefix="mlp.")[:, 0] - 0.16717362830052426) / 5


def make_bert_tokenizer() -> BertTokenizer:
    return BertTokenizer(vocab=dict(BERT_VOCABULARY), model_max_length=40)


def save_vqa(folder: Path) -> Path:
    """`Salesforce/blip-vqa-base` in small."""
    torch.manual_seed(7)
    words = len(BERT_VOCABULARY)
    text = BlipTextConfig(
        vocab_size=words + 2, hidden_size=32, encoder_hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=40, bos_token_id=words, pad_token_id=0, sep_token_id=3,
        initializer_range=0.2,
    )  # fmt: skip
    vision = BlipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4,
        initializer_range=0.2,
    )  # fmt: skip
    BlipForQuestionAnswering(BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())).save_pretrained(
        folder
    )
    make_bert_tokenizer().save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    tokenizer.save_pretrained(folder)
    return folder
