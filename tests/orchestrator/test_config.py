"""Sweep files: what composition and overrides make of them, and what each mistake is told."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator import config
from orchestrator.config import Sweep
from orchestrator.config.sweep import CHANGEABLE
from orchestrator.errors import UserError
from orchestrator.experiment_config.distillation import PreferenceWeightingConfig, SingleWeightingConfig
from orchestrator.experiment_config.experiment import experiment
from orchestrator.experiment_config.schedules import CosineConfig, LinearConfig
from orchestrator.goals import Goal
from orchestrator.report.tables import as_overrides
from orchestrator.run_folder import RunFolder
from orchestrator.search_space import CategoricalDomain, Condition, FloatDomain, IntDomain
from orchestrator.study import Suggestion
from orchestrator.trial import Lease

ROOT = Path(__file__).parents[2]
GUIDANCE, SCALE = "distillation.guidance_scale", "distillation.weighting.scale"


def sweep_file(folder: Path, **changes: Any) -> Path:
    """A small sweep file with changes at its top level."""
    content = {
        "defaults": ["sweep", {"experiment": "toybox"}, "_self_"],
        "search": {"space": {GUIDANCE: {"low": 2, "high": 30, "log": True}}},
        "prompts": ["a red cube"],
        **changes,
    }
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def load(folder: Path, *overrides: str, **changes: Any) -> Sweep:
    return config.load(sweep_file(folder, **changes), overrides)


@pytest.mark.parametrize("path", sorted((ROOT / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_sweeps_are_valid_and_short(path: Path) -> None:
    sweep = config.load(path)
    assert sweep.config.name == path.stem
    assert sweep.num_trials >= 12
    assert len(path.read_text().splitlines()) <= 30


def test_the_hash_grid_of_the_built_in_world_is_valid() -> None:
    scene = experiment(config.load_asset("a red cube", ["experiment=toybox_hash_grid"]).experiment).scene
    assert (scene.kind, scene.num_samples, scene.sparsity) == (
        "hash_grid",
        48,
        LinearConfig(start=0, end=30, end_step=100),
    )


def test_a_domain_has_the_type_of_its_setting(tmp_path: Path) -> None:
    space = {
        GUIDANCE: {"low": 2, "high": 30, "log": True},
        SCALE: [0, 1, 2.5],
        "scene.resolution": {"low": 24, "high": 40, "step": 8},
        "distillation.weighting.scaling": ["gap", "normalized"],
        "distillation.negative_embedding.stop": {"low": 10, "high": 20},
    }
    assert load(tmp_path, search={"space": space}).space.domains == {
        GUIDANCE: FloatDomain(low=2.0, high=30.0, log=True),
        SCALE: CategoricalDomain(choices=(0.0, 1.0, 2.5)),
        "scene.resolution": IntDomain(low=24, high=40, step=8),
        "distillation.weighting.scaling": CategoricalDomain(choices=("gap", "normalized")),
        "distillation.negative_embedding.stop": IntDomain(low=10, high=20),
    }


def test_overrides_reach_every_setting_whether_a_file_names_it_or_not(tmp_path: Path) -> None:
    sweep = load(
        tmp_path,
        "trials=3",
        "prompts=[a red cube,a blue torus]",
        "scene.smoothness=0.5",
        "distillation.weighting.kind=single",
        "distillation.guidance_scale={kind:linear,start:30,end:5,end_step:100}",
        f"search.space={{{SCALE}: [0.0]}}",
        "~search.space",
    )
    assert (sweep.config.trials, sweep.config.prompts) == (3, ("a red cube", "a blue torus"))
    parsed = experiment(sweep.experiment)
    assert parsed.scene.smoothness == 0.5
    assert parsed.distillation.weighting == SingleWeightingConfig()
    assert parsed.distillation.guidance_scale == LinearConfig(start=30.0, end=5.0, end_step=100)


def test_overrides_reach_into_the_search_space(tmp_path: Path) -> None:
    assert load(tmp_path, f"search.space.{GUIDANCE}.low=5").space.domains[GUIDANCE] == FloatDomain(
        low=5.0, high=30.0, log=True
    )
    assert load(tmp_path, f"search.space.{GUIDANCE}=[3.0,4.0]").space.domains[GUIDANCE] == CategoricalDomain(
        choices=(3.0, 4.0)
    )


def test_an_experiment_beside_the_sweep_file_can_be_chosen(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [toybox]\nscene: {resolution: 24}\n"
    )
    sweep = load(tmp_path, "experiment=mine")
    assert (sweep.experiment["scene"]["resolution"], sweep.experiment["prior"]["path"]) == (24, "toybox")


def test_a_file_may_be_named_as_psds_own(tmp_path: Path) -> None:
    """`defaults: [sweep, …]` means psd's `sweep.yaml` all the same, in this file and in others beside it."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [toybox]\nscene: {resolution: 24}\n"
    )
    text = "defaults: [sweep, experiment: mine, _self_]\nprompts: [a red cube]\n"
    for name in ("sweep", "asset", "other"):
        (tmp_path / f"{name}.yaml").write_text(text)
    for name in ("sweep", "asset", "other"):
        sweep = config.load(tmp_path / f"{name}.yaml")
        assert (sweep.config.name, sweep.experiment["scene"]["resolution"]) == (name, 24)


