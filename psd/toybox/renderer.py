"""The world's exact renderer: signed distance functions, sphere tracing, Lambert shading under a fixed light.

Shapes: v = views, n = points or rays of a view.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from psd.cameras import Cameras
from psd.toybox.grammar import COLORS, SHAPES, Description, Solid

LIGHT = (0.45, 0.30, 0.84)
AMBIENT = 0.6
SUPERSAMPLING = 2
NUM_TRACING_STEPS = 28
HIT_DISTANCE = 0.004


@dataclass(frozen=True, kw_only=True)
class PlacedSolid:
    """A solid in the world: scaled about its own centre, then moved along z."""

    shape: str
    color: tuple[float, float, float]
    stripe: tuple[float, float, float] | None
    scale: float
    height: float


# Half the extent along z of each shape at scale 1: what stands on something rests on it.
HALF_HEIGHT = {"sphere": 0.70, "cube": 0.55, "cylinder": 0.66, "cone": 0.66, "torus": 0.24, "diamond": 0.86}
STACKED_TOP_SCALE, STACKED_BASE_SCALE = 0.62, 0.66
NUM_BANDS = 5  # stripes are horizontal bands, and quarters of a torus


def place(description: Description, scale: float = 1.0) -> tuple[PlacedSolid, ...]:
    """The solids of a description where the world puts them; ``scale`` is the whole scene's size."""
    if description.base is None:
        return (_placed(description.top, scale, 0.0),)
    base_scale, top_scale = STACKED_BASE_SCALE * scale, STACKED_TOP_SCALE * scale
    base_half = base_scale * HALF_HEIGHT[description.base.shape]
    top_half = top_scale * HALF_HEIGHT[description.top.shape]
    base_height, top_height = -top_half, base_half  # the pile is centred on the origin
    return (_placed(description.top, top_scale, top_height), _placed(description.base, base_scale, base_height))


def _placed(solid: Solid, scale: float, height: float) -> PlacedSolid:
    stripe = None if solid.stripe is None else COLORS[solid.stripe]
    return PlacedSolid(shape=solid.shape, color=COLORS[solid.color], stripe=stripe, scale=scale, height=height)


@dataclass(frozen=True, eq=False)
class WorldRender:
    rgb: Float[Tensor, "v 3 h w"]
    opacity: Float[Tensor, "v 1 h w"]


