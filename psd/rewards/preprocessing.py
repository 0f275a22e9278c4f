"""From rendered images to a vision model's input: what the model's own image processor does, on tensors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from psd.checkpoint_files import read_json

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_MODES = {2: "bilinear", 3: "bicubic"}  # by PIL's numbers, which preprocessor_config.json uses
_FLAGS = ("do_resize", "do_rescale", "do_normalize")
_WEIGHT_BITS = 22  # behind the point, of Pillow's weights for images of 8 bits


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Resize, crop, normalise; differentiable, and what transformers' processor does but for its last rounding.

    A resize that goes both ways is rounded to 8 bits in between, as Pillow does; gradients pass straight through that.
    So an image of 8 bits comes out within half a step of 1/255 of the processor's (docs/rewards.md has the exception).
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
        """Width first, then height, with 8 bits in between: Pillow's way."""
        old_height, old_width = rgb.shape[-2:]
        if (height, width) == (old_height, old_width):
            return rgb
        levels = (rgb * 255).double()
        if width != old_width:
            levels = (levels @ resampling(old_width, width, self.mode, rgb.device).T).clamp(0, 255)
        if width != old_width and height != old_height:
            levels = levels + ((levels + 0.5).floor() - levels).detach()
        if height != old_height:
            levels = (resampling(old_height, height, self.mode, rgb.device) @ levels).clamp(0, 255)
        return levels.float() / 255

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


@lru_cache(maxsize=64)
def resampling(old: int, new: int, mode: str, device: torch.device) -> Float[Tensor, "new old"]:
    """Pillow's resize along one side, as a matrix: a kernel that widens with the reduction, in fixed-point numbers.

    Doubles, so that images of 8 bits are rounded exactly where Pillow rounds them.
    """
    scale = old / new
    centres = (torch.arange(new, dtype=torch.float64) + 0.5) * scale
    x = ((torch.arange(old) + 0.5 - centres[:, None]) / max(scale, 1.0)).abs()
    if mode == "bilinear":
        kernel = (1 - x).clamp(min=0)
    else:  # Keys' cubic with a = -1/2
        kernel = torch.where(x < 1, (1.5 * x - 2.5) * x**2 + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2) * (x < 2)
    weights = kernel / kernel.sum(1, keepdim=True)
    in_fixed_point: Tensor = (weights * 2**_WEIGHT_BITS).round() / 2**_WEIGHT_BITS
    return in_fixed_point.to(device, non_blocking=True)
