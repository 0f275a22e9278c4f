"""What goes wrong with a picture: graded degradations of rendered views, from almost nothing (0) to severe (1)."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Image = Float[Tensor, "3 h w"]
Silhouette = Float[Tensor, "1 h w"]


def blurred(rgb: Image, opacity: Silhouette, severity: float, rng: random.Random) -> Image:
    size = 2 + round(severity * 8)
    small = F.interpolate(rgb[None], (rgb.shape[1] * 2 // (size + 1), rgb.shape[2] * 2 // (size + 1)), mode="area")
    soft = F.interpolate(small, rgb.shape[1:], mode="bicubic", antialias=True)[0]
    return soft.clamp(0, 1)


def dull(rgb: Image, opacity: Silhouette, severity: float, rng: random.Random) -> Image:
    """Colours fade towards a grey of the object's own brightness, or towards dark."""
    grey = rgb.mean(0, keepdim=True) * rng.uniform(0.6, 1.2)
    return (rgb + opacity * severity * 0.9 * (grey - rgb)).clamp(0, 1)


def noisy(rgb: Image, opacity: Silhouette, severity: float, rng: random.Random) -> Image:
    """Blotches of a few pixels, as an unconverged scene shows them."""
    scale = rng.choice((1, 2, 4))
    noise = torch.randn(1, 3, rgb.shape[1] // scale, rgb.shape[2] // scale, generator=_generator(rng))
    blotches = F.interpolate(noise, rgb.shape[1:], mode="bilinear", align_corners=False)[0]
    return (rgb + 0.35 * severity * blotches).clamp(0, 1)


def floaters(rgb: Image, opacity: Silhouette, severity: float, rng: random.Random) -> Image:
    """Soft blobs beside the object."""
    out = rgb.clone()
    for _ in range(1 + round(5 * severity)):
        color = torch.tensor([rng.random() for _ in range(3)])[:, None, None]
        blob = _blob(rgb, rng.uniform(-0.9, 0.9), rng.uniform(-0.9, 0.9), rng.uniform(0.05, 0.16))
        blob = blob * (1 - opacity) * min(1.0, 0.3 + severity)
        out = out + blob * (color - out)
    return out


def foggy(rgb: Image, opacity: Silhouette, severity: float, rng: random.Random) -> Image:
    """A haze around the object, in its colour or in some grey."""
    inside = (rgb * opacity).sum((1, 2)) / opacity.sum().clamp(min=1)
    color = (inside if rng.random() < 0.5 else torch.full((3,), rng.random()))[:, None, None]
    haze = _blob(rgb, rng.uniform(-0.3, 0.3), rng.uniform(-0.3, 0.3), rng.uniform(0.4, 1.0)) * 0.7 * severity
    return rgb + haze * (color - rgb)


def hollow(rgb: Image, opacity: Silhouette, severity: float, rng: random.Random) -> Image:
    """Half-transparent patches through which the background shows."""
    outside = (rgb * (1 - opacity)).sum((1, 2)) / (1 - opacity).sum().clamp(min=1)
    hole = _blob(rgb, rng.uniform(-0.5, 0.5), rng.uniform(-0.5, 0.5), rng.uniform(0.15, 0.5))
    return rgb + (0.2 + 0.8 * severity) * hole * opacity * (outside[:, None, None] - rgb)


def misshapen(rgb: Image, opacity: Silhouette, severity: float, rng: random.Random) -> Image:
    """A smooth warp of the picture."""
    offsets = torch.randn(1, 2, 4, 4, generator=_generator(rng)) * 0.14 * severity
    flow = F.interpolate(offsets, rgb.shape[1:], mode="bicubic", align_corners=True).movedim(1, -1)
    grid = F.affine_grid(torch.eye(2, 3)[None], [1, 3, *rgb.shape[1:]], align_corners=False) + flow
    return F.grid_sample(rgb[None], grid, padding_mode="border", align_corners=False)[0]


DEGRADATIONS: tuple[Callable[[Image, Silhouette, float, random.Random], Image], ...] = (
    blurred,
    dull,
    noisy,
    floaters,
    foggy,
    hollow,
    misshapen,
)


def degrade(rgb: Image, opacity: Silhouette, severity: float, rng: random.Random) -> Image:
    """One degradation at random, or two half as strong."""
    if rng.random() < 0.3:
        first, second = rng.sample(DEGRADATIONS, 2)
        return second(first(rgb, opacity, severity / 2, rng), opacity, severity / 2, rng)
    return rng.choice(DEGRADATIONS)(rgb, opacity, severity, rng)


def _generator(rng: random.Random) -> torch.Generator:
    return torch.Generator().manual_seed(rng.getrandbits(62))


def _blob(rgb: Image, x: float, y: float, radius: float) -> Float[Tensor, "1 h w"]:
    rows = torch.linspace(-1, 1, rgb.shape[1])[:, None]
    columns = torch.linspace(-1, 1, rgb.shape[2])[None]
    return torch.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * radius**2))[None]
