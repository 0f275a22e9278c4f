"""Sweep files as people get them wrong: each runs as it is written, or ends in one line that says where and what.

`corpus` holds mistakes of all sorts; the fuzzer below lays random changes over a file that is right.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from orchestrator import config
from orchestrator.cli.sweep import check, print_plan
from orchestrator.config.checking import checked
from orchestrator.errors import UserError
from orchestrator.study import Suggestion

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*.yaml"))
RUN_AS_WRITTEN = {
    "byte_order_mark", "date", "defaults_twice", "emoji", "exponent_without_dot", "huge_integer", "hydra_settings",
    "merge_key", "name_with_spaces", "octal", "prompt_of_two_lines", "pruning_other_kind", "reward_with_slash",
    "rewards_empty", "space_bools", "space_huge", "space_hydra_interval", "space_kinds", "storage_password",
    "variants_numbers", "variants_same_key_twice", "windows_lines",
}  # fmt: skip


def outcome(path: Path) -> str | None:
    """None if the file runs as it is written, as far as that shows before anything starts; else what its user reads."""
    try:
        sweep = config.load(path)
        check(sweep)
        shown = io.StringIO()
        print_plan(sweep, Console(file=shown))
        assert "pass word" not in shown.getvalue()
        for name in sweep.config.search.variants:
            assert config.plan_trial(sweep, Suggestion(number=0, params={"variant": name})).runs
    except UserError as error:
        return str(error)
    return None


def test_the_corpus_is_there() -> None:
    assert len(CORPUS) > 150
    assert {path.stem for path in CORPUS} >= RUN_AS_WRITTEN


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_a_mistake_ends_in_one_line_that_says_where(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = outcome(path)
    assert (message is None) == (path.stem in RUN_AS_WRITTEN), message
    if message is not None:
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        assert len(message) > len(f"{path}: ") + 15, "it says what is wrong"
        assert "Exception" not in message


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**20), 10**20), st.floats(), st.text(max_size=8),
    st.sampled_from(["tpe", "single", "preference", "linear", "judge", "interval(1, 5)", "range(3)", "???", "${name}"]),
)  # fmt: skip
KEYS = st.sampled_from(
    ["kind", "low", "high", "log", "step", "start", "end", "end_step", "knots", "scale", "metric", "min", "max", "path"]
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def _plain() -> dict[str, Any]:
    """A right sweep with every default filled in."""
    sweep = config.load(Path(__file__).parents[2] / "sweeps" / "cfg_scale.yaml")
    return sweep.to_plain()


PLAIN = _plain()
PLACES = sorted(
    {(name,) for name in PLAIN}
    | {(name, inner) for name, value in PLAIN.items() if isinstance(value, dict) for inner in value}
    | {("distillation", "weighting", inner) for inner in PLAIN["distillation"]["weighting"]}
    | {("search", "space", key) for key in ("distillation.guidance_scale", "distillation.weighting.kind", "scene.kind")}
    | {("search", "variants", name) for name in ("a", "b")}
)


@settings(max_examples=100, deadline=None, database=None, derandomize=True,
          suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])  # fmt: skip
@given(st.dictionaries(st.sampled_from(PLACES), VALUES, min_size=1, max_size=3))
def test_random_values_anywhere_are_accepted_or_told(changes: dict[tuple[str, ...], Any]) -> None:
    plain: dict[str, Any] = yaml.safe_load(yaml.safe_dump(PLAIN))
    for (*parents, last), value in changes.items():
        node = plain
        for name in parents:
            node = node[name] if isinstance(node.get(name), dict) else {}
        node[last] = value
    message = None
    try:
        sweep = checked(plain, [], "fuzzed.yaml")
    except UserError as error:
        message = str(error)
    if message is None:
        assert sweep.num_trials >= 1
        assert sweep.fingerprint()
    else:
        assert message.startswith("fuzzed.yaml: ")
