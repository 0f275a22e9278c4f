"""The page of a sweep: what its charts show, and that nothing of a sweep can become code in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest

from orchestrator.goals import Goal
from orchestrator.report import plots
from orchestrator.report.ablation import Ablation, make_ablation
from orchestrator.report.page import SweepReport, render_page
from orchestrator.report.runs import RunView, view_run
from orchestrator.report.tables import TrialRow, trial_rows
from orchestrator.run_folder import RunFolder
from orchestrator.search_space import CategoricalDomain, Domain, FloatDomain, IntDomain
from orchestrator.study import TrialRecord
from orchestrator.trial import Lease, RunSpec

JUDGE = Goal(name="judge", metric="eval/judge")
HOSTILE = "</script><script>alert(1)</script>"
SCALE = "distillation.guidance_scale"


@pytest.fixture(autouse=True)
def _without_plotly_js(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five megabytes that take a second to parse."""
    monkeypatch.setattr("orchestrator.report.page.get_plotlyjs", lambda: "")


def record(number: int, value: float | None, params: Mapping[str, float | str] | None = None) -> TrialRecord:
    params = {SCALE: 1.0 + number} if params is None else params
    if value is None:
        return TrialRecord(number=number, params=params, state="failed", attributes={"reason": HOSTILE})
    attributes = {"metrics": {"eval/judge": value, "eval/reward": -value}, "runs": {"a": value - 1, "b": value + 1}}
    return TrialRecord(number=number, params=params, state="complete", values=(value,), attributes=attributes)


def run(trial: int, seed: int, values: Sequence[float], *, prompt: str = "a cone", done: bool = True) -> RunView:
    rows = [{"step": 10.0 * (i + 1), "train/reward": value} for i, value in enumerate(values)]
    return RunView(
        run_id=f"t{trial:04d}-p00-s{seed}",
        trial=trial,
        prompt=prompt,
        seed=seed,
        rows=rows,
        result={"eval/judge": values[-1]} if done else None,
        files=["contact_sheet.png", "mesh.glb", "turntable.gif"] if done else ["metrics.jsonl"],
    )


def page(
    rows: Sequence[TrialRow],
    runs: Sequence[RunView],
    domains: Mapping[str, Domain] | None = None,
    importances: Mapping[str, float] | None = None,
    ablation: Ablation | None = None,
) -> str:
    return render_page(
        SweepReport(
            title=HOSTILE,
            facts=["maximize judge"],
            goals=[JUDGE],
            domains=domains or {SCALE: FloatDomain(low=1, high=10, log=True)},
            importances=[importances or {}],
            ablation=ablation,
            curve_metrics=["train/reward"],
            table_metrics=["eval/reward"],
            reward_metric="eval/reward",
            rows=rows,
            runs=runs,
        )
    )


