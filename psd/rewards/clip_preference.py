"""Rewards in CLIP's form: the cosine of an image's and its prompt's embeddings (PickScore, HPSv2.1, CLIP score)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from psd.checkpoint_files import check_folder, check_weights, load_model, read_json
from psd.rewards.base import check_groups
from psd.rewards.preprocessing import Preprocessing
from psd.rewards.prompt_tokens import PromptTokens

CLIP_KIND = "CLIP reward (a transformers folder: config.json, model.safetensors, tokenizer, preprocessor_config.json)"


class ClipPreferenceReward:
    """``exp(logit_scale) * cos(image, prompt)`` of a frozen CLIP model (Pick-a-Pic, arXiv 2305.01569, equation 2).

    With ``scaled=False`` the cosine alone, as HPSv2 (arXiv 2306.09341) and CLIP score are reported. Prompts are
    embedded once and remembered.
    """

    differentiable = True
    group_size = 1

    def __init__(
        self, model: CLIPModel, tokenizer: CLIPTokenizer, preprocessing: Preprocessing, *, scaled: bool = True
    ) -> None:
        self._model = model.requires_grad_(False).eval()
        self._tokens = PromptTokens(tokenizer, model.config.text_config.max_position_embeddings)
        self._preprocess = preprocessing
        self._scaled = scaled
        self._text_features: dict[str, Tensor] = {}

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        scaled: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> ClipPreferenceReward:
        """Loads safetensors from a local folder; never from the network.

        Raises:
            ValueError: the folder, a file in it or its weights are missing or damaged, or it holds another kind of
                model.
        """
        root = Path(folder)
        model, preprocessing = load_clip(root, dtype)
        read_json(root / "tokenizer_config.json", kind=CLIP_KIND)
        tokenizer = CLIPTokenizer.from_pretrained(root, local_files_only=True)
        return cls(model.to(device), tokenizer, preprocessing, scaled=scaled)

    def __call__(self, rgb: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        check_groups(self, len(rgb), len(prompts))
        pixels = self._preprocess(rgb).to(self._model.dtype)
        image = F.normalize(self._model.get_image_features(pixels).pooler_output.float(), dim=-1)
        text = torch.stack([self._embed(prompt) for prompt in prompts])
        cosine: Tensor = (image * text).sum(-1)
        return cosine * self._model.logit_scale.float().exp() if self._scaled else cosine

    @torch.no_grad()
    def _embed(self, prompt: str) -> Float[Tensor, " dim"]:
        if prompt not in self._text_features:
            ids, mask = self._tokens([prompt], self._model.device)
            features = self._model.get_text_features(ids, mask).pooler_output
            self._text_features[prompt] = F.normalize(features.float(), dim=-1)[0]
        return self._text_features[prompt]


def load_clip(root: Path, dtype: torch.dtype) -> tuple[CLIPModel, Preprocessing]:
    """A ``CLIPModel`` and what its images go through, from a local folder with safetensors.

    Raises:
        ValueError: the folder, a file in it or its weights are missing or damaged, or it holds another kind of model.
    """
    check_folder(root, kind=CLIP_KIND)
    architectures = read_json(root / "config.json", kind=CLIP_KIND).get("architectures") or [None]
    if architectures[0] != "CLIPModel":
        raise ValueError(f"{root} holds a {architectures[0]}; a CLIP reward needs a CLIPModel")
    preprocessing = Preprocessing.from_json(root / "preprocessor_config.json", kind=CLIP_KIND)
    check_weights(root, "model.safetensors")
    load: Any = CLIPModel.from_pretrained
    model = load_model(
        lambda: load(root, use_safetensors=True, local_files_only=True, output_loading_info=True, dtype=dtype), root
    )
    return model, preprocessing
