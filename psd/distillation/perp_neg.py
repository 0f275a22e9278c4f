"""Perp-Neg: guidance away from other views' prompts that does not pull against the prompt itself.

Shapes: n = unwanted texts, k = noise candidates, b = views, c h w = latents.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def push_away(
    positive: Float[Tensor, "k b c h w"],
    negative: Float[Tensor, "k b c h w"],
    unwanted: Float[Tensor, "n k b c h w"],
    weights: Float[Tensor, "n b"],
) -> Float[Tensor, "k b c h w"]:
    """What to use as the prediction with the prompt: guidance by it is then Perp-Neg's (arXiv 2304.04968).

    From each unwanted direction ``unwanted - negative`` the part along ``positive - negative`` is taken out; what is
    left is subtracted, ``weights`` times.
    """
    wanted = positive - negative
    directions = unwanted - negative
    dims = (-3, -2, -1)
    along = (directions * wanted).sum(dims, keepdim=True) / wanted.square().sum(dims, keepdim=True).clamp(min=1e-12)
    perpendicular = directions - along * wanted
    return positive - (weights[:, None, :, None, None, None] * perpendicular).sum(0)
