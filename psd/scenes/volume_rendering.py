"""Volume rendering: what a camera sees of a density and a colour in space (nerfacc's batched functions).

The scene fills a sphere a little larger than the unit sphere, so that the corners of a box that touches it are not cut.
Each ray that meets it is cut into equally long bins between entry and exit, so that no sample is spent on empty space
in front or behind. Colour is only asked for where most of a ray's light comes from.

Shapes: v = views, n = rays, s = samples along a ray, p = points.
"""

from __future__ import annotations

import math

import nerfacc
import torch
from jaxtyping import Float
from torch import Tensor

from psd.cameras import Cameras
from psd.scenes.base import Field, Render

SCENE_RADIUS = 1.15
MIN_RELATIVE_WEIGHT = 0.05  # of the heaviest sample of the ray; lighter samples are not asked for a colour,
MIN_ABSOLUTE_WEIGHT = 2e-3  # nor are those below this, unless the ray has no heavier one
MAX_RAYS_AT_ONCE = 16384  # bounds memory for large pictures


def render_field(
    field: Field,
    cameras: Cameras,
    background: Float[Tensor, "3"] | Float[Tensor, "v 3 h w"],
    *,
    num_samples: int,
    generator: torch.Generator | None = None,
) -> Render:
    """The field on a background. Samples sit in the middle of their bins, or are jittered if a generator is given.

    All samples of a ray share one random offset within their bins: unbiased, and a fraction of the random numbers.
    """
    views, height, width = len(cameras), cameras.height, cameras.width
    origins, directions = (rays.flatten(0, 2) for rays in cameras.rays())
    if generator is None:
        offsets = torch.full_like(origins[:, 0], 0.5)
    else:
        offsets = torch.rand(len(origins), generator=generator, device=generator.device).to(origins)
    near, far = sphere_bounds(origins, directions)
    hit = (far > near).nonzero()[:, 0]
    marched = [
        _march(field, origins[rays], directions[rays], near[rays], far[rays], offsets[rays], num_samples)
        for rays in hit.split(MAX_RAYS_AT_ONCE)
    ]
    channels = origins.new_zeros(len(origins), 5).index_copy(0, hit, torch.cat(marched))
    channels = channels.unflatten(0, (views, height, width)).permute(0, 3, 1, 2)
    rgb, opacity, depth = channels.split([3, 1, 1], dim=1)
    empty = 1 - opacity
    if background.dim() == 1:
        background = background[:, None, None]
    return Render(
        rgb=rgb + empty * background,
        opacity=opacity,
        depth=depth + empty * far_plane(cameras)[:, None, None, None],
    )


def _march(
    field: Field,
    origins: Float[Tensor, "n 3"],
    directions: Float[Tensor, "n 3"],
    near: Float[Tensor, " n"],
    far: Float[Tensor, " n"],
    offsets: Float[Tensor, " n"],
    num_samples: int,
) -> Float[Tensor, "n 5"]:
    """Premultiplied colour, opacity and premultiplied distance of each ray.

    Samples too light to be asked for their colour count as having the mean colour of the rest of their ray, so that the
    gradient does not take them for black. On a surface this saves most of the work.
    """
    fractions = torch.linspace(0, 1, num_samples + 1, device=near.device, dtype=near.dtype)
    edges = near[:, None] + (far - near)[:, None] * fractions
    t_starts, t_ends = edges[:, :-1], edges[:, 1:]
    t = t_starts + offsets[:, None] * (t_ends - t_starts)
    points = origins[:, None] + t[..., None] * directions[:, None]
    density = field.density(points.flatten(0, 1)).view_as(t)
    weights, _, _ = nerfacc.render_weight_from_density(t_starts, t_ends, density)
    opacity = nerfacc.accumulate_along_rays(weights)
    depth = nerfacc.accumulate_along_rays(weights, t[..., None])
    heaviest = weights.detach().amax(dim=-1, keepdim=True)
    threshold = torch.maximum(MIN_RELATIVE_WEIGHT * heaviest, heaviest.clamp(min=1e-12, max=MIN_ABSOLUTE_WEIGHT))
    rays, samples = (weights.detach() >= threshold).nonzero(as_tuple=True)
    heavy = weights[rays, samples]
    colored = nerfacc.accumulate_along_rays(heavy, field.color(points[rays, samples]), rays, len(near))
    mass = nerfacc.accumulate_along_rays(heavy, None, rays, len(near))
    return torch.cat([colored * opacity / mass.clamp(min=1e-12), opacity, depth], dim=-1)


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
