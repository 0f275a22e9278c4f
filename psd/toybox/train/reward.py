"""The training of CLIP-style preference rewards: a CLIPModel whose scaled cosine is a Bradley-Terry utility."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from psd.toybox.train.loop import Clock, cosine_lr
from psd.toybox.train.preferences import Pairs, PairSampler
from psd.toybox.train.tokenizer import MAX_TOKENS

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
BATCH_SIZE = 48
LEARNING_RATE = 1e-3


@dataclass(frozen=True, kw_only=True)
class RewardSize:
    vision_width: int
    vision_layers: int
    patch_size: int
    text_width: int
    text_layers: int
    projection: int = 64


REWARD = RewardSize(vision_width=96, vision_layers=3, patch_size=4, text_width=64, text_layers=2)
JUDGE = RewardSize(vision_width=128, vision_layers=4, patch_size=8, text_width=96, text_layers=1)


def build(size: RewardSize, tokenizer: CLIPTokenizer) -> CLIPModel:
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.text_width,
        intermediate_size=4 * size.text_width,
        num_hidden_layers=size.text_layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=size.vision_width,
        intermediate_size=4 * size.vision_width,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=4,
        image_size=32,
        patch_size=size.patch_size,
    )
    return CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=size.projection)
    )


def features(model: CLIPModel, tokenizer: CLIPTokenizer, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """Unit embeddings of the better pictures, the worse ones and the sentences."""
    pixels = (torch.cat([pairs.better, pairs.worse]) - 0.5) / 0.5
    images = F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
    tokens = tokenizer(pairs.sentences, padding="max_length", truncation=True, return_tensors="pt")
    texts = model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
    better, worse = images.chunk(2)
    return better, worse, F.normalize(texts, dim=-1)


def train(size: RewardSize, sampler: PairSampler, tokenizer: CLIPTokenizer, clock: Clock, seed: int) -> CLIPModel:
    """Bradley-Terry on the pairs, plus CLIP's contrast between the better pictures and all sentences of the batch."""
    torch.manual_seed(seed)
    model = build(size, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.02)
    for fraction in clock:
        cosine_lr(optimizer, LEARNING_RATE, fraction, warmup=0.05)
        pairs = sampler(BATCH_SIZE)
        better, worse, texts = features(model, tokenizer, pairs)
        scale = model.logit_scale.exp().clamp(max=50)
        gap = scale * ((better - worse) * texts).sum(-1)
        same = torch.tensor([[a == b for b in pairs.sentences] for a in pairs.sentences])
        logits = (scale * better @ texts.T).masked_fill(same & ~torch.eye(len(same), dtype=torch.bool), -1e4)
        index = torch.arange(len(logits))
        contrast = (F.cross_entropy(logits, index) + F.cross_entropy(logits.T, index)) / 2
        loss = -F.logsigmoid(gap).mean() + 0.3 * contrast
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        clock.report(loss=loss, contrast=contrast, accuracy=(gap > 0).float().mean())
    return model.eval()


@torch.inference_mode()
def accuracy(model: CLIPModel, tokenizer: CLIPTokenizer, sampler: PairSampler, num_pairs: int = 2000) -> float:
    """The share of fresh pairs in which the better picture scores higher."""
    right = 0.0
    for _ in range(num_pairs // 100):
        better, worse, texts = features(model, tokenizer, sampler(100))
        right += float((((better - worse) * texts).sum(-1) > 0).float().sum())
    return right / (num_pairs // 100 * 100)


def save(model: CLIPModel, tokenizer: CLIPTokenizer, out: Path) -> None:
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size=size, image_mean=list(MEAN), image_std=list(STD)
    ).save_pretrained(out)
