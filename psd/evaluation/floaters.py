"""Artefacts of a density: pieces that float beside the object, and fog."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from scipy import ndimage
from torch import Tensor

from psd.scenes.base import Field
from psd.scenes.volume_rendering import SCENE_RADIUS, density_on_lattice, solid_density

VISIBLE_OPACITY = 0.05


def floater_share(field: Field, *, resolution: int = 48) -> float:
    """The share of the solid mass that does not belong to the largest connected piece; 1 if nothing is solid.

    A cell of the lattice is solid above ``solid_density()``, weighs as much as it absorbs of a ray through it, and
    touches its 26 neighbours.
    """
    density = density_on_lattice(field, resolution)
    cell = 2 * SCENE_RADIUS / (resolution - 1)
    mass = (1 - torch.exp(-density * cell)).numpy()
    pieces, num_pieces = ndimage.label(density.numpy() > solid_density(), structure=np.ones((3, 3, 3)))
    if num_pieces == 0:
        return 1.0
    masses = ndimage.sum_labels(mass, pieces, index=np.arange(1, num_pieces + 1))
    return float(1 - masses.max() / masses.sum())


def fog(opacity: Float[Tensor, "v 1 h w"]) -> float:
    """How translucent the visible pixels are: the mean of 4 o (1 - o), 0 for a clear-cut object; 1 if none is visible.

    Pixels on a silhouette are half covered and count, so a perfect object scores a little above 0 at low resolution.
    """
    visible = opacity[opacity > VISIBLE_OPACITY]
    if not len(visible):
        return 1.0
    return float((4 * visible * (1 - visible)).mean())
