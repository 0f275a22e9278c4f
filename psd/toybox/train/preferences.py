"""The world's preferences: which of two pictures fits a sentence better, by construction.

A pair is a sentence, a better and a worse picture. The worse one shows another object (one attribute is wrong), or the
same view with a more severe degradation, or a more distorted guess of the diffusion prior.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from psd.toybox.grammar import Description
from psd.toybox.oracle import labels
from psd.toybox.train.data import Scenes
from psd.toybox.train.degradation import degrade

MIX = (0.4, 0.35, 0.25)  # of the losers: wrong object, degraded, guess of the prior


@dataclass(frozen=True, eq=False)
class Guesses:
    """One-step denoised pictures of training views: ``rgb[i]`` was noised to ``t[i]`` (ascending in severity)."""

    rgb: UInt8[Tensor, "m 3 h w"]
    t: Float[Tensor, " m"]
    scenes: tuple[int, ...]  # the scene that each one guesses


@dataclass(frozen=True, eq=False)
class Pairs:
    better: Float[Tensor, "b 3 h w"]
    worse: Float[Tensor, "b 3 h w"]
    sentences: list[str]


class PairSampler:
    """Draws pairs."""

    def __init__(self, scenes: Scenes, guesses: Guesses, seed: int):
        self._scenes, self._guesses = scenes, guesses
        self._rng = random.Random(seed)
        self._by_sentence: dict[str, list[int]] = defaultdict(list)
        for index, description in enumerate(scenes.descriptions):
            self._by_sentence[str(description)].append(index)
        self._near: dict[str, list[int]] = {}
        self._guesses_by_scene: dict[int, list[int]] = defaultdict(list)
        for index, scene in enumerate(guesses.scenes):
            self._guesses_by_scene[scene].append(index)
        self._guessed_scenes = sorted(self._guesses_by_scene)

    def __call__(self, batch_size: int) -> Pairs:
        drawn = [self._pair() for _ in range(batch_size)]
        better, worse, sentences = zip(*drawn, strict=True)
        return Pairs(torch.stack(better), torch.stack(worse), list(sentences))

    def _pair(self) -> tuple[Tensor, Tensor, str]:
        rng = self._rng
        kind = rng.choices(("wrong", "degraded", "guess"), MIX)[0]
        if kind == "guess":
            return self._guess_pair(rng.choice(self._guessed_scenes))
        scene, view = rng.randrange(len(self._scenes)), rng.randrange(4)
        sentence = str(self._scenes.descriptions[scene])
        if kind == "wrong":
            severity = rng.uniform(0, 0.6) if rng.random() < 0.5 else 0.0
            other = rng.choice(self._near_misses(self._scenes.descriptions[scene]))
            better, worse = self._degraded(scene, view, severity), self._degraded(other, rng.randrange(4), severity)
        else:
            mild, severe = sorted((rng.random() * rng.choice((0, 1)), rng.random()))
            if severe - mild < 0.15:
                severe = min(1.0, mild + 0.15)
            seed = rng.getrandbits(62)  # the same kind of degradation, twice
            better = self._degraded(scene, view, mild, seed) if mild > 0 else self._clean(scene, view)
            worse = self._degraded(scene, view, severe, seed)
        return better, worse, sentence

    def _guess_pair(self, scene: int) -> tuple[Tensor, Tensor, str]:
        """The true view against a guess, or a guess against one from clearly more noise."""
        sentence = str(self._scenes.descriptions[scene])
        ranked = sorted(self._guesses_by_scene[scene], key=lambda index: float(self._guesses.t[index]))
        worse = self._rng.choice(ranked)
        milder = [i for i in ranked if self._guesses.t[i] < self._guesses.t[worse] - 100]
        better = self._guesses.rgb[self._rng.choice(milder)] / 255 if milder and self._rng.random() < 0.5 else None
        if better is None:
            better = self._clean(scene, self._rng.randrange(4))
        return better, self._guesses.rgb[worse] / 255, sentence

    def _clean(self, scene: int, view: int) -> Tensor:
        return self._scenes.rgb[scene, view] / 255

    def _degraded(self, scene: int, view: int, severity: float, seed: int | None = None) -> Tensor:
        rng = self._rng if seed is None else random.Random(seed)
        if severity == 0:
            return self._clean(scene, view)
        return degrade(self._clean(scene, view), self._scenes.opacity[scene, view] / 255, severity, rng)

    def _near_misses(self, description: Description) -> list[int]:
        """Scenes of other sentences that differ in as few attributes as the data has."""
        sentence = str(description)
        if sentence not in self._near:
            wanted = labels(description).items()
            missing: dict[int, list[int]] = defaultdict(list)
            for other, scenes in self._by_sentence.items():
                if other != sentence:
                    found = labels(self._scenes.descriptions[scenes[0]])
                    missing[sum(found[slot] != value for slot, value in wanted)].extend(scenes)
            fewest = min(missing)
            some = missing.get(fewest + 1, [])[: len(missing[fewest]) // 2]
            self._near[sentence] = missing[fewest] + some
        return self._near[sentence]
