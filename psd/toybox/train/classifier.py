"""The training of the oracle's classifier, on clean and mildly degraded renders of all descriptions."""

from __future__ import annotations

import random

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetForImageClassification

from psd.toybox.oracle import SLOTS, labels, preprocess
from psd.toybox.train.data import Scenes
from psd.toybox.train.degradation import degrade
from psd.toybox.train.loop import Clock, cosine_lr

BATCH_SIZE = 48
DEGRADED_SHARE, MAX_SEVERITY = 0.5, 0.5  # what a person would still name without doubt


def build() -> ResNetForImageClassification:
    names = [f"{slot}/{value}" for slot, values in SLOTS.items() for value in values]
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=32,
            hidden_sizes=[32, 64, 128],
            depths=[1, 1, 1],
            layer_type="basic",
            id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
        )
    ).to(memory_format=torch.channels_last)


def targets(scenes: Scenes) -> Tensor:
    """The index of the right value in each slot: [n, slots]."""
    rows = [labels(description) for description in scenes.descriptions]
    return torch.tensor([[values.index(row[slot]) for slot, values in SLOTS.items()] for row in rows])


def train(scenes: Scenes, clock: Clock, seed: int = 0) -> ResNetForImageClassification:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model, wanted = build(), targets(scenes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    sizes = [len(values) for values in SLOTS.values()]
    for fraction in clock:
        cosine_lr(optimizer, 2e-3, fraction)
        index = torch.tensor([rng.randrange(len(scenes)) for _ in range(BATCH_SIZE)])
        view = torch.tensor([rng.randrange(4) for _ in range(BATCH_SIZE)])
        rgb, opacity = scenes.rgb[index, view] / 255, scenes.opacity[index, view] / 255
        images = torch.stack(
            [
                degrade(image, silhouette, rng.uniform(0, MAX_SEVERITY), rng)
                if rng.random() < DEGRADED_SHARE
                else image
                for image, silhouette in zip(rgb, opacity, strict=True)
            ]
        )
        logits = model(preprocess(images).to(memory_format=torch.channels_last)).logits.split(sizes, dim=-1)
        loss = torch.stack([F.cross_entropy(part, wanted[index, slot]) for slot, part in enumerate(logits)]).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        clock.report(loss=loss)
    return model.eval()
