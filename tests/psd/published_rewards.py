"""Tiny random checkpoints in the layouts in which rewards are published, and plain statements of what they compute."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.psd.checkpoints import make_tokenizer

NUM_HEADS = 16


def weight(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator) / max(shape[-1], 1) ** 0.5


def open_clip_state(
    *, width: int = 32, layers: int = 2, patch: int = 4, image: int = 16, dim: int = 16
) -> dict[str, Tensor]:
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


def open_clip_cosine(state: dict[str, Tensor], pixels: Tensor, ids: Tensor) -> Tensor:
    """open_clip's `image_features * text_features`, from its names; the end of text has the highest id."""
    image = _open_clip_image(state, pixels) @ state["visual.proj"]
    text = state["token_embedding.weight"][ids] + state["positional_embedding"][: ids.shape[1]]
    mask = torch.full((ids.shape[1], ids.shape[1]), float("-inf")).triu(1)
    text = _norm(state, "ln_final", _open_clip_blocks(state, "transformer", text, mask))
    text = text[torch.arange(len(text)), ids.argmax(-1)] @ state["text_projection"]
    return (F.normalize(image, dim=-1) * F.normalize(text, dim=-1)).sum(-1)


def _open_clip_image(state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    patches = F.conv2d(pixels, state["visual.conv1.weight"], stride=state["visual.conv1.weight"].shape[-1])
    patches = patches.flatten(2).transpose(1, 2)
    first = state["visual.class_embedding"].expand(len(patches), 1, -1)
    x = torch.cat([first, patches], dim=1) + state["visual.positional_embedding"]
    x = _open_clip_blocks(state, "visual.transformer", _norm(state, "visual.ln_pre", x), None)
    return _norm(state, "visual.ln_post", x[:, 0])


def _open_clip_blocks(state: dict[str, Tensor], tower: str, x: Tensor, mask: Tensor | None) -> Tensor:
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


def _linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def _norm(state: dict[str, Tensor], name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def save_clip_tokenizer(folder: Path) -> Path:
    make_tokenizer().save_pretrained(folder)
    return folder
