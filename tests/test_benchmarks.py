"""Benchmarks that compare variants: statistics in closed form, the report, the runner with a fake objective."""

from __future__ import annotations

import argparse
import csv
import fcntl
import io
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import ablation, comparison_runner
from benchmarks.comparison import (
    CPU_S,
    UNET_CALLS,
    WALL_S,
    Measure,
    Origin,
    Outcome,
    Results,
    Variant,
    comparisons,
    costs,
    findings,
    read_results,
    survive_correction,
    with_equal_calls,
)
from benchmarks.comparison_report import figure, kept_reading, make_report, print_report, write_report
from benchmarks.comparison_runner import MEASURES, Planned, configure, execute, execute_all, plan, prepare, stretched
from benchmarks.psd_vs_sds import BASELINE, BENCHMARK, VARIANTS, compose
from orchestrator import config
from orchestrator.experiment_config.experiment import experiment
from orchestrator.report.statistics import mean_estimate, paired_difference
from orchestrator.testing import FakeObjective
from orchestrator.trial import RunSpec
from psd.toybox import grammar

ORIGIN = Origin(
    command="python -m benchmarks.psd_vs_sds",
    commit="abc1234",
    checkpoints="0123456789ab",
    machine="a machine",
    torch="2.13.0",
    date="2026-01-31",
)
SDS = Variant(name="sds", what="the baseline")
TWICE = Variant(name="sds_2x", what="twice the steps", stretch=2)
PSD = Variant(name="psd", what="the method", settings={"scale": 1.0}, equal_calls=("sds_2x",))
JUDGE = Measure(key="eval/judge", higher_is_better=True, what="held out")
REWARD = Measure(key="eval/reward", higher_is_better=True, what="optimised")
FOG = Measure(key="eval/fog", higher_is_better=False, what="translucency")


def outcomes(variant: Variant, **values: Mapping[str, float]) -> list[Outcome]:
    """Of the prompts and seeds "a0", "a1", "b0" ..."""
    return [
        Outcome(
            variant=variant.name,
            prompt=name[0],
            seed=int(name[1]),
            num_steps=100 * variant.stretch,
            metrics={f"eval/{key}": value for key, value in metrics.items() if key in ("judge", "fog")}
            | {UNET_CALLS: 800.0 * variant.stretch * (2 if variant is PSD else 1)}
            | {WALL_S: 2 * metrics.get("s", 0.1), CPU_S: metrics.get("s", 0.1)},
            origin=ORIGIN,
        )
        for name, metrics in values.items()
    ]


def results(*parts: list[Outcome], failures: Mapping[str, tuple[str, ...]] | None = None) -> Results:
    return Results(outcomes=tuple(item for part in parts for item in part), failures=failures or {})


@pytest.fixture
def small() -> Results:
    """Judge: PSD minus SDS is 1, 2, 3 on three prompts. Fog: -1/8, 0, 1/8."""
    return results(
        outcomes(SDS, a0={"judge": 5, "fog": 0.25}, b0={"judge": 5, "fog": 0.25}, c0={"judge": 5, "fog": 0.25}),
        outcomes(TWICE, a0={"judge": 7}, b0={"judge": 7}),
        outcomes(
            PSD,
            a0={"judge": 6, "fog": 0.125, "s": 0.15},
            b0={"judge": 7, "fog": 0.25, "s": 0.15},
            c0={"judge": 8, "fog": 0.375, "s": 0.2},
        ),
    )


# --- statistics


def test_interval_and_p_value_of_a_mean_are_students():
    estimate = mean_estimate([1.0, 2.0, 3.0])  # sd 1, two degrees of freedom
    t = 2 * math.sqrt(3)
    assert estimate.mean == pytest.approx(2)
    assert estimate.high - 2 == pytest.approx(2 - estimate.low) == pytest.approx(4.302653 / math.sqrt(3))
    assert estimate.p_value == pytest.approx(1 - t / math.sqrt(t**2 + 2))  # closed form for two degrees
    assert not estimate.excludes_zero
    assert mean_estimate([-1.0, -1.1, -0.9]).excludes_zero


