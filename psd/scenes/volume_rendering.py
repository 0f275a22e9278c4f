"""Volume rendering: what a camera sees of a density and a colour in space (nerfacc's batched functions).

The scene fills a sphere a little larger than the unit sphere, so that the corners of a box that touches it are not cut.
Each ray is cut into equally long bins between entry and exit, so that no sample is spent on empty space in front or
behind. Colour only counts where most of a ray's light comes from.

Picking samples out needs their number, which on a GPU is a wait for it. So on a CPU only the samples that count are
asked for their colour, and on a GPU all are, the others with weight 0: the picture is the same. Of a hash grid they are
picked everywhere: to find what its occupancy grid leaves, by nerfacc's kernels or without them, was a wait already.

Shapes: v = views, n = rays, s = samples along a ray, p = points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import nerfacc
import torch
from jaxtyping import Bool, Float, Int
from nerfacc import OccGridEstimator
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from psd.cameras import Cameras
from psd.random import is_pinned
from psd.scenes.base import Field, Render
from psd.scenes.nerfacc_kernels import has_kernels
from psd.scenes.shading import Light

SCENE_RADIUS = 1.15
MIN_RELATIVE_WEIGHT = 0.05  # of the heaviest sample of the ray; lighter samples are not asked for a colour,
MIN_ABSOLUTE_WEIGHT = 2e-3  # nor are those below this, unless the ray has no heavier one
MAX_RAYS_AT_ONCE = 16384  # of larger pictures, no more rays' samples are in memory; the backward pass repeats them
NORMAL_SPACING = 0.02  # half the distance over which the density is compared: about a hundredth of the scene
NEGLIGIBLE_GRADIENT = 0.1  # of the density: normals are shorter than 1 where it is about this small


def render_field(
    field: Field,
    cameras: Cameras,
    background: Float[Tensor, "3"] | Float[Tensor, "v 3 h w"],
    *,
    num_samples: int,
    generator: torch.Generator | None = None,
    occupancy: OccGridEstimator | None = None,
    light: Light | None = None,
    normals: bool = False,
) -> Render:
    """The field on a background. Samples sit in the middle of their bins, or are jittered if a generator is given.

    All samples of a ray share one random offset within their bins: unbiased, and a fraction of the random numbers.
    With an occupancy grid, density is only asked for where the grid says that something is. On a GPU nerfacc's kernel,
    if it can be had, marches through it: in steps of the sphere's diameter over ``num_samples``, with the same offset.
    Light needs normals; without them ``Render.normals`` and ``Render.orientation`` are None.
    """
    views, height, width = len(cameras), cameras.height, cameras.width
    origins, directions = (rays.flatten(0, 2) for rays in cameras.rays())
    near, far = sphere_bounds(origins, directions)
    view = torch.arange(len(origins), device=origins.device) // (height * width)
    offsets = None
    if generator is not None:
        pinned = is_pinned(origins, generator)
        drawn = torch.rand(len(origins), generator=generator, device=generator.device, pin_memory=pinned)
        offsets = drawn.to(origins, non_blocking=True)

    def seen_along(some: slice) -> Float[Tensor, "n 5"] | Float[Tensor, "n 9"]:
        rays = _Rays(origins[some], directions[some], near[some], far[some], view[some])
        march = _march(field, rays, None if offsets is None else offsets[some], num_samples, occupancy)
        return _look(field, rays, march, light, normals or light is not None)

    parts = [slice(start, start + MAX_RAYS_AT_ONCE) for start in range(0, len(origins), MAX_RAYS_AT_ONCE)]
    if len(parts) > 1 and torch.is_grad_enabled():
        seen = torch.cat([checkpoint(seen_along, part, use_reentrant=False) for part in parts])
    else:
        seen = torch.cat([seen_along(part) for part in parts])
    channels = seen.unflatten(0, (views, height, width)).permute(0, 3, 1, 2)
    rgb, opacity, depth, *shape = channels.split([3, 1, 1, *([3, 1] if seen.shape[1] > 5 else [])], dim=1)
    empty = 1 - opacity
    if background.dim() == 1:
        background = background[:, None, None]
    return Render(
        rgb=rgb + empty * background,
        opacity=opacity,
        depth=depth + empty * far_plane(cameras)[:, None, None, None],
        normals=shape[0] if shape else None,
        orientation=shape[1] if shape else None,
    )


@dataclass(frozen=True, eq=False)
class _Rays:
    origins: Float[Tensor, "n 3"]
    directions: Float[Tensor, "n 3"]
    near: Float[Tensor, " n"]
    far: Float[Tensor, " n"]
    view: Int[Tensor, " n"]

    def points(self, ray: Int[Tensor, " s"], t: Float[Tensor, " s"]) -> Float[Tensor, "s 3"]:
        return self.origins[ray] + t[:, None] * self.directions[ray]


@dataclass(frozen=True, eq=False)
class _March:
    """What is met along the rays. The samples are those that are worth a colour, or all, the others with weight 0."""

    opacity: Float[Tensor, "n 1"]
    depth: Float[Tensor, "n 1"]  # premultiplied
    ray: Int[Tensor, " s"]
    t: Float[Tensor, " s"]
    weight: Float[Tensor, " s"]


def _march(
    field: Field,
    rays: _Rays,
    offsets: Float[Tensor, " n"] | None,
    num_samples: int,
    occupancy: OccGridEstimator | None,
) -> _March:
    if occupancy is not None and has_kernels(rays.near.device):
        return _march_by_kernel(field, rays, offsets, num_samples, occupancy)
    fractions = torch.linspace(0, 1, num_samples + 1, device=rays.near.device, dtype=rays.near.dtype)
    edges = rays.near[:, None] + (rays.far - rays.near)[:, None] * fractions
    t_starts, t_ends = edges[:, :-1], edges[:, 1:]
    t = t_starts + (0.5 if offsets is None else offsets[:, None]) * (t_ends - t_starts)
    points = (rays.origins[:, None] + t[..., None] * rays.directions[:, None]).flatten(0, 1)
    if occupancy is None:
        density = field.density(points)
    else:
        there = occupied(occupancy, points).nonzero()[:, 0]
        density = points.new_zeros(len(points)).index_copy(0, there, field.density(points[there]))
    weights, _, _ = nerfacc.render_weight_from_density(t_starts, t_ends, density.view_as(t))
    heaviest = weights.detach().amax(dim=-1, keepdim=True)
    counts = weights.detach() >= _least_weight(heaviest)
    opacity, depth = nerfacc.accumulate_along_rays(weights), nerfacc.accumulate_along_rays(weights, t[..., None])
    if occupancy is not None or picks_samples(weights.device):
        ray, sample = counts.nonzero(as_tuple=True)
        return _March(opacity, depth, ray=ray, t=t[ray, sample], weight=weights[ray, sample])
    ray = torch.arange(len(t), device=t.device)[:, None].expand_as(t)
    return _March(opacity, depth, ray=ray.flatten(), t=t.flatten(), weight=(weights * counts).flatten())


def _march_by_kernel(
    field: Field, rays: _Rays, offsets: Float[Tensor, " n"] | None, num_samples: int, occupancy: OccGridEstimator
) -> _March:
    """The same with nerfacc's CUDA kernels: as many samples a ray as there are occupied cells to cross.

    The kernel's own jitter is left off: it comes from CUDA's global generator, which ``checkpoint`` does not restore
    for the second march of a large picture, so that this one would meet other samples.
    """
    num_rays, step = len(rays.near), 2 * SCENE_RADIUS / num_samples
    ray, t_starts, t_ends = occupancy.sampling(
        rays.origins,
        rays.directions,
        t_min=rays.near if offsets is None else rays.near + step * offsets,
        t_max=rays.far,
        render_step_size=step,
    )
    t = (t_starts + t_ends) / 2
    density = field.density(rays.points(ray, t))
    weights, _, _ = nerfacc.render_weight_from_density(t_starts, t_ends, density, ray_indices=ray, n_rays=num_rays)
    heaviest = torch.zeros_like(rays.near).scatter_reduce(0, ray, weights.detach(), "amax")
    heavy = (weights.detach() >= _least_weight(heaviest)[ray]).nonzero()[:, 0]
    return _March(
        opacity=nerfacc.accumulate_along_rays(weights, None, ray, num_rays),
        depth=nerfacc.accumulate_along_rays(weights, t[:, None], ray, num_rays),
        ray=ray[heavy],
        t=t[heavy],
        weight=weights[heavy],
    )


def picks_samples(device: torch.device) -> bool:
    """Whether it is cheap to count something there, and so to leave out what does not count."""
    return device.type == "cpu"


def _least_weight(heaviest: Float[Tensor, "*rays"]) -> Float[Tensor, "*rays"]:
    """Below this a sample of a ray is not asked for its colour."""
    return torch.maximum(MIN_RELATIVE_WEIGHT * heaviest, heaviest.clamp(min=1e-12, max=MIN_ABSOLUTE_WEIGHT))


def _look(
    field: Field, rays: _Rays, march: _March, light: Light | None, with_normals: bool
) -> Float[Tensor, "n 5"] | Float[Tensor, "n 9"]:
    """Premultiplied colour, opacity, premultiplied distance and, if wanted, premultiplied normal and orientation.

    Samples too light to be asked for their colour count as having the mean colour of the rest of their ray, so that the
    gradient does not take them for black. On a surface this saves most of the work.
    """
    num_rays, ray, weight = len(rays.near), march.ray, march.weight
    points = rays.points(ray, march.t)
    color = field.color(points)
    share = march.opacity / nerfacc.accumulate_along_rays(weight, None, ray, num_rays).clamp(min=1e-12)
    if not with_normals:
        colored = nerfacc.accumulate_along_rays(weight, color, ray, num_rays)
        return torch.cat([colored * share, march.opacity, march.depth], dim=-1)
    normals = surface_normals(field, points)
    if light is not None:
        color = light.shade(color, points, normals, rays.view[ray])
    colored = nerfacc.accumulate_along_rays(weight, torch.cat([color, normals], dim=-1), ray, num_rays) * share
    facing_away = (normals * rays.directions[ray]).sum(-1, keepdim=True).clamp(min=0).square()
    orientation = nerfacc.accumulate_along_rays(weight.detach(), facing_away, ray, num_rays)
    return torch.cat([colored[:, :3], march.opacity, march.depth, colored[:, 3:], orientation], dim=-1)


def surface_normals(field: Field, points: Float[Tensor, "p 3"]) -> Float[Tensor, "p 3"]:
    """Unit vectors against the density's gradient, by central differences; shorter where there is next to no gradient.

    Differences need no second derivative of the field, and do not jump where an interpolated field has a crease.
    """
    axes = torch.eye(3, device=points.device, dtype=points.dtype)
    offsets = NORMAL_SPACING * torch.cat([axes, -axes])
    density = field.density((points[:, None] + offsets).flatten(0, 1)).view(-1, 2, 3)
    gradient = (density[:, 0] - density[:, 1]) / (2 * NORMAL_SPACING)
    return -gradient / (gradient.square().sum(-1, keepdim=True) + NEGLIGIBLE_GRADIENT**2).sqrt()


def occupied(occupancy: OccGridEstimator, points: Float[Tensor, "p 3"]) -> Bool[Tensor, " p"]:
    """Whether the cell of the scene's cube that a point lies in may hold something."""
    resolution = len(occupancy.binaries[0])
    cells = ((points / SCENE_RADIUS + 1) / 2 * resolution).long().clamp(0, resolution - 1)
    marked: Tensor = occupancy.binaries[0][cells[:, 0], cells[:, 1], cells[:, 2]]
    return marked


