"""Prompts: from the words that describe an asset to the text embeddings that its views are denoised with."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from psd.cameras import Cameras
from psd.priors.base import Prior


@dataclass(frozen=True, eq=False)
class PromptEmbeddings:
    """One asset's prompt, embedded once for each view. ``prompt`` is bare: no view, no background."""

    prompt: str
    positive: Float[Tensor, "v tokens dim"]
    negative: Float[Tensor, "v tokens dim"]
    null: Float[Tensor, "v tokens dim"]  # no prompt at all; ``negative`` itself where that is empty


class PromptEncoder:
    """Embeds prompts for given views and a given background phrase; each text is embedded once.

    The phrase goes into every prompt, so that guidance does not push against the background.
    """

    def __init__(self, prior: Prior, *, negative_prompt: str = "", view_dependent: bool = False) -> None:
        self._prior = prior
        self._negative_prompt = negative_prompt
        self._view_dependent = view_dependent
        self._embedded: dict[str, Tensor] = {}

    def __call__(self, prompt: str, cameras: Cameras, phrase: str = "") -> PromptEmbeddings:
        directions = view_directions(cameras) if self._view_dependent else [""] * len(cameras)
        texts = [_join(prompt, direction, phrase) for direction in directions]
        unwanted = _join(self._negative_prompt, phrase)
        self._embed({*texts, unwanted, phrase})
        negative = self._stack([unwanted] * len(cameras))
        null = negative if unwanted == phrase else self._stack([phrase] * len(cameras))
        return PromptEmbeddings(prompt, positive=self._stack(texts), negative=negative, null=null)

    def _embed(self, texts: set[str]) -> None:
        new = sorted(texts - self._embedded.keys())
        if not new:
            return
        for text in new:
            if overflow := self._prior.overflow(text):
                warnings.warn(f"the prior's text encoder does not see the end of {text!r}: {overflow!r}", stacklevel=4)
        with torch.no_grad():
            self._embedded.update(zip(new, self._prior.embed(new), strict=True))

    def _stack(self, texts: Sequence[str]) -> Tensor:
        return torch.stack([self._embedded[text] for text in texts])


def view_directions(cameras: Cameras) -> list[str]:
    """The phrase that names each camera's side, with threestudio's thresholds: 45 degrees around front and back, and
    above 60 degrees of elevation."""
    return [
        _direction(azimuth, elevation)
        for azimuth, elevation in zip(cameras.azimuth_deg.tolist(), cameras.elevation_deg.tolist(), strict=True)
    ]


def _direction(azimuth_deg: float, elevation_deg: float) -> str:
    if elevation_deg > 60:
        return "overhead view"
    from_front = min(azimuth_deg, 360 - azimuth_deg)
    if from_front < 45:
        return "front view"
    return "back view" if from_front > 135 else "side view"


def _join(*parts: str) -> str:
    return ", ".join(part for part in parts if part)
