"""Held-out figures of the built-in checkpoints: what the model cards say, measured anew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DDIMScheduler
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from psd.priors.multiview import MultiviewPrior
from psd.toybox.grammar import BACKGROUNDS, held_out
from psd.toybox.oracle import Oracle
from psd.toybox.train.data import CAMERAS, Scenes, cached_scenes
from psd.toybox.train.preferences import PairSampler
from psd.toybox.train.prior import encode
from psd.toybox.train.reward import accuracy
from psd.toybox.train.sampling import ddim_sample, one_step_guesses

NUM_PROMPTS, NUM_SCENES = 32, 150
Figures = dict[str, dict[str, float]]


def measure(checkpoints: Path, work: Path) -> Figures:
    """Figures by checkpoint: prior, classifier, reward, judge."""
    scenes = cached_scenes(work, NUM_SCENES, 999, held_out=True)
    oracle = Oracle.from_pretrained(checkpoints / "classifier")
    prior = MultiviewPrior.from_pretrained(checkpoints / "prior")
    vae = AutoencoderTiny.from_pretrained(checkpoints / "prior" / "vae").eval()
    pairs = PairSampler(scenes, one_step_guesses(prior, encode(scenes, vae), NUM_SCENES, seed=999), seed=999)
    figures = {
        "classifier": _classifier(oracle, scenes),
        "prior": {"autoencoder_l1": _reconstruction(prior, scenes), **_samples(prior, checkpoints, oracle)},
    }
    for name in ("reward", "judge"):
        model = CLIPModel.from_pretrained(checkpoints / name).float().eval()
        words = CLIPTokenizer.from_pretrained(checkpoints / name)
        figures[name] = {"pair_accuracy": accuracy(model, words, pairs)}
    return figures


def _classifier(oracle: Oracle, scenes: Scenes) -> dict[str, float]:
    verdicts = [oracle.judge(rgb / 255, str(d)) for rgb, d in zip(scenes.rgb, scenes.descriptions, strict=True)]
    return {name: sum(v[name] for v in verdicts) / len(verdicts) for name in ("color", "shape")}


@torch.inference_mode()
def _reconstruction(prior: MultiviewPrior, scenes: Scenes) -> float:
    rgb = scenes.rgb.flatten(0, 1) / 255
    return float((prior.decode(prior.encode(rgb)) - rgb).abs().mean())


def _samples(prior: MultiviewPrior, checkpoints: Path, oracle: Oracle) -> dict[str, float]:
    """DDIM at CFG 5, the first background: share of views with the right colour and shape."""
    prompts = [str(description) for description in held_out(NUM_PROMPTS)]
    rgb = sample_prompts(prior, checkpoints, prompts)
    verdicts = [oracle.judge(views, prompt) for views, prompt in zip(rgb, prompts, strict=True)]
    return {f"ddim_{name}": sum(v[name] for v in verdicts) / len(verdicts) for name in ("color", "shape")}


def sample_prompts(prior: MultiviewPrior, checkpoints: Path, prompts: list[str]) -> Float[Tensor, "p 4 3 h w"]:
    generator = torch.Generator().manual_seed(0)
    scheduler = DDIMScheduler.from_pretrained(checkpoints / "prior" / "scheduler")
    cameras = replace(CAMERAS, num_groups=len(prompts))(generator)
    rgb = ddim_sample(prior, scheduler, prompts, next(iter(BACKGROUNDS)), cameras, generator)
    grouped: Tensor = rgb.unflatten(0, (len(prompts), CAMERAS.group_size))
    return grouped