def sphere_bounds(
    origins: Float[Tensor, "n 3"], directions: Float[Tensor, "n 3"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Where rays with unit directions enter and leave the scene's sphere; equal for rays that miss it.

    Solves ``|o + t d|^2 = r^2``, so ``t = -b ± sqrt(b^2 - |o|^2 + r^2)`` with ``b = o·d``.
    """
    b = (origins * directions).sum(-1)
    half_chord = (b.square() - origins.square().sum(-1) + SCENE_RADIUS**2).clamp(min=0).sqrt()
    return (-b - half_chord).clamp(min=0), (-b + half_chord).clamp(min=0)


def far_plane(cameras: Cameras) -> Float[Tensor, " v"]:
    """The depth of empty pixels: the far side of the scene's sphere."""
    distance: Tensor = cameras.c2w[:, :3, 3].norm(dim=-1)
    return distance + SCENE_RADIUS


def lattice(resolution: int) -> Float[Tensor, "x y z 3"]:
    """The nodes of a regular grid over the cube around the scene, corners included; entry [i, j, k] is (x, y, z)."""
    ticks = torch.linspace(-SCENE_RADIUS, SCENE_RADIUS, resolution)
    return torch.stack(torch.meshgrid(ticks, ticks, ticks, indexing="ij"), dim=-1)


@torch.no_grad()
def density_on_lattice(field: Field, resolution: int) -> Float[Tensor, "x y z"]:
    """Density at the nodes of a regular grid; zero outside the sphere, where no ray ever looks."""
    nodes = lattice(resolution)
    inside = nodes.norm(dim=-1) <= SCENE_RADIUS
    points = nodes[inside].to(field.device)
    density = torch.zeros(nodes.shape[:-1])
    density[inside] = torch.cat([field.density(chunk) for chunk in points.split(2**18)]).cpu()
    return density


def solid_density(half_absorption_length: float = 0.1) -> float:
    """The density of which a layer this thick absorbs half of the light: what counts as solid, not fog."""
    return math.log(2) / half_absorption_length
