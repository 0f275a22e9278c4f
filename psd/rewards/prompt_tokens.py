"""Prompts as a reward's text encoder reads them, with a word about those that it has no room for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import BertTokenizer, CLIPTokenizer

Tokenizer: TypeAlias = CLIPTokenizer | BertTokenizer


class PromptTokens:
    """Token ids and their mask, padded to the longest prompt of a batch.

    The mask is None where nothing is padded: transformers would look into one, and on a GPU wait for it. A prompt that
    is too long loses its end, and is warned about once. Tokens stay on the device.
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._max_tokens = min(max_tokens, int(tokenizer.model_max_length))
        self._known: dict[tuple[str, ...], tuple[Tensor, Tensor | None]] = {}
        self._warned: set[str] = set()

    def __call__(
        self, prompts: Sequence[str], device: torch.device
    ) -> tuple[Int[Tensor, "b tokens"], Int[Tensor, "b tokens"] | None]:
        key = (str(device), *prompts)
        if key not in self._known:
            self._warn(set(prompts))
            tokens = self._tokenizer(
                list(prompts), padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt"
            )
            mask = None if tokens.attention_mask.all() else tokens.attention_mask.to(device, non_blocking=True)
            self._known[key] = tokens.input_ids.to(device, non_blocking=True), mask
        return self._known[key]

    def overflow(self, prompt: str) -> str:
        """The end of a prompt that the text encoder has no room for; empty where all of it fits."""
        room = self._max_tokens - self._tokenizer.num_special_tokens_to_add()
        words = self._tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        return str(self._tokenizer.decode(words[room:])) if len(words) > room else ""

    def _warn(self, prompts: set[str]) -> None:
        for prompt in sorted(prompts - self._warned):
            if overflow := self.overflow(prompt):
                self._warned.add(prompt)
                warnings.warn(
                    f"the reward's text encoder does not see the end of {prompt!r}: {overflow!r}", stacklevel=5
                )
