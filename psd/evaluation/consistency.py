"""Do the views agree? The colour seen from one view is carried to the next by its depth and compared there."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from psd.cameras import Cameras
from psd.scenes.base import Render
from psd.scenes.volume_rendering import far_plane

SURFACE_OPACITY = 0.5  # pixels below this show no surface; those beside a silhouette are left out of the comparison
DEPTH_TOLERANCE = 0.1  # a twentieth of the unit sphere's diameter
COLOR_TOLERANCE = 0.25  # mean difference over the channels at which agreement has fallen to 0


def agreement(render: Render, cameras: Cameras) -> float:
    """How well each view predicts its two neighbours in azimuth, in [0, 1]; 0 if no surface is seen at all.

    Every pixel that shows a surface becomes a point in space, which is looked up in the neighbouring view:
    hidden there behind a nearer surface, it does not count; seen there, it scores ``1 - difference / 0.25`` in colour,
    at least 0; clearly in front of what is seen there, it contradicts that view and scores 0.
    A sharp object with the same colour from everywhere scores 1 up to the resolution of the images.
    """
    origins, directions = cameras.rays()
    depth = surface_depth(render, cameras)
    points = origins + depth[..., None] * directions
    solid = (render.opacity[:, 0] > SURFACE_OPACITY).to(depth)
    inner, outer = -F.max_pool2d(-solid, 3, stride=1, padding=1), F.max_pool2d(solid, 3, stride=1, padding=1)
    order = cameras.azimuth_deg.argsort().tolist()
    scores = []
    for source, target in zip(order, order[1:] + order[:1], strict=True):
        for here, there in ((source, target), (target, source)):
            surface = inner[here] == 1
            color = render.rgb[here].permute(1, 2, 0)[surface]
            layers = torch.cat([render.rgb[there], torch.stack([depth[there], inner[there], outer[there]])])
            scores.append(_scores(points[here][surface], color, layers, cameras[there : there + 1]))
    counted = torch.cat(scores)
    return float(counted.mean()) if len(counted) else 0.0


def surface_depth(render: Render, cameras: Cameras) -> Float[Tensor, "v h w"]:
    """The expected distance of what is seen, without the share of the far plane that shines through."""
    far = far_plane(cameras)[:, None, None, None]
    return ((render.depth - (1 - render.opacity) * far) / render.opacity.clamp(min=1e-6))[:, 0]


def _scores(
    points: Float[Tensor, "p 3"], color: Float[Tensor, "p 3"], layers: Float[Tensor, "6 h w"], camera: Cameras
) -> Float[Tensor, " counted"]:
    """The scores of the points that are not hidden from the camera, whose image, depth and silhouette
    (one pixel smaller, one pixel larger) are the layers."""
    pixels, distance = _project(points, camera)
    seen = F.grid_sample(layers[None], pixels[None, None], padding_mode="border", align_corners=False)[0, :, 0].T
    seen_color, seen_depth, inner, outer = seen[:, :3], seen[:, 3], seen[:, 4], seen[:, 5]
    on_surface, in_the_void = inner > 1 - 1e-4, outer < 1e-4
    hidden = on_surface & (distance > seen_depth + DEPTH_TOLERANCE)
    contradicts = in_the_void | (distance < seen_depth - DEPTH_TOLERANCE)
    difference = (seen_color - color).abs().mean(dim=-1)
    score = (1 - difference / COLOR_TOLERANCE).clamp(min=0).masked_fill(contradicts, 0)
    in_picture = (pixels.abs() <= 1).all(dim=-1)
    return score[in_picture & ((on_surface & ~hidden) | in_the_void)]


def _project(points: Float[Tensor, "p 3"], camera: Cameras) -> tuple[Float[Tensor, "p 2"], Float[Tensor, " p"]]:
    """Image positions in [-1, 1] (x right, y down) and distances from the camera."""
    relative = points - camera.c2w[0, :3, 3]
    x, y, z = (relative @ camera.c2w[0, :3, :3]).unbind(dim=-1)
    half_height = torch.tan(torch.deg2rad(camera.fov_deg[0]) / 2) * -z
    half_width = half_height * camera.width / camera.height
    return torch.stack([x / half_width, -y / half_height], dim=-1), relative.norm(dim=-1)