def test_an_experiment_can_be_given_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    file = tmp_path / "experiment" / "mine.yaml"
    file.write_text("# @package _global_\ndefaults: [toybox]\nscene: {resolution: 24}\n")
    assert config.load_asset("a red cube", [f"experiment={file}"]).experiment["scene"]["resolution"] == 24
    with pytest.raises(
        UserError, match=r"command line: experiment: no file nowhere.yaml; give .../experiment/NAME.yaml"
    ):
        config.load_asset("a red cube", ["experiment=nowhere.yaml"])


def test_a_trial_is_every_prompt_with_every_seed(tmp_path: Path) -> None:
    sweep = load(tmp_path, "distillation.guidance_scale=7.5", prompts=["a red cube", "a blue torus"], seeds=[0, 7])
    trial = config.plan_trial(sweep, Suggestion(number=3, params={GUIDANCE: 4.0}))
    assert [(run.run_id, run.prompt, run.seed) for run in trial.runs] == [
        ("t0003-p00-s0", "a red cube", 0),
        ("t0003-p00-s7", "a red cube", 7),
        ("t0003-p01-s0", "a blue torus", 0),
        ("t0003-p01-s7", "a blue torus", 7),
    ]
    assert all(run.config["distillation"]["guidance_scale"] == 4.0 for run in trial.runs)
    assert sweep.experiment["distillation"]["guidance_scale"] == 7.5
    assert isinstance(experiment(trial.runs[0].config).distillation.weighting, PreferenceWeightingConfig)


VARIANTS = {
    "psd": {},
    "mvdream": {"distillation.weighting.kind": "single"},
    "sds": {"distillation": {"weighting.kind": "single", "residual": {"kind": "noise"}, "guidance_scale": 100}},
    "annealed": {"distillation.guidance_scale": {"kind": "linear", "start": 9, "end": 2, "end_step": 50}},
}


def test_each_variant_is_one_trial_by_its_name(tmp_path: Path) -> None:
    sweep = load(tmp_path, search={"variants": VARIANTS})
    assert (sweep.num_trials, sweep.walks_a_grid) == (4, True)
    assert sweep.space.domains == {"variant": CategoricalDomain(choices=("psd", "mvdream", "sds", "annealed"))}
    trials = [
        config.plan_trial(sweep, Suggestion(number=i, params={"variant": name})) for i, name in enumerate(VARIANTS)
    ]
    psd, mvdream, sds, annealed = (experiment(trial.runs[0].config).distillation for trial in trials)
    assert trials[2].params == {"variant": "sds"}
    assert psd == experiment(sweep.experiment).distillation
    assert (mvdream.weighting, mvdream.residual) == (SingleWeightingConfig(), psd.residual)
    assert (sds.weighting.kind, sds.residual.kind, sds.guidance_scale) == ("single", "noise", 100.0)
    assert annealed.guidance_scale == LinearConfig(start=9.0, end=2.0, end_step=50)
    assert load(tmp_path, "trials=2", search={"variants": VARIANTS}).num_trials == 2


def test_another_kind_starts_from_its_own_defaults(tmp_path: Path) -> None:
    """What the sweep's experiment says of one kind must not leak into another that has a key of the same name."""
    schedule = {"kind": "linear", "start": 9, "end": 2, "start_step": 5, "end_step": 50}
    variants = {"cosine": {"distillation.guidance_scale": {"kind": "cosine", "start": 9, "end": 2, "end_step": 50}}}
    sweep = load(tmp_path, distillation={"guidance_scale": schedule}, search={"variants": variants})
    cosine = config.resolve(sweep, {"variant": "cosine"})["distillation"]["guidance_scale"]
    assert cosine == {"kind": "cosine", "start": 9.0, "end": 2.0, "start_step": 0, "end_step": 50}


