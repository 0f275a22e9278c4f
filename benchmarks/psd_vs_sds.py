"""PSD against SDS on the built-in world, at equal steps and at equal UNet calls, on held-out prompts.

    python -m benchmarks.psd_vs_sds --dry-run                       what would run
    python -m benchmarks.psd_vs_sds --processes 2                   run what is missing, then report
    python -m benchmarks.psd_vs_sds --variants sds 'psd_*_1'        only these
    python -m benchmarks.psd_vs_sds --report                        report whatever is there

Writes docs/results/psd_vs_sds.md, .csv and .png.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.comparison import Variant
from benchmarks.comparison_runner import Benchmark, run
from orchestrator import config
from psd.toybox import grammar

SINGLE = {"distillation.weighting.kind": "single"}
EMBEDDING = "distillation.negative_embedding"
LOW_GUIDANCE = {"distillation.guidance_scale": 1.2}  # where the search of sweeps/cfg_scale.yaml ended
EQUAL_CALLS = ("sds_2_groups", "sds_2x_steps")  # of two candidates


def _psd(scaling: str, scale: float) -> dict[str, str | float | bool]:
    weighting = "distillation.weighting"
    return {f"{weighting}.kind": "preference", f"{weighting}.scaling": scaling, f"{weighting}.scale": scale}


def _embedding(objective: str) -> dict[str, str | float | bool]:
    return {
        f"{EMBEDDING}.enabled": True,
        f"{EMBEDDING}.objective": objective,
        f"{EMBEDDING}.interval": 4,
        f"{EMBEDDING}.lr": 0.03,
    }


BASELINE = "sds"
VARIANTS = (
    Variant(name="sds", what="score distillation", settings=SINGLE),
    Variant(name="sds_2_groups", what="SDS, two groups of views a step", settings={**SINGLE, "cameras.num_groups": 2}),
    Variant(name="sds_2x_steps", what="SDS, twice the steps", settings=SINGLE, stretch=2),
    Variant(
        name="psd_normalized_1",
        what="PSD, the gap over its spread",
        settings=_psd("normalized", 1.0),
        equal_calls=EQUAL_CALLS,
    ),
    Variant(name="psd_constant_1", what="PSD, factor 1", settings=_psd("constant", 1.0), equal_calls=EQUAL_CALLS),
    Variant(
        name="psd_bradley_terry_1",
        what="PSD, Bradley-Terry factor",
        settings=_psd("bradley_terry", 1.0),
        equal_calls=EQUAL_CALLS,
    ),
    Variant(name="psd_gap_1", what="PSD, grows with the gap", settings=_psd("gap", 1.0), equal_calls=EQUAL_CALLS),
    Variant(
        name="psd_normalized_3",
        what="PSD, three times as strong",
        settings=_psd("normalized", 3.0),
        equal_calls=EQUAL_CALLS,
    ),
    Variant(
        name="psd_normalized_1_implicit",
        what="PSD with the negative embedding, implicit reward",
        settings={**_psd("normalized", 1.0), **_embedding("implicit_reward")},
        equal_calls=("sds_3_groups",),
    ),
    Variant(
        name="psd_normalized_1_ascent",
        what="PSD with the negative embedding, reward ascent",
        settings={**_psd("normalized", 1.0), **_embedding("reward_ascent")},
        equal_calls=EQUAL_CALLS,
    ),
    Variant(
        name="sds_3_groups", what="SDS, three groups of views a step", settings={**SINGLE, "cameras.num_groups": 3}
    ),
    Variant(
        name="psd_0",
        what="the winner of two noises, no preference term",
        settings=_psd("constant", 0.0),
        equal_calls=EQUAL_CALLS,
    ),
    Variant(name="psd_constant_3", what="PSD, factor 3", settings=_psd("constant", 3.0), equal_calls=EQUAL_CALLS),
    Variant(
        name="psd_bradley_terry_3",
        what="PSD, Bradley-Terry factor, three times as strong",
        settings=_psd("bradley_terry", 3.0),
        equal_calls=EQUAL_CALLS,
    ),
    Variant(
        name="psd_gap_3",
        what="PSD, grows with the gap, three times as strong",
        settings=_psd("gap", 3.0),
        equal_calls=EQUAL_CALLS,
    ),
    Variant(
        name="sds_low_guidance",
        what="SDS with hardly any classifier-free guidance",
        settings={**SINGLE, **LOW_GUIDANCE},
    ),
    Variant(
        name="psd_low_guidance",
        what="PSD in place of classifier-free guidance",
        settings={**_psd("normalized", 2.0), **LOW_GUIDANCE},
    ),
    Variant(
        name="sds_ascent",
        what="SDS with the negative embedding, reward ascent",
        settings={**SINGLE, **_embedding("reward_ascent")},
    ),
)

TITLE = "PSD against SDS on the built-in world"
INTRODUCTION = """\
PSD here is this project's reconstruction (docs/decisions/0003-psd-is-a-reconstruction.md). Prompts are held out from
all training; every variant runs on the same prompts with the same seeds. A UNet call is one view denoised with one
text."""


def compose(overrides: Sequence[str]) -> config.Sweep:
    return config.load_asset("a red cube", ["experiment=toybox", *overrides])


BENCHMARK = Benchmark(
    name="psd_vs_sds",
    command="python -m benchmarks.psd_vs_sds",
    title=TITLE,
    introduction=INTRODUCTION,
    variants=VARIANTS,
    baseline=BASELINE,
    compose=compose,
    prompts=[str(description) for description in grammar.held_out(64)],
    num_prompts=8,
    seeds=(0, 1),
)


if __name__ == "__main__":
    sys.exit(run(BENCHMARK, sys.argv[1:]))
