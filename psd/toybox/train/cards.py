"""Model cards of the built-in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from psd.toybox.train.measure import Figures

_DATA = (
    "Data: up to 13,000 random scenes of the built-in world (`psd/toybox/grammar.py`, `renderer.py`), four orthogonal "
    "views each at 32x32, elevation 10-35 degrees, on white, grey or black. One sentence in eight of each kind is held "
    "out from all training but the classifier's."
)
_ABOUT = {
    "prior": (
        "A multi-view latent diffusion model in MVDream's form: `UNet2DConditionModel` (64, 128) with camera "
        "projection and self-attention across four views, v-prediction on Stable Diffusion's noise schedule; "
        "`AutoencoderTiny` (f = 4, 8 channels); a CLIP text encoder (2 layers, width 96) trained with the UNet. "
        "AdamW, 32 views a step, four phases (`prior.PHASES`), averaged weights; "
        "captions lose the object in 12 % and the background in 10 % of the steps."
    ),
    "classifier": (
        "The oracle: `ResNetForImageClassification`, four softmax slots (shape, base, colour, second colour), on "
        "clean and mildly degraded renders of all sentences. For evaluation only; nothing optimises it."
    ),
    "reward": "A CLIP-style preference reward (PickScore's form) to optimise: patch 4, 3 layers, width 96; seed 1.",
    "judge": "A CLIP-style preference reward that nothing optimises: patch 8, 4 layers, width 128; seed 2.",
}
_FIGURES = {
    "autoencoder_l1": "mean absolute error of a reconstruction (range 0-1)",
    "ddim_color": "DDIM, CFG 5, 30 steps, 32 held-out prompts: share of views with the right colours",
    "ddim_shape": "the same: share of views with the right shapes",
    "color": "accuracy of the colours on 600 true held-out views",
    "shape": "accuracy of the shapes on 600 true held-out views",
    "pair_accuracy": "share of 2,000 pairs of held-out sentences ranked right",
}


def write_cards(checkpoints: Path, minutes: Mapping[str, float], figures: Figures) -> None:
    for name, about in _ABOUT.items():
        spent = minutes[name] + (minutes["autoencoder"] if name == "prior" else 0)
        rows = "\n".join(f"| {_FIGURES[key]} | {value:.3f} |" for key, value in figures[name].items())
        (checkpoints / name / "README.md").write_text(
            f"# Built-in world: {name}\n\n{about}\n\n{_DATA}\n\nTraining: `python -m psd.toybox.train`, {spent:.0f} "
            f"minutes on CPU cores without AMX.\n\n"
            f"| held-out figure | value |\n| --- | --- |\n{rows}\n\nLicense: Apache-2.0.\n"
        )