def test_what_psd_run_is_told_gives_the_trials_experiment(tmp_path: Path) -> None:
    changes = {"scene": {"smoothness": 0.5}, "prompting": {"negative": "it's [red], a: b"}}
    sweep = load(tmp_path, search={"variants": VARIANTS}, **changes)
    for name in VARIANTS:
        settings = config.as_asset_settings(sweep, {"variant": name})
        words = shlex.split(as_overrides(settings))
        assert config.load_asset("a red cube", words).experiment == config.resolve(sweep, {"variant": name})


@pytest.mark.parametrize(
    ("search", "line"),
    [
        (
            {"variants": {"a": {"distillation.wieghting": 1}}},
            "variants.a: distillation.wieghting: unknown key; did you",
        ),
        ({"variants": {"a": {"distillation.weighting.kind": "singel"}}}, "a: distillation.weighting.kind: must be one"),
        (
            {"variants": {"a": {"distillation.weighting": {"kind": "single", "scale": 2}}}},
            "variants.a: distillation.weighting.scale: belongs to another kind than the variant has",
        ),
        ({"variants": {"a": {"scene.resolution": 30.5}}}, "variants.a: scene.resolution: must be a whole number; got"),
        ({"variants": {"a": 3}}, "search.variants.a: must be a mapping; got 3"),
        ({"variants": {"": {}}}, "search.variants: a variant's name must be 1 to 60 printable characters"),
        ({"variants": {"a": {"scene": 3, "scene.resolution": 30}}}, "a: scene: is given a value, so that scene.resol"),
        ({"variants": {"a": {}}, "space": {GUIDANCE: [1]}}, "search.variants: cannot be combined with search.space"),
        (
            {"variants": {"a": {"rewards": {"judge": {"path": 3}}}}},
            "variants.a: rewards.judge.path: must be text; got 3 (int)",
        ),
    ],
)
def test_a_mistake_in_a_variant_is_told(tmp_path: Path, search: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, search=search)
    assert line in str(caught.value)
    with pytest.raises(UserError, match="trials: must be <= 1, the number of variants, or null; got 2"):
        load(tmp_path, "trials=2", search={"variants": {"a": {}}})


def test_without_anything_to_search_one_trial_is_enough(tmp_path: Path) -> None:
    assert load(tmp_path, search={"space": {}}).num_trials == 1
    assert load(tmp_path).num_trials == 12


