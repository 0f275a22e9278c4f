"""What leaves the program: meshes, turntables and contact sheets of a finished scene."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import torch
import trimesh
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from skimage.measure import marching_cubes
from torch import Tensor

from psd.scenes.base import Field
from psd.scenes.volume_rendering import SCENE_RADIUS, density_on_lattice

MESH_SUFFIXES = (".glb", ".ply", ".obj")
VIDEO_SUFFIXES = (".mp4", ".gif")
CAPTION_HEIGHT = 16
GAP = 2


def field_to_mesh(field: Field, *, resolution: int = 96, level: float | None = None) -> trimesh.Trimesh:
    """The surface where the density reaches ``level``, with the field's colours at its vertices; z is up.

    Without a level it is that of ``automatic_level``.

    Raises:
        ValueError: nothing is dense enough to be seen.
    """
    density = density_on_lattice(field, resolution)
    highest = float(density.max())
    if level is None:
        level = automatic_level(density)
    elif not 0 < level < highest:
        raise ValueError(f"level must lie between 0 and the highest density {highest:.3g}, got {level:.3g}")
    closed = np.pad(density.numpy(), 1)  # a surface that touches the border is closed there
    vertices, faces, _, _ = marching_cubes(closed, level=level, gradient_direction="ascent")  # faces look outwards
    vertices = (vertices - 1) * (2 * SCENE_RADIUS / (resolution - 1)) - SCENE_RADIUS
    with torch.no_grad():
        color = field.color(torch.as_tensor(vertices, dtype=torch.float32, device=field.device)).cpu()
    return trimesh.Trimesh(
        vertices=vertices, faces=faces, vertex_colors=_to_bytes(color), process=False, validate=False
    )


def automatic_level(density: Float[Tensor, "x y z"]) -> float:
    """The density whose surface has the outline that one sees: as large as where half of the light is absorbed.

    Rays along an axis of the lattice lose half of their light in some of its columns. The level is the one that as many
    columns reach: the middle between the highest densities of the last column that counts and of the first that does
    not. Of the three axes it is the median; never more than half of the highest density, so that what is equally thin
    everywhere has a surface, too.

    Raises:
        ValueError: along no axis any ray loses half of its light.
    """
    cell = 2 * SCENE_RADIUS / (len(density) - 1)
    highest = float(density.max())
    levels = []
    for axis in range(3):
        visible = int((density.sum(dim=axis) * cell >= math.log(2)).sum())
        peaks = density.amax(dim=axis).flatten().sort(descending=True).values
        if visible:
            last, first_beyond = peaks[visible - 1], peaks[min(visible, len(peaks) - 1)]
            levels.append(float(last + first_beyond) / 2)
    if not levels:
        raise ValueError(
            f"the scene is empty: its highest density is {highest:.3g}, and no ray through it loses half of its light; "
            "optimise for more steps or with less sparsity"
        )
    return min(statistics.median(levels), highest / 2)


def save_mesh(mesh: trimesh.Trimesh, path: Path) -> None:
    """Writes GLB, PLY or OBJ by the suffix. GLB is y-up by its standard and is turned; PLY and OBJ stay z-up."""
    if path.suffix not in MESH_SUFFIXES:
        raise ValueError(f"{path.name}: a mesh file ends in one of {', '.join(MESH_SUFFIXES)}")
    if path.suffix == ".glb":
        mesh = mesh.copy()
        mesh.apply_transform(np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]], dtype=np.float64))
    mesh.export(path)


def save_image(rgb: Float[Tensor, "3 h w"], path: Path) -> None:
    """Writes a PNG, or whatever else the suffix says that Pillow knows."""
    Image.fromarray(_to_bytes(rgb.permute(1, 2, 0))).save(path)


def save_turntable(frames: Float[Tensor, "frames 3 h w"], path: Path, *, frames_per_second: int = 15) -> None:
    """Writes an mp4 or an endless gif, by the suffix."""
    images = _to_bytes(frames.permute(0, 2, 3, 1))
    match path.suffix:
        case ".mp4":
            imageio.imwrite(path, images, fps=frames_per_second, codec="libx264", macro_block_size=2)
        case ".gif":
            pictures = [Image.fromarray(image).quantize(128) for image in images]
            pictures[0].save(
                path, save_all=True, append_images=pictures[1:], duration=round(1000 / frames_per_second), loop=0
            )
        case _:
            raise ValueError(f"{path.name}: a turntable file ends in one of {', '.join(VIDEO_SUFFIXES)}")


def contact_sheet(
    images: Float[Tensor, "views 3 h w"], captions: Sequence[str], *, columns: int, title: str = ""
) -> Image.Image:
    """All views in one picture, row by row, each above its caption; captions too long for their view are cut."""
    if len(images) != len(captions):
        raise ValueError(f"every view needs one caption, got {len(images)} views and {len(captions)} captions")
    if columns < 1:
        raise ValueError(f"columns must be >= 1, got {columns}")
    height, width = images.shape[-2:]
    header = CAPTION_HEIGHT if title else 0
    rows = -(-len(images) // columns)
    cell_width, cell_height = width + GAP, height + CAPTION_HEIGHT + GAP
    sheet = Image.new("RGB", (columns * cell_width + GAP, header + rows * cell_height + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    draw.text((GAP, 1), _cut(title, sheet.width - 2 * GAP, font), fill="black", font=font)
    for index, (image, caption) in enumerate(zip(_to_bytes(images.permute(0, 2, 3, 1)), captions, strict=True)):
        left, top = GAP + index % columns * cell_width, GAP + header + index // columns * cell_height
        sheet.paste(Image.fromarray(image), (left, top))
        draw.text((left, top + height + 1), _cut(caption, width, font), fill="black", font=font)
    return sheet


def _cut(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    while text and font.getlength(text) > width:
        text = text[:-1]
    return text


def _to_bytes(values: Float[Tensor, "... 3"]) -> UInt8[np.ndarray, "... 3"]:
    scaled: UInt8[np.ndarray, "... 3"] = (values.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return scaled
