"""Prompts: from the words that describe an asset to the text embeddings that its views are denoised with."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from psd.cameras import Cameras
from psd.priors.base import Prior

_SIDES = ("front view", "side view", "back view", "overhead view")


@dataclass(frozen=True, eq=False)
class UnwantedTexts:
    """What a view should not look like: the prompts of other views, and how much each matters for this one."""

    texts: Float[Tensor, "n v tokens dim"]
    weights: Float[Tensor, "n v"]


@dataclass(frozen=True, eq=False)
class PromptEmbeddings:
    """One asset's prompt, embedded once for each view. ``prompt`` is bare: no view, no background."""

    prompt: str
    positive: Float[Tensor, "v tokens dim"]
    negative: Float[Tensor, "v tokens dim"]
    null: Float[Tensor, "v tokens dim"]  # no prompt at all; ``negative`` itself where that is empty
    unwanted: UnwantedTexts | None = None  # Perp-Neg's


class PromptEncoder:
    """Embeds prompts for given views and a given background phrase; each text is embedded once.

    The phrase goes into every prompt, so that guidance does not push against the background. ``view_dependent`` adds
    the side that a camera sees. ``perp_neg`` goes from one side's prompt to the next without a jump, and away from
    those of the other sides (Perp-Neg, arXiv 2304.04968, with threestudio's weights).

    Give it cameras on the CPU: it reads their angles.
    """

    def __init__(
        self, prior: Prior, *, negative_prompt: str = "", view_dependent: bool = False, perp_neg: bool = False
    ) -> None:
        if perp_neg and not view_dependent:
            raise ValueError("perp_neg needs view_dependent: it is about the prompts of different views")
        self._prior = prior
        self._negative_prompt = negative_prompt
        self._view_dependent = view_dependent
        self._perp_neg = perp_neg
        self._embedded: dict[str, Tensor] = {}

    def __call__(self, prompt: str, cameras: Cameras, phrase: str = "") -> PromptEmbeddings:
        against = _join(self._negative_prompt, phrase)
        self._embed({against, phrase})
        negative = self._stack([against] * len(cameras))
        null = negative if against == phrase else self._stack([phrase] * len(cameras))
        if self._perp_neg:
            positive, unwanted = self._between_sides(prompt, cameras, phrase)
            return PromptEmbeddings(prompt, positive=positive, negative=negative, null=null, unwanted=unwanted)
        directions = view_directions(cameras) if self._view_dependent else [""] * len(cameras)
        texts = [_join(prompt, direction, phrase) for direction in directions]
        self._embed(set(texts))
        return PromptEmbeddings(prompt, positive=self._stack(texts), negative=negative, null=null)

    def _between_sides(
        self, prompt: str, cameras: Cameras, phrase: str
    ) -> tuple[Float[Tensor, "v tokens dim"], UnwantedTexts]:
        texts = [_join(prompt, side, phrase) for side in _SIDES]
        self._embed(set(texts))
        sides = self._stack(texts)
        angles = zip(cameras.azimuth_deg.tolist(), cameras.elevation_deg.tolist(), strict=True)
        shares, weights = zip(*(perp_neg_weights(azimuth, elevation) for azimuth, elevation in angles), strict=True)
        mix = torch.tensor(shares, dtype=sides.dtype).to(sides.device, non_blocking=True)
        positive = torch.einsum("vs,std->vtd", mix, sides)
        unwanted = sides[:2, None].expand(-1, len(cameras), -1, -1)  # front and side
        pushes = torch.tensor(weights, dtype=sides.dtype).T.to(sides.device, non_blocking=True)
        return positive, UnwantedTexts(unwanted, pushes)

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


def perp_neg_weights(
    azimuth_deg: float, elevation_deg: float
) -> tuple[tuple[float, float, float, float], tuple[float, float]]:
    """A camera's shares of the front, side, back and overhead prompt, and how much front and side are unwanted.

    Between front and side, and between side and back, the share is linear in the azimuth, and a weight falls with it as
    ``a exp(-share / 2) + c``. That the front's is nearly 2 at the back is what works against a second face.
    """
    if elevation_deg > 60:
        return (0.0, 0.0, 0.0, 1.0), (0.0, 0.0)
    turns = min(azimuth_deg, 360 - azimuth_deg) / 90  # quarter turns from the front, 0 to 2
    if turns < 1:
        front = 1 - turns
        return (front, 1 - front, 0.0, 0.0), (_falling(front, 4, -2.426), _falling(1 - front, 4, -2.426))
    side = 2 - turns
    return (0.0, side, 1 - side, 0.0), (_falling(side, 1, 0.967), _falling(side, 1, -0.606))


def _falling(share: float, a: float, c: float) -> float:
    return a * math.exp(-share / 2) + c


def _direction(azimuth_deg: float, elevation_deg: float) -> str:
    if elevation_deg > 60:
        return "overhead view"
    from_front = min(azimuth_deg, 360 - azimuth_deg)
    if from_front < 45:
        return "front view"
    return "back view" if from_front > 135 else "side view"


def _join(*parts: str) -> str:
    return ", ".join(part for part in parts if part)
