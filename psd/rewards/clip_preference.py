"""Preference rewards in CLIP's form (PickScore, HPSv2.1, CLIP score): a scaled cosine of image and prompt."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from psd.checkpoint_files import check_folder, check_weights, load_model, read_json

_KIND = "CLIP reward (a transformers folder: config.json, model.safetensors, tokenizer, preprocessor_config.json)"
_BILINEAR, _BICUBIC = 2, 3  # PIL's numbers, which preprocessor_config.json uses


@dataclass(frozen=True, kw_only=True)
class ClipPreprocessing:
    """Resize the shorter side, crop the centre, normalise: what CLIPImageProcessor does, on tensors."""

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mode: str = "bicubic"

    @classmethod
    def from_json(cls, path: Path) -> ClipPreprocessing:
        config = read_json(path, kind=_KIND)
        size = config.get("crop_size") if config.get("do_center_crop", True) else None
        size = size or config.get("size", {})
        image_size = size if isinstance(size, int) else size.get("height", size.get("shortest_edge"))
        resample = config.get("resample", _BICUBIC)
        if not image_size or resample not in (_BILINEAR, _BICUBIC):
            raise ValueError(f"{path}: needs a size and resample 2 or 3, got {size} and {resample}")
        return cls(
            image_size=image_size,
            mean=tuple(config["image_mean"]),
            std=tuple(config["image_std"]),
            mode="bicubic" if resample == _BICUBIC else "bilinear",
        )

    def __call__(self, rgb: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 size size"]:
        height, width = rgb.shape[-2:]
        shorter = min(height, width)
        if shorter != self.image_size:
            size = (height * self.image_size // shorter, width * self.image_size // shorter)
            rgb = F.interpolate(rgb, size, mode=self.mode, antialias=True).clamp(0, 1)
        top, left = (rgb.shape[-2] - self.image_size) // 2, (rgb.shape[-1] - self.image_size) // 2
        rgb = rgb[..., top : top + self.image_size, left : left + self.image_size]
        return (rgb - rgb.new_tensor(self.mean)[:, None, None]) / rgb.new_tensor(self.std)[:, None, None]


class ClipPreferenceReward:
    """``exp(logit_scale) * cos(image, prompt)`` of a frozen CLIP model (Pick-a-Pic, arXiv 2305.01569, equation 2).

    Prompts are embedded once and remembered.
    """

    differentiable = True

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer, preprocessing: ClipPreprocessing) -> None:
        self._model = model.requires_grad_(False).eval()
        self._tokenizer = tokenizer
        self._preprocess = preprocessing
        self._text_features: dict[str, Tensor] = {}

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> ClipPreferenceReward:
        """Loads safetensors from a local folder; never from the network.

        Raises:
            ValueError: the folder, a file in it or its weights are missing, or it holds another kind of model.
        """
        root = Path(folder)
        check_folder(root, kind=_KIND)
        architectures = read_json(root / "config.json", kind=_KIND).get("architectures") or [None]
        if architectures[0] != "CLIPModel":
            raise ValueError(f"{root} holds a {architectures[0]}; a CLIP reward needs a CLIPModel")
        preprocessing = ClipPreprocessing.from_json(root / "preprocessor_config.json")
        read_json(root / "tokenizer_config.json", kind=_KIND)
        check_weights(root, "model.safetensors")
        load: Any = CLIPModel.from_pretrained
        model = load_model(
            lambda: load(root, use_safetensors=True, local_files_only=True, output_loading_info=True, dtype=dtype), root
        )
        tokenizer = CLIPTokenizer.from_pretrained(root, local_files_only=True)
        return cls(model.to(device), tokenizer, preprocessing)

    def __call__(self, rgb: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        pixels = self._preprocess(rgb).to(self._model.dtype)
        image = F.normalize(self._model.get_image_features(pixels).pooler_output.float(), dim=-1)
        text = torch.stack([self._embed(prompt) for prompt in prompts])
        scale: Tensor = self._model.logit_scale.float().exp()
        return scale * (image * text).sum(-1)

    @torch.no_grad()
    def _embed(self, prompt: str) -> Float[Tensor, " dim"]:
        if prompt not in self._text_features:
            positions = self._model.config.text_config.max_position_embeddings
            room = min(self._tokenizer.model_max_length, positions)
            tokens = self._tokenizer(
                prompt, padding="max_length", truncation=True, max_length=room, return_tensors="pt"
            ).to(self._model.device)
            features = self._model.get_text_features(tokens.input_ids, tokens.attention_mask).pooler_output
            self._text_features[prompt] = F.normalize(features.float(), dim=-1)[0]
        return self._text_features[prompt]
