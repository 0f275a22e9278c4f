"""Reward3D (DreamReward, arXiv 2403.14613): one score for four views of an object."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from psd.rewards import image_reward
from psd.rewards.base import check_groups
from psd.rewards.blip import BlipScorer, convert_blip, load_scorer
from psd.state_dicts import read_state_dict, take

NUM_VIEWS = 4
MAX_TOKENS = 100
_SCORER, _FUSION = "Reward3DScorer", "Reward3DCrossViewFusion"
_FEATURES = 128  # of a view, taken behind the second layer of ImageReward's head
_FUSION_HEADS = 12
_FUSION_STD = 5.0


class Reward3D:
    """ImageReward's features of four views, joined; from a folder made by ``psd convert reward3d``.

    Both published versions are read: the paper's, a small head on the concatenated views, and the later one with
    attention between views. Views are consecutive and a quarter of a turn apart, and the authors' program gives each
    the prompt of its direction ("…, side view"); every view of a group gets the group's score.

    The authors' program leaves dropout on while it optimises; here it is off, so that a score is a function.
    """

    differentiable = True
    group_size = NUM_VIEWS

    def __init__(self, scorer: BlipScorer) -> None:
        self._scorer = scorer

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Reward3D:
        """Raises:
        ValueError: the folder, a file in it or its weights are missing or damaged, or it holds another model.
        """
        scorer = load_scorer(
            Path(folder),
            lambda name, width: ConcatenatedViews(width) if name == _SCORER else FusedViews(width),
            architecture="Reward3D",
            max_tokens=MAX_TOKENS,
            dtype=dtype,
            device=device,
        )
        return cls(scorer)

    def __call__(self, rgb: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        check_groups(self, len(rgb), len(prompts))
        features = self._scorer.features(rgb, list(prompts))
        scores: Tensor = self._scorer.head(features.unflatten(0, (-1, NUM_VIEWS)))
        return scores.repeat_interleave(NUM_VIEWS)


class ConcatenatedViews(nn.Module):
    """The head of the paper and of ``Reward3D_Scorer.pt``: two layers of ImageReward's for each view, three for all."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.views = nn.Sequential(nn.Linear(width, 1024), nn.Linear(1024, _FEATURES))
        self.object = nn.Sequential(nn.Linear(NUM_VIEWS * _FEATURES, 256), nn.Linear(256, 64), nn.Linear(64, 1))

    def forward(self, features: Float[Tensor, "g 4 dim"]) -> Float[Tensor, " g"]:
        scores: Tensor = self.object(self.views(features).flatten(1))[:, 0]
        return (scores - image_reward.MEAN) / image_reward.STD

    @staticmethod
    def state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        mlp = image_reward.mlp_state(take(tensors, "mlp."))
        renamed = {f"views.{name}": value for name, value in mlp.items() if name[0] in "01"}
        for i in range(3):
            renamed |= {f"object.{i}.{kind}": tensors[f"Scorer.fc{i + 1}.{kind}"] for kind in ("weight", "bias")}
        return renamed


class FusedViews(nn.Module):
    """The head of ``Reward3D_CrossViewFusion.pt``: attention between the views behind a gate, then ImageReward's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, _FUSION_HEADS, batch_first=True)
        self.gate = nn.Linear(2 * width, width)
        self.mlp = image_reward.linear_mlp(width)

    def forward(self, features: Float[Tensor, "g 4 dim"]) -> Float[Tensor, " g"]:
        attended, _ = self.attention(features, features, features, need_weights=False)
        gate = self.gate(torch.cat([features, attended], dim=-1)).sigmoid()
        fused = (gate * attended + (1 - gate) * features).mean(1)
        scores: Tensor = self.mlp(fused)[:, 0]
        return (scores - image_reward.MEAN) / _FUSION_STD

    @staticmethod
    def state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        adapter = take(tensors, "cross_view_adapter.")
        renamed = {f"attention.{name}": value for name, value in take(adapter, "self_attn.").items()}
        renamed |= {f"gate.{kind}": adapter[f"fusion_gate.0.{kind}"] for kind in ("weight", "bias")}
        return renamed | {f"mlp.{name}": value for name, value in image_reward.mlp_state(take(tensors, "mlp.")).items()}


def convert_reward3d(checkpoint: Path, out: Path, tokenizer: Path) -> None:
    """From ``Reward3D_Scorer.pt`` or ``Reward3D_CrossViewFusion.pt`` to a folder; ``tokenizer`` as for ImageReward.

    Raises:
        ValueError: the file is damaged or another model's, or the tokenizer is another model's.
    """
    tensors = read_state_dict(checkpoint)
    try:
        if "Scorer.fc3.weight" in tensors:
            name, head = _SCORER, ConcatenatedViews.state(tensors)
        elif "cross_view_adapter.fusion_gate.0.weight" in tensors:
            name, head = _FUSION, FusedViews.state(tensors)
        else:
            raise ValueError("neither of Reward3D's heads (Scorer, cross_view_adapter) is among its tensors")
        convert_blip(tensors, {key: value.float() for key, value in head.items()}, name, out, tokenizer)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from None