def test_one_value_has_a_mean_and_no_interval():
    estimate = mean_estimate([0.5])
    assert estimate.mean == 0.5
    assert math.isnan(estimate.low)
    assert math.isnan(estimate.p_value)
    assert not estimate.excludes_zero


def test_values_that_do_not_spread_are_as_certain_as_a_sign_test_says():
    assert mean_estimate([0.125] * 2).p_value == 0.5
    assert mean_estimate([0.1 + 0.2, 0.3, 0.3, 0.3, 0.3, 0.3]).p_value == pytest.approx(1 / 32)
    assert mean_estimate([0.0] * 9).p_value == 1


def test_seeds_of_a_prompt_are_no_independent_evidence():
    baseline = {("a", 0): 0.0, ("a", 1): 0.0, ("b", 0): 0.0, ("b", 1): 0.0}
    difference = paired_difference({("a", 0): 4.0, ("a", 1): 6.0, ("b", 0): 5.0, ("b", 1): 7.0}, baseline)
    assert (difference.num_pairs, difference.num_prompts) == (4, 2)
    assert difference.over_pairs.mean == difference.over_prompts.mean == 5.5
    assert difference.over_pairs.low == pytest.approx(5.5 - 3.182446 * math.sqrt(5 / 3) / 2)
    assert difference.over_prompts.low == pytest.approx(5.5 - 12.706205 * 0.5)
    assert difference.over_pairs.excludes_zero
    assert not difference.is_clear


def test_better_and_worse_follow_the_measure_and_ties_are_neither():
    treatment = {("a", 0): 1.0, ("b", 0): 3.0, ("c", 0): 2.0, ("d", 0): 0.5}
    baseline = dict.fromkeys(treatment, 2.0)
    higher = paired_difference(treatment, baseline)
    lower = paired_difference(treatment, baseline, higher_is_better=False)
    assert (higher.num_better, higher.num_worse, higher.is_better) == (1, 2, False)
    assert (lower.num_better, lower.num_worse, lower.is_better) == (2, 1, True)


def test_better_is_what_is_better_on_average_not_most_often():
    gains = {(prompt, seed): (1.0, -0.01)[seed] for prompt in "abcdefg" for seed in (0, 1)}
    gains |= {("h", 0): -0.01, ("h", 1): -0.01}
    baseline = dict.fromkeys(gains, 0.0)
    higher = paired_difference(gains, baseline)
    lower = paired_difference(gains, baseline, higher_is_better=False)
    assert higher.over_pairs.low > 0
    assert (higher.is_clear, higher.num_better, higher.num_worse) == (True, 7, 9)
    assert higher.is_better
    assert not lower.is_better


def test_only_pairs_that_both_have_count():
    treatment = {("a", 0): 1.0, ("a", 1): 9.0, ("b", 0): math.nan}
    difference = paired_difference(treatment, {("a", 0): 0.0, ("b", 0): 0.0, ("c", 0): 0.0})
    assert difference.num_pairs == 1
    assert difference.over_pairs.mean == 1


def test_correction_is_benjamini_and_hochbergs():
    assert survive_correction([0.01, 0.04, 0.03, math.nan]) == [True, True, True, False]
    assert survive_correction([0.01, 0.04, 0.9]) == [True, False, False]  # 0.03, 0.06, 0.9
    assert survive_correction([math.nan]) == [False]


# --- what is compared with what


def test_comparisons_are_at_equal_steps_and_at_equal_calls():
    equal_steps, equal_calls = comparisons([SDS, TWICE, PSD], "sds")
    assert (equal_steps.baseline, equal_steps.variants) == ("sds", ("psd",))
    assert (equal_calls.baseline, equal_calls.variants) == ("sds_2x", ("psd",))


def test_findings_hold_the_differences_and_skip_what_has_no_pair(small):
    found = findings(small, comparisons([SDS, TWICE, PSD], "sds"), [JUDGE, FOG])
    assert [(item.comparison.baseline, item.measure.name, item.difference.num_pairs) for item in found] == [
        ("sds", "judge", 3),
        ("sds", "fog", 3),
        ("sds_2x", "judge", 2),
    ]
    assert [item.difference.over_pairs.mean for item in found] == [
        pytest.approx(2),
        pytest.approx(0),
        pytest.approx(-0.5),
    ]