IN_2D = {"scene": {"kind": "image"}, "cameras": {"group_size": 1}}
BAD: list[tuple[str, dict[str, Any], str]] = [
    # what is wrong, the change to the file, the line after "psd: FILE: "
    ("unknown key", {"trails": 3}, "trails: unknown key; did you mean trials?"),
    ("unknown nested key", {"scene": {"resolutoin": 3}}, "scene.resolutoin: unknown key; did you mean resolution?"),
    ("wrong type", {"trials": "many"}, "trials: must be a whole number; got 'many' (str)"),
    ("wrong type, float", {"scene": {"resolution": 40.5}}, "scene.resolution: must be a whole number; got 40.5 (float"),
    ("wrong type, bool", {"trials": True}, "trials: must be a whole number; got True (bool)"),
    ("text for a number", {"distillation": {"guidance_scale": "high"}}, "distillation.guidance_scale: must be a numbe"),
    ("not a list", {"prompts": "a red cube"}, "prompts: must be a list, as [a red cube]; got 'a red cube' (str)"),
    ("a group as a key", {"method": "dreamdpo"}, "method: is chosen in `defaults`, as [sweep, experiment: toybox, "),
    ("a key in the wrong place", {"direction": "maximize"}, "direction: unknown key; did you mean objective.direct"),
    ("not a mapping", {"scene": 3}, "scene: must be a mapping with a `kind`; got 3 (int)"),
    ("a metric of 3D in 2D", {**IN_2D, "objective": {"metric": "fog"}}, "objective.metric: must be one of reward"),
    ("views in 2D", {"scene": {"kind": "image"}}, "cameras.group_size: must be 1 with scene.kind image"),
    ("sides in 2D", {**IN_2D, "prompting": {"view_dependent": True}}, "prompting.view_dependent: must be false with s"),
    ("learned behind 2D", {**IN_2D, "background": {"kind": "learned"}}, "background.kind: must be flat or none with s"),
    ("too many levels", {**IN_2D, "scene": {"kind": "image", "num_levels": 6}}, "scene.num_levels: must be at most lo"),
    ("below its range", {"trials": 0}, "trials: must be >= 1; got 0"),
    ("outside its range", {"distillation": {"residual": {"rescale": 2}}}, "rescale: must be >= 0 and <= 1; got 2.0"),
    ("negative steps", {"optimization": {"num_steps": -5}}, "optimization.num_steps: must be >= 1; got -5"),
    ("no prompts", {"prompts": []}, "prompts: must list at least one"),
    ("a prompt twice", {"prompts": ["a", "a"]}, "prompts: must list each once"),
    ("unknown kind", {"distillation": {"weighting": {"kind": "singel"}}}, "weighting.kind: must be one of single, pre"),
    ("range upside down", {"cameras": {"fov_deg": [50, 40]}}, "cameras.fov_deg: must be [low, high] with low <= high"),
    ("a camera beyond the pole", {"cameras": {"elevation_deg": [10, 135]}}, "cameras.elevation_deg: must be >= -90"),
    ("a view of half a turn", {"cameras": {"fov_deg": [40, 180]}}, "cameras.fov_deg: must lie between 0 and 180; got"),
    ("a camera in the centre", {"cameras": {"distance_scale": [0, 1]}}, "cameras.distance_scale: must be > 0; got 0"),
    ("more than all noise", {"distillation": {"max_t": {"start": 1.5}}}, "distillation.max_t: must be >= 0 and <= 1"),
    (
        "timesteps upside down",
        {"distillation": {"min_t": 0.5, "max_t": 0.3}},
        "distillation.min_t: must be <= max_t at every step; at step 0 they are 0.5 and 0.3",
    ),
    (
        "timesteps that cross",
        {"distillation": {"max_t": {"kind": "piecewise", "knots": [[0, 1.0], [20, 0.7], [200, 0.7]]}}},
        "distillation.min_t: must be <= max_t at every step; at step 4 they are 0.9416 and 0.94",
    ),
    (
        "timesteps that cross between their ends",
        {
            "distillation": {
                "min_t": {"kind": "cosine", "start": 0.98, "end": 0.02, "end_step": 100},
                "max_t": {"kind": "linear", "start": 0.98, "end": 0.50, "end_step": 100},
            }
        },
        "distillation.min_t: must be <= max_t at every step; at step 1 they are 0.979763 and 0.9752",
    ),
    (
        "a preference that turns round",
        {"distillation": {"weighting": {"scale": {"kind": "piecewise", "knots": [[0, 1.0], [50, -1.0]]}}}},
        "distillation.weighting.scale: must be >= 0; got -1; 0 turns preference guidance off",
    ),
    ("a schedule without length", {"distillation": {"max_t": {"end_step": 0}}}, "distillation.max_t.end_step: must be"),
    ("views out of groups", {"evaluation": {"num_views": 6}}, "evaluation.num_views: must be a multiple of cameras.gr"),
    ("unknown metric", {"objective": {"metric": "jugde"}}, "objective.metric: must be one of reward, judge, gap, colo"),
    ("unknown direction", {"objective": {"direction": "up"}}, "objective.direction: must be one of maximize, minimize"),
    ("no reward to train on", {"rewards": {"train": None}}, "rewards.train: must be a mapping with a `kind`; got null"),
    (
        "pairs that are not there",
        {"distillation": {"weighting": {"kind": "single"}, "negative_embedding": {"enabled": True}}},
        "distillation.negative_embedding.objective: implicit_reward needs winners and losers",
    ),
]  # fmt: skip
BAD_SPACES: list[tuple[str, dict[str, Any], str]] = [
    ("low above high", {GUIDANCE: {"low": 5, "high": 2}}, f"{GUIDANCE}.low: must be <= high (2); got 5"),
    ("log of zero", {GUIDANCE: {"low": 0, "high": 2, "log": True}}, f"{GUIDANCE}.low: must be > 0 on a log scale; got"),
    ("negative step", {GUIDANCE: {"low": 1, "high": 2, "step": -1}}, f"{GUIDANCE}.step: must be > 0; got -1"),
    ("log with step", {GUIDANCE: {"low": 1, "high": 2, "step": 1, "log": True}}, f"{GUIDANCE}.step: cannot be combine"),
    ("no high", {GUIDANCE: {"low": 1}}, f"{GUIDANCE}.high: is missing"),
    ("unknown word", {GUIDANCE: {"low": 1, "high": 2, "hihg": True}}, f"{GUIDANCE}.hihg: unknown key; did you mean hi"),
    ("neither list nor range", {GUIDANCE: 3}, f"{GUIDANCE}: must be a list of values, "),
    ("an empty list", {GUIDANCE: []}, f"{GUIDANCE}: must list at least one value"),
    ("a value twice", {GUIDANCE: [1, 1.0]}, f"{GUIDANCE}: must list each value once"),
    ("no such setting", {"distillation.guidance": [1]}, "distillation.guidance: is not a setting of the experiment; d"),
    ("a choice of a wrong type", {GUIDANCE: ["high"]}, f"{GUIDANCE}: 'high' is not allowed there: distillation.guidan"),
    ("an end out of range", {SCALE: {"low": -1, "high": 2}}, f"{SCALE}: -1.0 is not allowed there: distillation.weigh"),
    ("another kind's", {"distillation.residual.end": [1]}, "distillation.residual.end: is not a setting of the experi"),
    ("of a kind that is not set", {f"{GUIDANCE}.end": [1]}, f"{GUIDANCE}.kind: is not set; to search below it, set it"),
    ("what is no Hydra", {GUIDANCE: "interval(1"}, f"{GUIDANCE}: must be a list of values, {{low: , high: , log:"),
    ("fractions of a whole", {"scene.resolution": {"low": 2.5, "high": 9}}, "scene.resolution.low: must be a whole nu"),
    ("a range of words", {"distillation.weighting.scaling": {"low": 1, "high": 2}}, "scaling: must be a list of value"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "line"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_a_mistake_in_the_file_is_told_with_file_and_key(tmp_path: Path, change: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, **change)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'mine.yaml'}: ")
    assert line in message
    assert "\n" not in message


@pytest.mark.parametrize(("space", "line"), [case[1:] for case in BAD_SPACES], ids=[case[0] for case in BAD_SPACES])
def test_a_mistake_in_the_search_space_is_told(tmp_path: Path, space: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, search={"space": space})
    assert str(caught.value).startswith(f"{tmp_path / 'mine.yaml'}: search.space.")
    assert line in str(caught.value)


@pytest.mark.parametrize(
    ("point", "line"),
    [
        ({"distillation.guidance": 1}, "search.start[0].distillation.guidance: is not in search.space"),
        ({GUIDANCE: 31}, f"search.start[0].{GUIDANCE}: must lie in its domain (2 .. 30 (log)); got 31"),
        ({SCALE: 0.3}, f"search.start[0].{SCALE}: must lie in its domain (0 .. 2 step 0.25); got 0.3"),
    ],
)
def test_a_start_point_outside_the_space_is_told(tmp_path: Path, point: dict[str, Any], line: str) -> None:
    space = {GUIDANCE: {"low": 2, "high": 30, "log": True}, SCALE: {"low": 0, "high": 2, "step": 0.25}}
    with pytest.raises(UserError) as caught:
        load(tmp_path, search={"space": space, "start": [point]})
    assert line in str(caught.value)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("scene.resolution=big", "command line: scene.resolution: must be a whole number; got 'big' (str)"),
        ("trails=3", "command line: trails: unknown key; did you mean trials?"),
        ("trials", "command line: cannot read 'trials'; it must be KEY=VALUE, in quotes where it has blanks"),
        ("experiment=toibox", "experiment: there is no 'toibox'; choose one of image2d"),
    ],
)
def test_a_mistake_on_the_command_line_is_told(tmp_path: Path, override: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, override)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_told_with_the_nearest_one(tmp_path: Path) -> None:
    sweep_file(tmp_path)
    with pytest.raises(UserError, match=r"mien\.yaml: no such file; did you mean .*/mine\.yaml\?"):
        config.load(tmp_path / "mien.yaml")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"trials: [1\n", "line 2: is no YAML: expected ',' or ']', but got '<stream end>'"),
        (b"objective:\n\tmetric: judge\n", "line 2: is no YAML: found character '\\t' that cannot start any token; "),
        (b"defaults: [sweep, _self_]\ntrials: 1\ntrials: 2\n", "line 3: is no YAML: found duplicate key trials"),
        (b"# caf\xe9\ntrials: 1\n", "is no UTF-8 text: invalid continuation byte at byte 5"),
        ("trials: 1\n".encode("utf-16"), "is no UTF-8 text: invalid start byte at byte 0"),
        (b"", "is empty; a sweep file begins with `defaults: [sweep, experiment: toybox, _self_]`"),
        (b"prompts: [a red cube]\n", "defaults: is missing; a sweep file begins with `defaults: [sweep, "),
    ],
)  # fmt: skip
def test_what_is_no_sweep_file_is_told_in_one_line(tmp_path: Path, content: bytes, line: str) -> None:
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(UserError) as caught:
        config.load(tmp_path / "mine.yaml")
    assert str(caught.value).startswith(f"{tmp_path / 'mine.yaml'}: {line}")
    assert "\n" not in str(caught.value)


