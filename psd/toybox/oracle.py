"""The world's oracle: a small classifier of colours and shapes per view, for evaluation only.

The checkpoint is a ``ResNetForImageClassification`` whose labels are "slot/value"; each slot is a softmax of its own:
the top object's shape and colour, what it stands on ("none" where nothing), and the second colour (of stripes or base).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import ResNetForImageClassification

from psd.toybox.grammar import BASES, COLORS, SHAPES, Description, parse

SLOTS: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "base": ("none", *BASES),
    "color": tuple(COLORS),
    "second": ("none", *COLORS),
}
IMAGE_SIZE = 64  # the network halves its input twice before the first block


def labels(description: Description) -> dict[str, str]:
    """The value of each slot that a description asks for."""
    top, base = description.top, description.base
    return {
        "shape": top.shape,
        "base": base.shape if base else "none",
        "color": top.color,
        "second": base.color if base else (top.stripe or "none"),
    }


def preprocess(rgb: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 64 64"]:
    return interpolate(rgb, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True) * 2 - 1


class Oracle:
    """Which colours and shapes each view shows, and whether they are what the prompt asks for."""

    def __init__(self, model: ResNetForImageClassification):
        self._model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        names = [str(model.config.id2label[index]) for index in range(model.config.num_labels)]
        expected = [f"{slot}/{value}" for slot, values in SLOTS.items() for value in values]
        if names != expected:
            raise ValueError(f"the classifier's labels are {names}, expected {expected}")

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> Oracle:
        """Computes in float32, whatever the weights are stored in."""
        model = ResNetForImageClassification.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
        return cls(model)

    @torch.no_grad()
    def classify(self, rgb: Float[Tensor, "b 3 h w"]) -> list[dict[str, str]]:
        """The likeliest value of each slot, one dictionary a view."""
        logits = self._model(preprocess(rgb.to(self._model.device))).logits.split(
            [len(values) for values in SLOTS.values()], dim=-1
        )
        indices = torch.stack([part.argmax(-1) for part in logits], dim=-1).tolist()
        return [{slot: values[i] for (slot, values), i in zip(SLOTS.items(), row, strict=True)} for row in indices]

    def right(self, rgb: Float[Tensor, "b 3 h w"], prompt: str) -> Mapping[str, Bool[Tensor, " b"]]:
        """Per view, whether both colours and both shapes are the prompt's."""
        wanted = labels(parse(prompt))
        found = self.classify(rgb)
        return {
            measure: torch.tensor([all(view[slot] == wanted[slot] for slot in slots) for view in found])
            for measure, slots in (("color", ("color", "second")), ("shape", ("shape", "base")))
        }

    def judge(self, rgb: Float[Tensor, "b 3 h w"], prompt: str) -> dict[str, float]:
        """The share of views with the right colour, and with the right shape."""
        return {measure: float(right.float().mean()) for measure, right in self.right(rgb, prompt).items()}