def test_a_finding_survives_only_if_it_is_clear_and_the_number_of_findings_allows():
    clear = {f"{prompt}0": {"judge": 5 + 0.1 * i} for i, prompt in enumerate("abcdefgh")}
    worse = {name: {"judge": 4.0 + 0.01 * i} for i, name in enumerate(clear)}
    found = findings(results(outcomes(SDS, **worse), outcomes(PSD, **clear)), comparisons([SDS, PSD], "sds"), [JUDGE])
    assert [(item.difference.is_clear, item.survives) for item in found] == [(True, True)]


def test_costs_are_medians_and_ratios_of_pairs(small):
    sds, twice, psd = costs(small, [SDS, TWICE, PSD], "sds")
    assert (sds.unet_calls_per_step, psd.unet_calls_per_step, twice.unet_calls_per_step) == (8, 16, 8)
    assert (sds.cpu_ratio, psd.cpu_ratio) == (1, pytest.approx(1.5))
    assert (psd.cpu_s_per_step, psd.wall_s_per_step) == (pytest.approx(0.15), pytest.approx(0.3))
    assert (sds.num_steps, twice.num_steps) == (100, 200)


# --- the report


def page_of(folder: Path, found: Results) -> str:
    report = make_report("A title", "An introduction.", [SDS, TWICE, PSD], [JUDGE, FOG], found, "sds")
    return write_report(report, folder, "page")[0].read_text()


def test_the_page_shows_differences_costs_and_origin(tmp_path, small):
    page = page_of(tmp_path, small)
    assert "# A title\n\nAn introduction.\n" in page
    assert "| `psd` | 3 | 7.000 | 0.250 |" in page  # means
    assert "| `psd` | 100 | 16.0 | 0.300 | 0.150 | 1.50 |" in page
    assert "| `psd` | 3 | 2.00 | +2.000 [-0.484, +4.484] 3/0 | +0.000 [-0.311, +0.311] 1/1 |" in page
    assert "## Equal UNet calls: against `sds_2x`" in page
    assert "| `psd` | 2 | 1.00 | -0.500 [-6.853, +5.853] 0/1 | – |" in page
    assert "all 3 differences" in page
    for part in ("python -m benchmarks.psd_vs_sds", "abc1234", "a machine", "2.13.0", "2026-01-31", "0123456789ab"):
        assert part in page


def test_clear_differences_are_marked_by_their_direction(tmp_path):
    names = [f"{prompt}0" for prompt in "abcdefgh"]
    sds = outcomes(SDS, **{name: {"judge": 5 + 0.1 * i, "fog": 0.1} for i, name in enumerate(names)})
    psd = outcomes(PSD, **{name: {"judge": 4 + 0.11 * i, "fog": 0.05 + 0.001 * i} for i, name in enumerate(names)})
    row = next(line for line in page_of(tmp_path, results(sds, psd)).splitlines() if line.startswith("| `psd` | 8 | 2"))
    judge, fog = row.split(" | ")[3:]
    assert judge.endswith("0/8 ▼▼")
    assert fog.removesuffix(" |").endswith("8/0 ▲▲")  # less is better


def test_the_reading_stays_and_the_rest_is_made_anew(tmp_path, small):
    assert "Reading" not in page_of(tmp_path, small)
    page = tmp_path / "page.md"
    reading = "## Reading\n\nIt helps.\n\n## More\n\nBy hand, too.\n"
    page.write_text("# An old title\n\nOld numbers.\n\n" + reading)
    first = page_of(tmp_path, small)
    assert first.endswith("\n\n" + reading)
    assert "Old numbers" not in first
    assert page_of(tmp_path, small) == first


def test_a_heading_that_only_starts_alike_is_not_the_reading():
    assert kept_reading("## Reading list\n\n### Reading\n") == ""


def test_a_zero_has_no_sign_of_its_own(tmp_path):
    found = results(outcomes(SDS, a0={"judge": 0.1 + 0.2}), outcomes(PSD, a0={"judge": 0.3}))
    assert "| `psd` | 1 | 2.00 | +0.000 0/1 |" in page_of(tmp_path, found)