def test_an_output_folder_is_the_same_sweeps_only(tmp_path: Path) -> None:
    output, resolution = f"output={tmp_path / 'out'}", "scene.resolution=40"
    assert config.claim_output(load(tmp_path, output, resolution)).num_trials == 12
    more = ("trials=30", "workers=1", "tracking.kind=none")
    assert config.claim_output(load(tmp_path, output, resolution, *more)).num_trials == 30
    with pytest.raises(UserError) as caught:
        config.claim_output(load(tmp_path, output, "scene.resolution=24"))
    assert "holds another sweep (scene.resolution is 40 there, 24 here)" in str(caught.value)
    assert "psd resume" in str(caught.value)


def test_an_output_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"output: .*out holds other files; choose another"):
        config.check_output(load(tmp_path, f"output={tmp_path / 'out'}"))
    with pytest.raises(UserError, match="must be a folder"):
        config.check_output(load(tmp_path, f"output={tmp_path / 'out' / 'thesis.tex'}"))


def test_a_sweep_comes_back_from_its_output_folder(tmp_path: Path) -> None:
    sweep = load(tmp_path, f"output={tmp_path / 'out'}", "scene.smoothness=0.25")
    config.claim_output(sweep)
    again = config.load_output(tmp_path / "out", ["trials=30"])
    assert again.fingerprint() == sweep.fingerprint()
    assert (again.space, again.experiment) == (sweep.space, sweep.experiment)
    assert again.config.trials == 30
    with pytest.raises(
        UserError, match=r"command line: scene.resolution: cannot change on resume; only trials, budget, workers"
    ):
        config.load_output(tmp_path / "out", ["scene.resolution=24"])


