"""ImageReward (Xu et al., arXiv 2304.05977): how well an image fits its prompt and pleases, around 0 with spread 1."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from psd.rewards.base import check_groups
from psd.rewards.blip import BlipScorer, convert_blip, load_scorer
from psd.state_dicts import read_state_dict

ARCHITECTURE = "ImageReward"
MAX_TOKENS = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's output on the authors' validation set
MLP_LAYERS = (0, 2, 4, 6, 7)  # linear ones; between them is dropout, which inference does not have
MLP_WIDTHS = (1024, 128, 64, 16, 1)


class ImageReward:
    """``(MLP(feature) - mean) / std`` of BLIP's first text token, from a folder made by ``psd convert imagereward``.

    The text encoder reads the prompt and the image together, so nothing is remembered of a prompt but its tokens.
    """

    differentiable = True
    group_size = 1

    def __init__(self, scorer: BlipScorer) -> None:
        self._scorer = scorer

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> ImageReward:
        """Raises:
        ValueError: the folder, a file in it or its weights are missing or damaged, or it holds another model.
        """
        return cls(
            load_scorer(
                Path(folder),
                lambda _, width: linear_mlp(width),
                architecture=ARCHITECTURE,
                max_tokens=MAX_TOKENS,
                dtype=dtype,
                device=device,
            )
        )

    def __call__(self, rgb: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        check_groups(self, len(rgb), len(prompts))
        scores: Tensor = self._scorer.head(self._scorer.features(rgb, list(prompts)))
        return (scores[:, 0] - MEAN) / STD


def linear_mlp(width: int) -> nn.Sequential:
    """The head of ImageReward and of LAION's aesthetic predictor: linear layers with nothing between them."""
    widths = (width, *MLP_WIDTHS)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))


def mlp_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published head's tensors, ``layers.0.weight`` and so on, under the names of ``linear_mlp``.

    Raises:
        ValueError: a layer is missing.
    """
    renamed = {}
    for i, layer in enumerate(MLP_LAYERS):
        for kind in ("weight", "bias"):
            if f"layers.{layer}.{kind}" not in tensors:
                raise ValueError(f"no head of five linear layers: layers.{layer}.{kind} is missing among its tensors")
            renamed[f"{i}.{kind}"] = tensors[f"layers.{layer}.{kind}"].float()
    return renamed


def convert_image_reward(checkpoint: Path, out: Path, tokenizer: Path) -> None:
    """From the published ``ImageReward.pt`` to a folder; ``tokenizer`` is one with bert-base-uncased's.

    Raises:
        ValueError: the file is damaged or another model's, or the tokenizer is another model's.
    """
    tensors = read_state_dict(checkpoint)
    mlp = {name.removeprefix("mlp."): value for name, value in tensors.items() if name.startswith("mlp.")}
    try:
        convert_blip(tensors, mlp_state(mlp), ARCHITECTURE, out, tokenizer)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from None
