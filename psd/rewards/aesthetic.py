"""LAION's aesthetic predictor, version 2: how much people would like an image, whatever its prompt; about 4 to 7."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel

from psd.rewards.base import check_groups
from psd.rewards.clip_preference import load_transformers
from psd.rewards.image_reward import linear_mlp, mlp_state
from psd.rewards.preprocessing import Preprocessing
from psd.rewards.reward_folder import check_reward_folder
from psd.state_dicts import read_state_dict


class AestheticReward:
    """A linear MLP on CLIP's unit embedding of the image (github.com/christophschuhmann/improved-aesthetic-predictor).

    The published head, ``sac+logos+ava1-l14-linearMSE.pth``, was trained on OpenAI's ViT-L/14.
    """

    differentiable = True
    group_size = 1

    def __init__(self, model: CLIPModel, head: nn.Module, preprocessing: Preprocessing) -> None:
        self._vision = model.vision_model.requires_grad_(False).eval()
        self._projection = model.visual_projection.requires_grad_(False)
        self._head = head.requires_grad_(False).eval()
        self._preprocess = preprocessing

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        head: str | os.PathLike[str],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> AestheticReward:
        """``folder`` holds a ``CLIPModel``, ``head`` is the published file or the same tensors as safetensors.

        Raises:
            ValueError: a file is missing, damaged or another model's.
        """
        root = Path(folder)
        check_reward_folder(root, "CLIPModel", reads_text=False)
        model = load_transformers(CLIPModel, root, dtype)
        preprocessing = Preprocessing.from_json(root / "preprocessor_config.json")
        width = model.config.projection_dim
        try:
            state = mlp_state(read_state_dict(Path(head)))
            if (found := state["0.weight"].shape[1]) != width:
                raise ValueError(
                    f"it reads embeddings of {found} numbers, {folder} makes {width}; use OpenAI's ViT-L/14"
                )
            mlp = linear_mlp(width)
            mlp.load_state_dict(state)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"the aesthetic head {head} does not fit: {error}") from None
        return cls(model.to(device), mlp.to(device), preprocessing)

    def __call__(self, rgb: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        check_groups(self, len(rgb), len(prompts))
        pooled = self._vision(self._preprocess(rgb).to(self._vision.dtype)).pooler_output
        embedding = F.normalize(self._projection(pooled).float(), dim=-1)
        scores: Tensor = self._head(embedding)[:, 0]
        return scores
