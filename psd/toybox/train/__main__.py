"""Reproduces the built-in checkpoints: ``python -m psd.toybox.train --out FOLDER``.

Stages run in order and find what earlier ones left in the folders, so one can be repeated alone: ``--stages reward``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderTiny

from psd.priors.multiview import MultiviewPrior
from psd.toybox.train import autoencoder, classifier, prior, reward, sampling, tokenizer
from psd.toybox.train.cards import write_cards
from psd.toybox.train.data import Scenes, cached_scenes, joined
from psd.toybox.train.loop import Clock
from psd.toybox.train.measure import measure
from psd.toybox.train.preferences import PairSampler
from psd.toybox.train.reward import RewardSize

# Minutes on two 2.5 GHz cores with AVX-512 and without AMX, of which the shipped checkpoints are the result.
PRIOR_MINUTES = sum(phase.minutes for phase in prior.PHASES)
MINUTES = {"autoencoder": 10.0, "prior": PRIOR_MINUTES, "classifier": 10.0, "reward": 9.0, "judge": 15.0}
NUM_GUESSED_SCENES = 500


@dataclass(frozen=True, kw_only=True)
class Recipe:
    work: Path
    out: Path
    speed: float

    def clock(self, stage: str) -> Clock:
        return Clock(stage, MINUTES[stage] * self.speed)

    def scenes(self) -> Scenes:
        sizes = ((5000, 1), (5000, 2), (1500, 11), (1500, 12))
        return joined([cached_scenes(self.work, size, seed) for size, seed in sizes])

    def autoencoder(self) -> None:
        views = self.scenes().rgb.flatten(0, 1)
        autoencoder.save(autoencoder.train(views, self.clock("autoencoder")), self.out / "prior" / "vae")

    def prior(self) -> None:
        vae = AutoencoderTiny.from_pretrained(self.out / "prior" / "vae").float().eval()
        data = prior.encode(self.scenes(), vae)
        for number, phase in enumerate(prior.PHASES):
            clock = Clock(f"prior, phase {number + 1}", phase.minutes * self.speed)
            folder = self.out / "prior"
            prior.train(data, tokenizer.build(), phase, clock, folder, resume=number > 0, seed=number)

    def classifier(self) -> None:
        scenes = joined([cached_scenes(self.work, 5000, 1), cached_scenes(self.work, 800, 3, held_out=True)])
        classifier.train(scenes, self.clock("classifier")).half().save_pretrained(self.out / "classifier")

    def reward(self) -> None:
        self._preference_model("reward", reward.REWARD, scenes_seed=1)

    def judge(self) -> None:
        self._preference_model("judge", reward.JUDGE, scenes_seed=2)

    def _preference_model(self, name: str, size: RewardSize, scenes_seed: int) -> None:
        loaded = MultiviewPrior.from_pretrained(self.out / "prior")
        words = tokenizer.build()
        scenes = cached_scenes(self.work, 5000, scenes_seed)
        vae = AutoencoderTiny.from_pretrained(self.out / "prior" / "vae").float().eval()
        guesses = sampling.one_step_guesses(loaded, prior.encode(scenes, vae), NUM_GUESSED_SCENES, seed=scenes_seed)
        pairs = PairSampler(scenes, guesses, seed=scenes_seed)
        model = reward.train(size, pairs, words, self.clock(name), seed=scenes_seed)
        reward.save(model, words, self.out / name)

    def measure(self) -> None:
        write_cards(self.out, MINUTES, measure(self.out, self.work))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m psd.toybox.train", description=__doc__)
    stages = ["autoencoder", "prior", "classifier", "reward", "judge", "measure"]
    parser.add_argument("--out", type=Path, required=True, help="where the checkpoints go")
    parser.add_argument("--work", type=Path, default=Path("outputs/toybox"), help="where rendered scenes are kept")
    parser.add_argument("--stages", nargs="+", choices=stages, default=stages)
    parser.add_argument("--speed", type=float, default=1.0, help="factor on all training times; 0.01 is a smoke test")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = Recipe(work=arguments.work, out=arguments.out, speed=arguments.speed)
    for stage in arguments.stages:
        run: Callable[[], None] = getattr(recipe, stage)
        run()


if __name__ == "__main__":
    main()