class _Reader(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[str] = []
        self.links: list[str] = []
        self.num_charts = 0
        self.num_scripts = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.images += [named["src"] or ""] if tag == "img" else []
        self.links += [named["href"] or ""] if tag == "a" else []
        self.num_charts += named.get("class") == "plotly-graph-div"
        self.num_scripts += tag == "script"


def test_pictures_stand_for_runs_and_nothing_comes_from_elsewhere() -> None:
    rows = trial_rows([record(0, 2.0), record(1, 3.0), record(2, None)], [JUDGE])
    read = _Reader(page(rows, [run(0, 0, [1, 2]), run(1, 0, [2, 3]), run(1, 1, [2], done=False)]))
    best, first = "runs/t0001-p00-s0", "runs/t0000-p00-s0"
    assert read.images == [f"{folder}/turntable.gif" for folder in (best, first)]  # the best one stands on top, too
    assert f"{first}/mesh.glb" in read.links
    assert "runs/t0001-p00-s1/metrics.jsonl" in read.links
    assert not [link for link in read.links if "//" in link]
    assert read.num_charts == 4  # values, judge over reward, one setting, curves


def test_what_a_sweep_says_stays_text() -> None:
    rows = trial_rows([record(0, 2.0, {SCALE: HOSTILE}), record(1, 1.0), record(2, None)], [JUDGE])
    runs = [run(0, 0, [1, 2], prompt=HOSTILE)]
    text = page(rows, runs)
    assert "alert(1)" in text  # in the title, a setting, a prompt and a reason
    assert HOSTILE not in text
    read = _Reader(text)
    assert read.num_scripts == 1 + read.num_charts  # plotly itself, and what draws each chart


def test_a_sweep_without_trials_has_a_page() -> None:
    read = _Reader(page([], []))
    assert (read.num_charts, read.images, read.num_scripts) == (0, [], 0)


@pytest.mark.parametrize(("maximize", "best_so_far"), [(True, [2.0, 2.0, 3.0]), (False, [2.0, 1.0, 1.0])])
def test_the_history_shows_the_best_so_far(maximize: bool, best_so_far: list[float]) -> None:
    goal = Goal(name="judge", metric="eval/judge", maximize=maximize)
    records = [record(number, value) for number, value in enumerate([2.0, 1.0, None, 3.0])]
    figure = plots.history(trial_rows(records, [goal]), goal)
    assert figure is not None
    line, points = figure.data
    assert (list(line.x), list(line.y)) == ([0, 1, 3], best_so_far)
    assert list(points.y) == [2.0, 1.0, 3.0]


def test_a_curve_is_the_mean_of_the_runs_where_all_have_come() -> None:
    runs = [run(0, 0, [1.0, 2.0, 3.0]), run(0, 1, [3.0, float("nan")])]
    assert plots.mean_curve(runs, "train/reward") == {10: 2.0}
    assert plots.mean_curve(runs[:1], "train/reward") == {10: 1.0, 20: 2.0, 30: 3.0}
    assert plots.mean_curve(runs, "eval/judge") == {}


def test_a_setting_has_the_axis_of_its_domain() -> None:
    rows = trial_rows([record(0, 2.0), record(1, 1.0)], [JUDGE])
    log = plots.against_setting(rows, JUDGE, SCALE, FloatDomain(low=1, high=10, log=True))
    category = plots.against_setting(rows, JUDGE, SCALE, CategoricalDomain(choices=(2.0, 1.0)))
    assert log is not None
    assert category is not None
    assert log.layout.xaxis.title.text == "guidance_scale"
    assert (log.layout.xaxis.type, list(log.data[0].x)) == ("log", [1.0, 2.0])
    assert (category.layout.xaxis.type, list(category.layout.xaxis.categoryarray)) == ("category", ["2.0", "1.0"])
    assert plots.against_setting(rows, JUDGE, "another", FloatDomain(low=0, high=1)) is None


def test_variants_stand_with_their_runs_and_the_standard_error_of_their_means() -> None:
    rows = trial_rows([record(0, 2.0, {"variant": "psd"}), record(1, 5.0, {"variant": "sds"})], [JUDGE])
    runs = [run(0, 0, [1.0]), run(0, 1, [3.0]), run(1, 0, [4.0])]  # one is on another driver's disk
    figure = plots.between_variants(rows, runs, JUDGE, "variant")
    assert figure is not None
    of_best, of_other, means = figure.data
    assert (list(of_best.x), set(of_best.y)) == ([4.0], {"sds"})
    assert list(of_other.x) == [1.0, 3.0]
    assert list(means.x) == [5.0, 2.0]
    assert list(means.error_x.array) == pytest.approx([1.0, 1.0])  # sd of (v - 1, v + 1) is sqrt 2, over sqrt 2 runs
    assert list(figure.layout.yaxis.categoryarray) == ["psd", "sds"]  # from below: the best on top


def test_importances_stand_with_the_largest_on_top() -> None:
    figure = plots.importances({SCALE: 0.75, "scene.resolution": 0.25}, JUDGE)
    assert figure is not None
    [bars] = figure.data
    assert (list(bars.y), list(bars.x)) == (["resolution", "guidance_scale"], [0.25, 0.75])
    assert plots.importances({}, JUDGE) is None


SPACE: dict[str, Domain] = {
    SCALE: FloatDomain(low=1, high=10, log=True),
    "distillation.weighting.kind": CategoricalDomain(choices=("psd", "sds")),
    "distillation.weighting.candidates": IntDomain(low=2, high=6),
}


def test_a_line_goes_through_a_trials_settings_to_its_values() -> None:
    lacks = {SCALE: 1.0, "distillation.weighting.kind": "sds"}
    whole = {SCALE: 10.0, "distillation.weighting.kind": "psd", "distillation.weighting.candidates": 6}
    rows = trial_rows([record(0, 2.0, lacks), record(1, 3.0, whole), record(2, None, whole)], [JUDGE])
    figure = plots.parallel_coordinates(rows, [JUDGE], SPACE)
    assert figure is not None
    scale, kind, candidates, judge = figure.data[0].dimensions
    assert [axis.label for axis in (scale, kind, candidates, judge)] == [
        "guidance_scale",
        "kind",
        "candidates",
        "judge",
    ]
    assert (list(scale.values), list(scale.range)) == ([0.0, 1.0], [0.0, 1.0])  # decades; the best one last, on top
    assert list(scale.ticktext) == ["1", "2", "5", "10"]
    assert (list(kind.values), list(kind.ticktext)) == ([1.0, 0.0], ["psd", "sds"])
    assert list(candidates.values) == pytest.approx([2 - 0.2 * 4, 6])
    assert list(candidates.ticktext) == ["2", "3", "4", "5", "6", "absent"]
    assert list(candidates.range) == pytest.approx([1.2, 6])
    assert list(judge.values) == [2.0, 3.0]
    assert figure.data[0].line.reversescale  # dark, which Viridis begins with, is high
    assert plots.parallel_coordinates(rows, [JUDGE], {SCALE: SPACE[SCALE]}) is None  # that is the chart of the setting


def test_the_page_shows_what_can_be_told_of_the_settings() -> None:
    params = [{SCALE: 1.0 + n, "distillation.weighting.kind": "psd"} for n in range(2)]
    rows = trial_rows([record(n, float(n), params[n]) for n in range(2)], [JUDGE])
    domains = {key: SPACE[key] for key in list(SPACE)[:2]}
    without, with_importances = page(rows, [], domains), page(rows, [], domains, {SCALE: 0.75, "kind": 0.25})
    assert _Reader(without).num_charts == 5  # values, trade-off, parallel coordinates, two settings
    assert _Reader(with_importances).num_charts == 6
    assert ("PED-ANOVA" in without, "PED-ANOVA" in with_importances) == (False, True)


def test_variants_stand_with_their_differences_to_the_first() -> None:
    records = [record(0, 5.0, {"variant": "psd"}), record(1, 2.0, {"variant": "sds"})]
    rows = trial_rows([*records, record(2, None, {"variant": "csd"})], [JUDGE])
    ablation = make_ablation(rows, {"a": ("a cone", 0), "b": ("a cone", 1)}, JUDGE, parameter="variant")
    assert ablation is not None
    figure = plots.differences(rows, ablation, JUDGE)
    assert figure is not None
    [points] = figure.data
    assert (list(points.x), list(points.y)) == ([-3.0], ["sds"])
    assert list(figure.layout.yaxis.categoryarray) == ["sds", "psd"]  # as in the chart beside it
    text = page(rows, [], {"variant": CategoricalDomain(choices=("psd", "sds", "csd"))}, ablation=ablation)
    assert _Reader(text).num_charts == 4  # values, trade-off, variants, differences
    assert "<th>minus psd</th>" in text


def test_a_run_is_seen_once_it_has_begun(tmp_path: Path) -> None:
    spec = RunSpec(run_id="t0000-p00-s0", trial=0, prompt="a cone", seed=0, config={"x": 1})
    assert view_run(tmp_path, spec) is None
    claim = RunFolder(tmp_path, spec.run_id).claim(Lease(spec=spec))
    claim.append_metrics(10, {"train/reward": 1.0})
    claim.close()
    view = view_run(tmp_path, spec)
    assert view is not None
    assert (view.rows, view.result, view.picture) == ([{"step": 10, "train/reward": 1.0}], None, None)
    (tmp_path / spec.run_id / "contact_sheet.png").touch()
    view = view_run(tmp_path, spec)
    assert view is not None
    assert view.picture == "contact_sheet.png"
    other = RunSpec(run_id="t0000-p00-s0", trial=0, prompt="a cube", seed=0, config={"x": 1})
    assert view_run(tmp_path, other) is None
