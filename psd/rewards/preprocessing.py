"""From rendered images to a vision model's input: what the model's own image processor does, on tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from psd.checkpoint_files import read_json

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_MODES = {2: "bilinear", 3: "bicubic"}  # by PIL's numbers, which preprocessor_config.json uses
_FLAGS = ("do_resize", "do_rescale", "do_normalize")


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Resize, crop, normalise; differentiable, and equal to transformers' processor up to its roundings to 8 bits.

    ``squash`` resizes to a square whatever the aspect (BLIP's processor); otherwise the shorter side is resized and the
    centre cropped (CLIP's).
    """

    image_size: int
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    mode: str = "bicubic"
    shorter_side: int | None = None  # before the crop; the image size if not given
    squash: bool = False

    @classmethod
    def from_json(cls, path: Path) -> Preprocessing:
        """Reads a ``preprocessor_config.json``.

        Raises:
            ValueError: the file is missing, or asks for something that is not done here.
        """
        config = read_json(path, kind="reward")
        if off := [flag for flag in _FLAGS if config.get(flag) is False]:
            raise ValueError(
                f"{path}: {off[0]} is off; only processors that resize, rescale and normalise are supported"
            )
        mode = _MODES.get(config.get("resample", 3))
        size, crop = _edge(config.get("size")), _edge(config.get("crop_size"))
        crops = config.get("do_center_crop", crop is not None)
        squash = isinstance(config.get("size"), dict) and "height" in config["size"] and not crops
        image_size = crop if crops else size
        if not image_size or not mode or (not crops and not squash):
            raise ValueError(f"{path}: needs a size and resample 2 or 3, and square images in the end, got {config}")
        return cls(
            image_size=image_size,
            mean=tuple(config["image_mean"]),
            std=tuple(config["image_std"]),
            mode=mode,
            shorter_side=size,
            squash=squash,
        )

    def __call__(self, rgb: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 size size"]:
        rgb = rgb.float()
        height, width = rgb.shape[-2:]
        if self.squash:
            return self._normalized(self._resized(rgb, self.image_size, self.image_size))
        side, shorter = self.shorter_side or self.image_size, min(height, width)
        rgb = self._resized(rgb, height * side // shorter, width * side // shorter)
        top, left = (rgb.shape[-2] - self.image_size) // 2, (rgb.shape[-1] - self.image_size) // 2
        return self._normalized(rgb[..., top : top + self.image_size, left : left + self.image_size])

    def _resized(self, rgb: Float[Tensor, "b 3 h w"], height: int, width: int) -> Float[Tensor, "b 3 h2 w2"]:
        """Width first, then height, as Pillow does it, whose bytes cannot overshoot in between."""
        for size in ((rgb.shape[-2], width), (height, width)):
            if rgb.shape[-2:] != size:
                rgb = F.interpolate(rgb, size, mode=self.mode, antialias=True).clamp(0, 1)
        return rgb

    def _normalized(self, rgb: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Channel by channel, with plain numbers: tensors would be copied to the device in every step."""
        channels = zip(rgb.unbind(1), self.mean, self.std, strict=True)
        return torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)

    def to_json(self) -> dict[str, Any]:
        """The ``preprocessor_config.json`` of this, for converted checkpoints. Its processor crops."""
        assert not self.squash
        size = {"height": self.image_size, "width": self.image_size}
        return {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": self.shorter_side or self.image_size},
            "crop_size": size,
            "do_center_crop": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "resample": next(number for number, mode in _MODES.items() if mode == self.mode),
        }


def _edge(size: object) -> int | None:
    """A side's length, however the file says it: a number, or a mapping of a square."""
    if isinstance(size, dict):
        sides = {size[name] for name in ("shortest_edge", "height", "width") if size.get(name)}
        return int(sides.pop()) if len(sides) == 1 else None
    return size if isinstance(size, int) else None