def signed_distance(shape: str, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Distance to a shape at scale 1 centred on the origin; exact, or a lower bound of the distance."""
    radius = torch.sqrt(x * x + y * y)
    match shape:
        case "sphere":
            return torch.sqrt(radius * radius + z * z) - 0.70
        case "cube":
            return _box(x.abs() - 0.55, y.abs() - 0.55, z.abs() - 0.55)
        case "cylinder":
            return _box(radius - 0.50, z.abs() - 0.66)
        case "cone":  # height 1.32, base radius 0.68
            side = (radius - 0.68 * (0.66 - z) / 1.32) * (1.32 / (1.32**2 + 0.68**2) ** 0.5)
            return torch.maximum(side, -0.66 - z)
        case "torus":
            return torch.sqrt((radius - 0.54) ** 2 + z * z) - 0.24
        case "diamond":
            return (x.abs() + y.abs() + z.abs() - 0.86) / 3**0.5
    raise ValueError(f'unknown shape "{shape}"; choose one of {", ".join(SHAPES)}')


def _box(*excess: Tensor) -> Tensor:
    outside = torch.sqrt(sum((e.clamp(min=0) ** 2 for e in excess), torch.zeros(())))
    return outside + reduce(torch.maximum, excess).clamp(max=0)


def render(scenes: Sequence[tuple[PlacedSolid, ...]], cameras: Cameras, levels: Float[Tensor, " v"]) -> WorldRender:
    """One scene a camera, on flat grey backgrounds of the given levels; anti-aliased by supersampling."""
    fine = cameras.at_resolution(cameras.height * SUPERSAMPLING, cameras.width * SUPERSAMPLING)
    origins, directions = (rays.flatten(1, 2).mT.contiguous() for rays in fine.rays())
    depth = (origins.norm(dim=1) - 1.1).clamp(min=0)
    for _ in range(NUM_TRACING_STEPS):
        distance, _ = _nearest(scenes, origins + depth[:, None] * directions)
        depth = depth + distance.clamp(max=0.5)
    points = origins + depth[:, None] * directions
    distance, owner = _nearest(scenes, points)
    hit = distance < HIT_DISTANCE
    light = normalize(torch.tensor(LIGHT), dim=0)
    diffuse = torch.einsum("vcn,c->vn", _normals(scenes, points), light).clamp(min=0)
    surface = _albedo(scenes, points, owner) * (AMBIENT + (1 - AMBIENT) * diffuse)[:, None]
    rgb = torch.where(hit[:, None], surface, levels[:, None, None]).clamp(0, 1)
    images = torch.cat([rgb, hit[:, None].float()], 1).unflatten(2, (fine.height, fine.width))
    images = torch.nn.functional.avg_pool2d(images, SUPERSAMPLING)
    return WorldRender(rgb=images[:, :3], opacity=images[:, 3:])


def _nearest(scenes: Sequence[tuple[PlacedSolid, ...]], points: Float[Tensor, "v 3 n"]) -> tuple[Tensor, Tensor]:
    """Distance to the nearest solid of each view's scene, and its index; both [v, n]. Equal scenes go at once."""
    distances = torch.empty_like(points[:, 0])
    owners = torch.zeros_like(distances, dtype=torch.uint8)
    for scene, views in _runs(scenes):
        x, y, z = points[views].unbind(1)
        for index, solid in enumerate(scene):
            s = solid.scale
            distance = signed_distance(solid.shape, x / s, y / s, (z - solid.height) / s) * s
            if index == 0:
                distances[views] = distance
            else:
                owners[views] = torch.where(distance < distances[views], index, owners[views])
                distances[views] = torch.minimum(distances[views], distance)
    return distances, owners


def _runs(scenes: Sequence[tuple[PlacedSolid, ...]]) -> Iterator[tuple[tuple[PlacedSolid, ...], slice]]:
    start = 0
    for scene, group in itertools.groupby(scenes):
        stop = start + len(list(group))
        yield scene, slice(start, stop)
        start = stop


def _normals(scenes: Sequence[tuple[PlacedSolid, ...]], points: Float[Tensor, "v 3 n"]) -> Float[Tensor, "v 3 n"]:
    """The distance's gradient by differences on a tetrahedron."""
    gradient = torch.zeros_like(points)
    for corner in torch.tensor([[1.0, -1, -1], [-1, -1, 1], [-1, 1, -1], [1, 1, 1]]):
        gradient += corner[:, None] * _nearest(scenes, points + 1e-3 * corner[:, None])[0][:, None]
    return normalize(gradient, dim=1)


def _albedo(
    scenes: Sequence[tuple[PlacedSolid, ...]], points: Float[Tensor, "v 3 n"], owners: Tensor
) -> Float[Tensor, "v 3 n"]:
    albedo = torch.zeros_like(points)
    for scene, views in _runs(scenes):
        for index, solid in enumerate(scene):
            color = torch.tensor(solid.color)[:, None]
            if solid.stripe is not None:
                second = _in_second_stripe(solid, points[views])
                color = torch.where(second[:, None], torch.tensor(solid.stripe)[:, None], color)
            albedo[views] = torch.where((owners[views] == index)[:, None], color, albedo[views])
    return albedo


def _in_second_stripe(solid: PlacedSolid, points: Float[Tensor, "v 3 n"]) -> Tensor:
    if solid.shape == "torus":
        return (points[:, 0] * points[:, 1]) < 0
    half = HALF_HEIGHT[solid.shape] * solid.scale
    return ((points[:, 2] - solid.height + half) / (2 * half) * NUM_BANDS).floor() % 2 == 1