CHANGES = {
    "trials": ["trials=30"],
    "budget": ["budget.hours=2"],
    "workers": ["workers=1"],
    "worker": ["worker.cpus=2"],
    "tracking": ["tracking.kind=none"],
    "storage": ["storage=postgresql://me@host/db"],
    "share_study": ["storage=postgresql://me@host/db", "share_study=true"],
    "checkpoint_every": ["checkpoint_every=7"],
    "checkpoints": ["checkpoints.keep=5"],
    "failures": ["failures.max_attempts=9"],
}


@pytest.mark.parametrize("key", [key for key in CHANGEABLE if key != "output"])
def test_what_may_change_between_two_starts_leaves_the_runs_as_they_are(tmp_path: Path, key: str) -> None:
    sweep = load(tmp_path, f"output={tmp_path / 'out'}")
    config.claim_output(sweep)
    suggestion = Suggestion(number=0, params={GUIDANCE: 7.0})
    [run] = config.plan_trial(sweep, suggestion).runs
    folder = RunFolder(tmp_path / "out" / "runs", run.run_id)
    folder.claim(Lease(spec=run)).close()
    changed = config.load_output(tmp_path / "out", CHANGES[key])
    assert changed.to_plain()[key] != sweep.to_plain()[key]
    [again] = config.plan_trial(changed, suggestion).runs
    assert folder.describes(again)
    folder.claim(Lease(spec=again, sitting=1)).close()


