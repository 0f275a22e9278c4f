"""Training data: random scenes of the world, each rendered from four views of one camera group."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from psd.cameras import Cameras, CameraSampler
from psd.toybox.grammar import BACKGROUNDS, Description, descriptions, is_held_out, parse
from psd.toybox.renderer import PlacedSolid, place, render

CAMERAS = CameraSampler(
    height=32, width=32, group_size=4, elevation_deg=(10.0, 35.0), fov_deg=(40.0, 40.0), distance_scale=(1.0, 1.0)
)
KIND_WEIGHTS = {"plain": 0.40, "striped": 0.25, "stacked": 0.35}
SIZE_JITTER, COLOR_JITTER = 0.06, 0.03
GROUPS_A_BATCH = 24


@dataclass(frozen=True, eq=False)
class Scenes:
    """n rendered scenes; ``phrases`` index into the names of the backgrounds."""

    rgb: UInt8[Tensor, "n 4 3 h w"]
    opacity: UInt8[Tensor, "n 4 1 h w"]
    cameras: Float[Tensor, "n 4 16"]
    phrases: Int[Tensor, " n"]
    descriptions: tuple[Description, ...]

    def __len__(self) -> int:
        return len(self.rgb)


def make_scenes(num_scenes: int, seed: int, *, held_out: bool = False) -> Scenes:
    """Random scenes of the descriptions for training, or of the held-out ones; kinds by their weights."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    drawn = _draw(num_scenes, rng, held_out)
    phrases = torch.tensor([rng.randrange(len(BACKGROUNDS)) for _ in drawn])
    levels = torch.tensor(list(BACKGROUNDS.values()))[phrases]
    batches = []
    for start in range(0, num_scenes, GROUPS_A_BATCH):
        part = drawn[start : start + GROUPS_A_BATCH]
        placed = [_jittered(place(d, 1 + rng.uniform(-SIZE_JITTER, SIZE_JITTER)), rng) for d in part]
        cameras = replace(CAMERAS, num_groups=len(part))(generator)
        batches.append(_render_groups(placed, cameras, levels[start : start + GROUPS_A_BATCH]))
    rgb, opacity, conditioning = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return Scenes(rgb, opacity, conditioning, phrases, tuple(drawn))


def _draw(num_scenes: int, rng: random.Random, held_out: bool) -> list[Description]:
    by_kind: dict[str, list[Description]] = {kind: [] for kind in KIND_WEIGHTS}
    for description in descriptions():
        if is_held_out(description) == held_out:
            by_kind[description.kind].append(description)
    kinds = rng.choices(list(KIND_WEIGHTS), list(KIND_WEIGHTS.values()), k=num_scenes)
    return [rng.choice(by_kind[kind]) for kind in kinds]


def _jittered(scene: tuple[PlacedSolid, ...], rng: random.Random) -> tuple[PlacedSolid, ...]:
    def shift(color: tuple[float, float, float]) -> tuple[float, float, float]:
        red, green, blue = (min(max(c + rng.gauss(0, COLOR_JITTER), 0.0), 1.0) for c in color)
        return red, green, blue

    return tuple(
        replace(solid, color=shift(solid.color), stripe=None if solid.stripe is None else shift(solid.stripe))
        for solid in scene
    )


def _render_groups(
    placed: Sequence[tuple[PlacedSolid, ...]], cameras: Cameras, levels: Float[Tensor, " g"]
) -> tuple[Tensor, Tensor, Tensor]:
    size = cameras.group_size
    with torch.inference_mode():
        image = render([scene for scene in placed for _ in range(size)], cameras, levels.repeat_interleave(size))
    groups = (len(placed), size)
    return (
        (image.rgb * 255).round().to(torch.uint8).unflatten(0, groups),
        (image.opacity * 255).round().to(torch.uint8).unflatten(0, groups),
        cameras.conditioning().unflatten(0, groups),
    )


def cached_scenes(folder: Path, num_scenes: int, seed: int, *, held_out: bool = False) -> Scenes:
    """As ``make_scenes``, kept in a file of tensors between the stages of a training."""
    path = folder / f"scenes-{'held-out-' if held_out else ''}{num_scenes}-{seed}.pt"
    if not path.exists():
        scenes = make_scenes(num_scenes, seed, held_out=held_out)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(
            {
                "rgb": scenes.rgb,
                "opacity": scenes.opacity,
                "cameras": scenes.cameras,
                "phrases": scenes.phrases,
                "sentences": [str(d) for d in scenes.descriptions],
            },
            path,
        )
    stored = torch.load(path, weights_only=True)
    return Scenes(
        stored["rgb"],
        stored["opacity"],
        stored["cameras"],
        stored["phrases"],
        tuple(parse(sentence) for sentence in stored["sentences"]),
    )


def joined(parts: Sequence[Scenes]) -> Scenes:
    return Scenes(
        torch.cat([part.rgb for part in parts]),
        torch.cat([part.opacity for part in parts]),
        torch.cat([part.cameras for part in parts]),
        torch.cat([part.phrases for part in parts]),
        tuple(description for part in parts for description in part.descriptions),
    )