def test_failed_runs_are_counted_and_explained(tmp_path, small):
    page = page_of(tmp_path, Results(outcomes=small.outcomes, failures={"psd": ("loss is nan", "loss is nan")}))
    assert "| `psd` | 3 (+ 2 failed) |" in page
    assert page.count("- Failed: `psd`: loss is nan") == 1


def test_over_optimisation_is_reward_up_and_judge_down(tmp_path):
    scores = {"a": (1, -1), "b": (2, -3), "c": (-1, 1), "d": (1, 1)}
    sds = outcomes(SDS, **{f"{name}0": {"judge": 5} for name in scores})
    psd = outcomes(PSD, **{f"{name}0": {"judge": 5 + judge} for name, (_, judge) in scores.items()})
    sds = [replace(item, metrics={**item.metrics, "eval/reward": 3.0}) for item in sds]
    psd = [replace(item, metrics={**item.metrics, "eval/reward": 3.0 + scores[item.prompt][0]}) for item in psd]
    report = make_report("", "", [SDS, PSD], [JUDGE, REWARD], results(sds, psd), "sds")
    page = write_report(report, tmp_path, "page")[0].read_text()
    assert "## Reward against judge: `sds` to each" in page
    assert "| `psd` | 4 | 2 | 1 |" in page


def test_csv_files_hold_every_run_and_every_difference(tmp_path, small):
    page_of(tmp_path, small)
    runs = list(csv.DictReader((tmp_path / "page.csv").read_text().splitlines()))
    assert len(runs) == 8
    assert {key: runs[-1][key] for key in ("variant", "prompt", "seed", "steps", "judge", "fog")} == {
        "variant": "psd", "prompt": "c", "seed": "0", "steps": "100", "judge": "8.0", "fog": "0.375",
    }  # fmt: skip
    assert [row["fog"] for row in runs if row["variant"] == "sds_2x"] == ["", ""]
    differences = list(csv.DictReader((tmp_path / "page_differences.csv").read_text().splitlines()))
    assert [row["mean"] for row in differences] == ["2.0", "0.0", "-0.5"]
    assert differences[0]["low_over_pairs"] == "-0.484138"


def test_the_figure_shows_every_pair_and_interval(tmp_path, small):
    report = make_report("", "", [SDS, TWICE, PSD], [JUDGE, FOG], small, "sds")
    panels = figure(report).axes
    assert [panel.get_title() for panel in panels[:2]] == ["judge (→ better)", "fog (← better)"]
    ticks, interval, mean, _ = panels[0].lines
    assert sorted(ticks.get_xdata()) == [1, 2, 3]
    assert list(interval.get_xdata()) == pytest.approx([-0.484138, 4.484138], abs=1e-6)
    assert list(mean.get_xdata()) == [2]
    assert write_report(report, tmp_path, "page")[-1].stat().st_size > 1000


def test_the_figure_names_what_is_level_everywhere():
    level = outcomes(SDS, a0={"judge": 5, "fog": 0.2}) + outcomes(PSD, a0={"judge": 6, "fog": 0.2004})
    canvas = figure(make_report("", "", [SDS, PSD], [JUDGE, FOG], results(level), "sds"))
    assert [panel.get_title() for panel in canvas.axes] == ["judge (→ better)"]
    assert canvas.get_supxlabel().endswith("Level everywhere, not shown: fog.")


def test_the_figure_keeps_its_scale_beside_a_variant_far_outside():
    far, near = replace(PSD, name="far"), replace(PSD, name="near")
    found = outcomes(SDS, a0={"judge": 5}) + outcomes(PSD, a0={"judge": 6}) + outcomes(near, a0={"judge": 4})
    found += outcomes(far, a0={"judge": -35})
    [panel] = figure(make_report("", "", [SDS, PSD, near, far], [JUDGE], results(found), "sds")).axes
    assert [text.get_text() for text in panel.texts] == ["◀ -40.000"]
    assert min(min(line.get_xdata()) for line in panel.lines) == -1


def test_the_terminal_shows_the_same_numbers(small):
    console = Console(file=io.StringIO(), width=80)
    print_report(make_report("", "", [SDS, TWICE, PSD], [JUDGE, FOG], small, "sds"), console)
    assert isinstance(console.file, io.StringIO)
    assert re.search(r"^psd +3 +2\.00 +\+2\.000 3/0 +\+0\.000 1/1 *$", console.file.getvalue(), re.MULTILINE)