def test_a_searched_kind_makes_branches_with_their_own_settings(tmp_path: Path) -> None:
    weighting = "distillation.weighting"
    space = {
        SCALE: [0.5, 1.0],  # stands before the kind on which it depends
        f"{weighting}.kind": ["single", "preference"],
        f"{GUIDANCE}.kind": "choice(linear, cosine, piecewise)",
        f"{GUIDANCE}.start": "tag(log, interval(5, 30))",
        f"{GUIDANCE}.end": "interval(1, 5)",
        f"{GUIDANCE}.end_step": "range(50, 101, 50)",
        f"{GUIDANCE}.knots": [1],
        "scene.smoothness": "interval(0, 1)",
    }
    with pytest.raises(UserError, match=f"{GUIDANCE}.knots: 1 is not allowed there"):
        load(tmp_path, search={"space": space})
    del space[f"{GUIDANCE}.knots"]
    with pytest.raises(
        UserError, match=r"'piecewise' is not allowed there: distillation.guidance_scale.knots: is miss"
    ):
        load(tmp_path, search={"space": space})
    space[f"{GUIDANCE}.kind"] = ["linear", "cosine"]
    sweep = load(tmp_path, search={"space": space})
    assert sweep.space.conditions == {
        SCALE: Condition(key=f"{weighting}.kind", values=("preference",)),
        **{f"{GUIDANCE}.{name}": Condition(key=f"{GUIDANCE}.kind", values=("linear", "cosine"))
           for name in ("start", "end", "end_step")},
    }  # fmt: skip
    assert sweep.space.domains[f"{GUIDANCE}.start"] == FloatDomain(low=5.0, high=30.0, log=True)
    assert sweep.space.domains[f"{GUIDANCE}.end_step"] == CategoricalDomain(choices=(50, 100))
    point = {f"{weighting}.kind": "single", f"{GUIDANCE}.kind": "cosine", f"{GUIDANCE}.start": 9.0,
             f"{GUIDANCE}.end": 2.0, f"{GUIDANCE}.end_step": 50, "scene.smoothness": 0.5}  # fmt: skip
    assert sweep.space.admits(point)
    assert not sweep.space.admits({**point, SCALE: 0.5})
    distillation = experiment(config.resolve(sweep, point)).distillation
    assert distillation.weighting == SingleWeightingConfig()
    assert distillation.guidance_scale == CosineConfig(start=9.0, end=2.0, end_step=50)


def test_goals_and_bounds_are_named_as_users_say_them(tmp_path: Path) -> None:
    objective = {"against": {"seconds": "minimize"}, "constraints": {"fog": {"max": 0.2}, "gap": {"min": -1, "max": 1}}}
    sweep = load(tmp_path, objective=objective)
    assert sweep.goals == (
        Goal(name="judge", metric="eval/judge"),
        Goal(name="seconds", metric="seconds", maximize=False),
    )
    fog, gap = sweep.bounds
    assert (str(fog), str(gap)) == ("fog <= 0.2", "-1 <= gap <= 1")
    assert (fog.violation(0.5), gap.violation(-1.5), gap.violation(0)) == (pytest.approx(0.3), 0.5, -1)


def test_a_password_is_used_and_not_kept(tmp_path: Path) -> None:
    url = "postgresql://me:s3cr@t/@db/sweeps?sslmode=require"
    sweep = load(tmp_path, f"storage='{url}'", f"output={tmp_path / 'out'}")
    assert sweep.storage_url == url
    config.claim_output(sweep)
    kept = (tmp_path / "out" / "sweep.json").read_text()
    assert "s3cr" not in kept
    assert "s3cr" not in sweep.shown_storage
    again = config.load_output(tmp_path / "out")
    assert again.storage_url == "postgresql://me@db/sweeps?sslmode=require"


def test_nor_is_that_of_checkpoints(tmp_path: Path) -> None:
    url = "sftp://me:s3cret@host:22/data/me@lab"
    sweep = load(tmp_path, f"checkpoints.location={url}", f"output={tmp_path / 'out'}")
    assert sweep.config.checkpoints.location == url
    config.claim_output(sweep)
    assert "s3cret" not in (tmp_path / "out" / "sweep.json").read_text()
    assert "s3cret" not in str(sweep.to_plain())  # what a dry run prints
    again = config.load_output(tmp_path / "out")
    assert again.config.checkpoints.location == "sftp://me@host:22/data/me@lab"
    assert again.to_plain() == again.to_plain() | {"checkpoints": sweep.to_plain()["checkpoints"]}


