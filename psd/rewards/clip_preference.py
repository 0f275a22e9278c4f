"""Rewards in CLIP's form: the cosine of an image's and its prompt's embeddings (PickScore, HPSv2.1, CLIP score)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from psd.checkpoint_files import check_weights, file_of_tensor, load_model
from psd.rewards.base import check_groups
from psd.rewards.preprocessing import Preprocessing
from psd.rewards.prompt_tokens import PromptTokens
from psd.rewards.reward_folder import check_processor_folder, check_reward_folder

Model = TypeVar("Model", bound=nn.Module)


class ClipPreferenceReward:
    """``exp(logit_scale) * cos(image, prompt)`` of a frozen CLIP model (Pick-a-Pic, arXiv 2305.01569, equation 2).

    With ``scaled=False`` the cosine alone, as HPSv2 (arXiv 2306.09341) and CLIP score are reported. Prompts are
    embedded once and remembered.
    """

    differentiable = True
    group_size = 1

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: CLIPTokenizer,
        preprocessing: Preprocessing,
        *,
        scaled: bool = True,
        logit_scale: Float[Tensor, ""] | None = None,  # in place of the model's, which may be rounded
    ) -> None:
        self._model = model.requires_grad_(False).eval()
        self._tokens = PromptTokens(tokenizer, model.config.text_config.max_position_embeddings)
        self._preprocess = preprocessing
        exponent = model.logit_scale if logit_scale is None else logit_scale
        self._scale = exponent.detach().float().exp() if scaled else None
        self._text_features: dict[str, Tensor] = {}

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        processor: str | os.PathLike[str] | None = None,
        scaled: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> ClipPreferenceReward:
        """Loads safetensors from a local folder; never from the network. ``processor`` is a folder with the tokenizer
        and the preprocessing, where the model's own has none (PickScore's).

        Raises:
            ValueError: the folder, a file in it or its weights are missing or damaged, or it holds another kind of
                model.
        """
        root, words = Path(folder), Path(processor or folder)
        check_reward_folder(root, "CLIPModel", has_processor=words == root)
        check_processor_folder(words)
        model = load_transformers(CLIPModel, root, dtype)
        preprocessing = Preprocessing.from_json(words / "preprocessor_config.json")
        tokenizer = CLIPTokenizer.from_pretrained(words, local_files_only=True)
        if len(tokenizer) > (known := model.config.text_config.vocab_size):
            raise ValueError(f"the tokenizer in {words} has {len(tokenizer)} tokens, the model in {root} only {known}")
        with safe_open(file_of_tensor(root, "model.safetensors", "logit_scale"), framework="pt") as weights:
            exact = weights.get_tensor("logit_scale").to(device)  # bfloat16 would make 98.9 of exp's usual 100
        return cls(model.to(device), tokenizer, preprocessing, scaled=scaled, logit_scale=exact)

    def __call__(self, rgb: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        check_groups(self, len(rgb), len(prompts))
        pixels = self._preprocess(rgb).to(self._model.dtype)
        image = F.normalize(self._model.get_image_features(pixels).pooler_output.float(), dim=-1)
        text = torch.stack([self._embed(prompt) for prompt in prompts])
        cosine: Tensor = (image * text).sum(-1)
        return cosine if self._scale is None else cosine * self._scale

    @torch.no_grad()
    def _embed(self, prompt: str) -> Float[Tensor, " dim"]:
        if prompt not in self._text_features:
            ids, mask = self._tokens([prompt], self._model.device)
            features = self._model.get_text_features(ids, mask).pooler_output
            self._text_features[prompt] = F.normalize(features.float(), dim=-1)[0]
        return self._text_features[prompt]


def load_transformers(model_class: type[Model], root: Path, dtype: torch.dtype) -> Model:
    """A model of transformers from a local folder with safetensors, all of its parameters filled.

    Raises:
        ValueError: weights are missing, damaged, or another model's.
    """
    variant = check_weights(root, "model.safetensors")
    load: Any = model_class.from_pretrained  # type: ignore[attr-defined]
    options = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    model: Model = load_model(lambda: load(root, variant=variant, dtype=dtype, **options), root)
    return model