def test_what_has_no_runs_is_left_out(tmp_path):
    page = page_of(tmp_path, results(outcomes(SDS, a0={"judge": 5})))
    assert "psd" not in page.replace("benchmarks.psd_vs_sds", "")
    assert "fog" not in page
    with pytest.raises(ValueError, match="no finished run"):
        page_of(tmp_path, results())


# --- the runner


@cache
def base(*overrides: str) -> Mapping[str, Any]:
    return compose(overrides).experiment


def planned(variant: str, *, prompt: str = "a red cube", **config: Any) -> Planned:
    config = {"x": 1.0, "num_steps": 6, "steps_per_chunk": 2, **config}
    slug = prompt.replace(" ", "-")
    return Planned(variant=variant, spec=RunSpec(run_id=f"{slug}-s0", trial=0, prompt=prompt, seed=0, config=config))


class CountingObjective(FakeObjective):
    started = 0

    def start(self, *arguments: Any) -> Any:
        CountingObjective.started += 1
        return super().start(*arguments)


@pytest.fixture(autouse=True)
def counted_from_zero() -> None:
    CountingObjective.started = 0


def test_finished_runs_are_not_done_again(tmp_path):
    runs = [planned("sds"), planned("psd"), planned("psd", prompt="a blue torus")]
    prepare(runs, tmp_path)
    execute(runs[:2], tmp_path, ORIGIN, CountingObjective)
    execute(runs, tmp_path, ORIGIN, CountingObjective)
    assert CountingObjective.started == 3
    found = read_results(tmp_path, [SDS, PSD])
    assert [(item.variant, item.prompt) for item in found.outcomes] == [
        ("sds", "a red cube"),
        ("psd", "a blue torus"),
        ("psd", "a red cube"),
    ]
    for item in found.outcomes:
        assert (item.num_steps, item.origin) == (6, ORIGIN)
        assert item.metrics["eval/score"] < 0
        assert 0 < item.metrics[CPU_S] < 1
        assert 0 < item.metrics[WALL_S] < 1


def test_a_run_that_another_process_does_is_left_to_it(tmp_path):
    run = planned("sds")
    prepare([run], tmp_path)
    with (run.folder(tmp_path).path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        execute([run], tmp_path, ORIGIN, CountingObjective)
    assert CountingObjective.started == 0


def test_a_run_that_diverges_is_told_and_the_others_go_on(tmp_path, capsys):
    runs = [planned("psd", fault={"kind": "floating_point_error", "at_step": 3}), planned("sds")]
    prepare(runs, tmp_path)
    execute(runs, tmp_path, ORIGIN, CountingObjective)
    found = read_results(tmp_path, [SDS, PSD])
    assert [item.variant for item in found.outcomes] == ["sds"]
    assert found.failures["psd"] == ("the loss is not finite",)
    assert "psd · a red cube · seed 0 failed: the loss is not finite" in capsys.readouterr().out
    execute(runs, tmp_path, ORIGIN, CountingObjective)  # the fault struck once
    assert read_results(tmp_path, [SDS, PSD]).failures["psd"] == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"num_steps": 8, "steps_per_chunk": 4}, "configuration"), ({"x": 2.0}, "configuration")],
)
def test_runs_of_one_variant_must_share_their_settings(tmp_path, changes, message):
    runs = [planned("psd"), planned("psd", prompt="a blue torus", **changes)]
    prepare(runs, tmp_path)
    execute(runs, tmp_path, ORIGIN, CountingObjective)
    with pytest.raises(ValueError, match=message):
        read_results(tmp_path, [SDS, PSD])


def test_a_folder_with_another_run_is_left_alone(tmp_path):
    runs = [planned("psd")]
    prepare(runs, tmp_path)
    execute(runs, tmp_path, ORIGIN, CountingObjective)
    prepare(runs, tmp_path)
    with pytest.raises(ValueError, match="is a run with other settings"):
        prepare([planned("psd", x=2.0)], tmp_path)