UNFIT: list[tuple[str, dict[str, Any], str]] = [
    ("grid without end", {"search": {"sampler": "grid", "space": {GUIDANCE: {"low": 1, "high": 2}}}}, "no finite list"),
    ("more trials than points", {"search": {"sampler": "grid", "space": {GUIDANCE: [1, 2]}}, "trials": 3}, "trials: m"),
    ("grid with start", {"search": {"sampler": "grid", "space": {GUIDANCE: [1]}, "start": [{GUIDANCE: 1}]}}, "combine"),
    ("cmaes with a choice", {"search": {"sampler": "cmaes", "space": {GUIDANCE: [1, 2]}}}, "is not a plain range, as "),
    ("cmaes with two goals", {"search": {"sampler": "cmaes"}, "objective": {"against": {"fog": "minimize"}}}, "one ob"),
    ("unknown sampler", {"search": {"sampler": "bayes"}}, "search.sampler: must be one of tpe, gp, cmaes, nsga2, nsga"),
    ("pruning two goals", {"search": {"pruning": {"kind": "median"}}, "objective": {"against": {"fog": "minimize"}}},
     "search.pruning: needs one objective"),
    ("pruning without a curve", {"search": {"pruning": {"kind": "median"}}, "objective": {"metric": "seconds"}},
     "search.pruning.metric: must be measured during a run: one of reward, judge, gap, color, shape; got 'seconds'"),
    ("pruning without evaluations", {"search": {"pruning": {"kind": "hyperband"}}, "evaluation": {"every": 500}},
     "finds no curve: evaluation.every (500) must be below optimization.num_steps (120)"),
    ("wilcoxon on one run", {"search": {"pruning": {"kind": "wilcoxon"}}}, "wilcoxon needs more runs a trial than 1"),
    ("a metric twice", {"objective": {"against": {"judge": "minimize"}}}, "objective.against: must name other metrics"),
    ("unknown bound", {"objective": {"constraints": {"fgo": {"max": 1}}}}, "constraints.fgo: must be one of reward, j"),
    ("a bound of nothing", {"objective": {"constraints": {"fog": {}}}}, "constraints.fog: must have min, max or both"),
    ("shared SQLite", {"share_study": True}, "share_study: needs PostgreSQL"),
    ("a storage without a scheme", {"storage": "foo"}, "storage: must be a URL, as journal:///study.journal, sqlite"),
    ("a storage that forgets", {"storage": "sqlite://"}, "three slashes and the path of a file"),
    ("an old name", {"storage": "postgres://me:s3cret@db/sweeps"}, "there is no kind of database 'postgres'"),
    ("a port in words", {"storage": "postgresql://me@db:port/sweeps"}, "storage: must be a URL"),
    ("a study nowhere", {"search": {"warm_start": {"name": "x", "storage": "x.db"}}}, "warm_start.storage: must be"),
    ("half a study", {"search": {"warm_start": {"name": "x"}}}, "search.warm_start.storage: is missing"),
    ("evaluations that would be skipped", {"evaluation": {"every": 25}},
     "evaluation.every: must be a multiple of optimization.log_every (10)"),
    ("a reward with a metric's name", {"rewards": {"fog": {"kind": "clip_preference", "path": "toybox/judge"}}},
     "rewards.fog: is the name of a "),
]  # fmt: skip


@pytest.mark.parametrize(("change", "line"), [case[1:] for case in UNFIT], ids=[case[0] for case in UNFIT])
def test_what_does_not_go_together_is_told(tmp_path: Path, change: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, **change)
    assert line in str(caught.value)


def test_a_sweep_of_one_run_stays_a_sweep_and_an_object_an_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = config.load_asset("a red cube", ["output=made", "name=made"])
    config.claim_output(made)
    assert config.load_output(Path("made")).is_asset
    with pytest.raises(UserError, match="makes one object, with one seed and without a search"):
        config.load_output(Path("made"), ["trials=3"])

    (tmp_path / "one.yaml").write_text("defaults: [asset, _self_]\nname: made\nprompts: [a red cube]\noutput: swept\n")
    swept = config.load(Path("one.yaml"))
    assert swept.definition() == made.definition()
    config.claim_output(swept)
    assert not config.load_output(Path("swept")).is_asset, "its study is to be told"
    assert config.load_output(Path("swept"), ["trials=3"]).num_trials == 3
    with pytest.raises(UserError, match=r"holds another sweep \(it was made by psd run\)"):
        config.claim_output(config.load(Path("one.yaml"), ["output=made"]))


def test_a_folder_without_a_sweep_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no sweep \(no sweep.json\); give the folder that"):
        config.load_output(tmp_path)
    claimed = tmp_path / "outputs" / "cfg_scale"
    config.claim_output(config.load_asset("a red cube", [f"output={claimed}"]))
    with pytest.raises(UserError, match=rf"; name one of those in it: {claimed}$"):
        config.load_output(claimed.parent)
    with pytest.raises(UserError, match=rf"cfg_scal: holds no sweep \(no sweep.json\); did you mean {claimed}\?$"):
        config.load_output(claimed.with_name("cfg_scal"))
    (tmp_path / "sweep.json").write_text(json.dumps({"fingerprint": "x"}))
    with pytest.raises(UserError, match=r"sweep\.json: is damaged"):
        config.load_output(tmp_path)