def test_variants_must_share_steps_and_checkpoints(tmp_path):
    runs = [planned("sds"), planned("psd", num_steps=8)]
    prepare(runs, tmp_path)
    execute(runs, tmp_path, ORIGIN, CountingObjective)
    with pytest.raises(ValueError, match="number of steps"):
        read_results(tmp_path, [SDS, PSD])
    other = Origin(**{**vars(ORIGIN), "checkpoints": "others"})
    runs = [planned("sds_2x", num_steps=12)]
    prepare(runs, tmp_path)
    execute(runs, tmp_path, other, CountingObjective)
    with pytest.raises(ValueError, match="set of checkpoints"):
        read_results(tmp_path, [SDS, TWICE])
    with pytest.raises(ValueError, match="other checkpoints"):
        execute_all([SDS], [planned("sds")], tmp_path, other, 1)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_every_variant_is_what_its_name_says(variant):
    config = experiment(configure(base("distillation.guidance_scale=11"), variant, 100))
    weighting, negative = config.distillation.weighting, config.distillation.negative_embedding
    low = variant.name.endswith("_low_guidance")
    assert config.distillation.guidance_scale == (1.2 if low else 11)
    assert config.optimization.num_steps == 100 * variant.stretch == config.evaluation.every
    assert weighting.kind == ("single" if variant.name.startswith("sds") else "preference")
    if weighting.kind == "preference" and variant.name != "psd_0" and not low:
        scaling, scale = f"{weighting.scaling}_{weighting.scale:g}", variant.name.removeprefix("psd_")
        assert scale.startswith(scaling)
    assert negative.enabled == variant.name.endswith(("_implicit", "_ascent"))
    # Views denoised: candidates x groups x texts x stretch, the same for a variant and what it is compared with.
    assert all(calls_of(name) == calls_of(variant.name) for name in variant.equal_calls)


def calls_of(name: str) -> int:
    [variant] = [item for item in VARIANTS if item.name == name]
    config = experiment(configure(base(), variant, 100))
    candidates = 2 if config.distillation.weighting.kind == "preference" else 1
    negative = config.distillation.negative_embedding
    texts = 3 if negative.enabled and negative.objective == "implicit_reward" else 2
    return candidates * texts * config.cameras.num_groups * variant.stretch


@pytest.mark.parametrize("num_steps", [1, 7, 25, 120])
def test_any_number_of_steps_can_be_asked_for(num_steps):
    optimization = configure(base(), SDS, num_steps)["optimization"]
    assert optimization["num_steps"] % optimization["log_every"] == 0


def test_the_table_of_variants_holds_together():
    names = [variant.name for variant in VARIANTS]
    assert len(set(names)) == len(names)
    assert BASELINE in names
    assert {name for variant in VARIANTS for name in variant.equal_calls} <= set(names)
    plain = {item.name: experiment(configure(base(), item, 100)) for item in VARIANTS}
    assert all(plain[a] != plain[b] for a in names for b in names if a < b)
    known = set(plain[BASELINE].metrics.values()) | {"eval/fog"}
    assert {measure.key for measure in MEASURES} <= known


def test_schedules_stretch_with_the_steps():
    plain = {
        "optimization": {"num_steps": 200, "log_every": 10},
        "scene": {"coarse_steps": 50, "shading": {"start_step": 0}, "resolution": 40},
        "distillation": {
            "max_t": {"kind": "linear", "start": 0.98, "end": 0.5, "start_step": 0, "end_step": 160},
            "weighting": {"scale": {"kind": "piecewise", "knots": [[0, 1.0], [100, 3.0]]}},
            "negative_embedding": {"start": 20, "stop": None, "interval": 2},
            "ranking": {"ddim_steps": 15},
        },
    }
    assert stretched(plain, 0.5) == {
        "optimization": {"num_steps": 100, "log_every": 10},
        "scene": {"coarse_steps": 25, "shading": {"start_step": 0}, "resolution": 40},
        "distillation": {
            "max_t": {"kind": "linear", "start": 0.98, "end": 0.5, "start_step": 0, "end_step": 80},
            "weighting": {"scale": {"kind": "piecewise", "knots": [[0, 1.0], [50, 3.0]]}},
            "negative_embedding": {"start": 10, "stop": None, "interval": 2},
            "ranking": {"ddim_steps": 15},
        },
    }
    assert stretched({"coarse_steps": 3}, 0.01) == {"coarse_steps": 1}


@pytest.fixture
def without_weights(monkeypatch):
    monkeypatch.setattr(comparison_runner, "check_inputs", lambda experiment, prompts: None)


def options(*arguments: str) -> argparse.Namespace:
    return comparison_runner.parser(BENCHMARK).parse_args(arguments)


@pytest.mark.usefixtures("without_weights")
def test_every_prefix_of_the_plan_holds_whole_pairs():
    runs = plan(BENCHMARK, options("--variants", "sds", "psd_*_3", "--prompts", "2", "--seeds", "0", "5"))
    names = ["sds", "psd_normalized_3", "psd_constant_3", "psd_bradley_terry_3", "psd_gap_3"]
    assert [run.variant for run in runs] == names * 4
    assert [run.spec.seed for run in runs[::5]] == [0, 0, 5, 5]
    prompts = [run.spec.prompt for run in runs[::5]]
    assert prompts[:2] == prompts[2:]
    assert prompts[0] != prompts[1]
    assert len({(run.variant, run.spec.run_id) for run in runs}) == 20


@pytest.mark.usefixtures("without_weights")
def test_dry_run_and_mistakes_start_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        comparison_runner.run(BENCHMARK, ["--dry-run", "--variants", "sds", "--prompts", "1", "--out", str(out)]) == 0
    )
    assert "2 runs into" in capsys.readouterr().out.replace("\n", " ")
    assert comparison_runner.run(BENCHMARK, ["--variants", "psd_normal"]) == 2
    assert "nothing is called 'psd_normal'" in capsys.readouterr().err
    assert comparison_runner.run(BENCHMARK, ["--set", "distillation.guidance=3", "--dry-run"]) == 2
    assert "guidance_scale" in capsys.readouterr().err
    assert comparison_runner.run(BENCHMARK, ["--report", "--out", str(out), "--docs", str(tmp_path)]) == 2
    assert "no finished run" in capsys.readouterr().err
    assert not out.exists()


# --- ablations

ABLATIONS = sorted((Path(__file__).parents[1] / "sweeps" / "ablations").glob("*.yaml"))


def test_references_are_compared_with_what_calls_the_network_as_often(small):
    variants = with_equal_calls([SDS, TWICE, replace(PSD, equal_calls=())], small, ["sds_2x"])
    assert [variant.equal_calls for variant in variants] == [(), (), ("sds_2x",)]


@pytest.mark.parametrize("file", ABLATIONS, ids=lambda file: file.stem)
def test_shipped_ablations_are_comparisons(file):
    benchmark = ablation.ablation(file)
    base = benchmark.compose([]).experiment
    plain = {variant.name: configure(base, variant, 24) for variant in benchmark.variants}
    assert benchmark.baseline == benchmark.variants[0].name
    names = list(plain)
    assert [(a, b) for a in names for b in names if a < b and plain[a] == plain[b]] == []
    assert len(benchmark.prompts) >= 8
    assert len(benchmark.seeds) >= 2
    assert not [prompt for prompt in benchmark.prompts if not grammar.is_held_out(grammar.parse(prompt))]
    assert "psd sweep" not in benchmark.introduction
    assert len(benchmark.introduction) > 40


def test_methods_are_all_there_and_references_only_add_groups():
    benchmark = ablation.ablation(next(file for file in ABLATIONS if file.stem == "methods"))
    assert list(benchmark.references) == ["mvdream_2_groups", "mvdream_5_groups"]
    shipped = {path.stem for path in (config.CONF / "method").glob("*.yaml")}
    assert shipped - {variant.name for variant in benchmark.variants} == {"dreamreward_code"}  # for Reward3D


def test_only_sweeps_of_variants_are_ablations(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("defaults: [sweep, experiment: toybox, _self_]\nprompts: [a red cube]\n")
    assert ablation.main([str(file)]) == 2
    assert f"{file}: search.variants: has no variants" in capsys.readouterr().err
    assert ablation.main([]) == 2
