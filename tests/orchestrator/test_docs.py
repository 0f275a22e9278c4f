"""The reference of sweep files lists every setting with its default, and nothing else; links lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
import types
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
import yaml

from orchestrator import cli
from orchestrator.config import CONF, SweepConfig
from orchestrator.experiment_config.experiment import ExperimentConfig
from orchestrator.experiment_config.rewards import EnsembleMemberConfig, RewardConfig
from orchestrator.experiment_config.schedules import CosineConfig, LinearConfig, PiecewiseConfig, ScheduleConfig
from orchestrator.search_space import FloatDomain, IntDomain

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "sweep-files.md"
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
ROW = re.compile(r"\| `([\w.]+)` \| (.+?) \| .*")
COMMAND = re.compile(r"[# ]*(psd (?:sweep|run) .+)")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
# What conf/sweep.yaml, or the file's name, gives where the dataclass asks for a value.
GIVEN = {"name": "the file's name", "output": "`outputs/${name}`"}


def shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(shown, value))}]"
    return value if isinstance(value, str) and value else json.dumps(value)


def default(field: Field[Any]) -> str:
    if field.default is not MISSING:
        return f"`{shown(field.default)}`"
    return "required" if field.default_factory is MISSING else f"`{shown(field.default_factory())}`"


def settings(schema: type, prefix: str = "") -> dict[str, str]:
    """Every dotted key of a config dataclass with its default, as the reference writes it."""
    hints, found = get_type_hints(schema), dict[str, str]()
    for field in fields(schema):
        hint, key = hints[field.name], prefix + field.name
        members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        parts = [member for member in members if is_dataclass(member) and isinstance(member, type)]
        if field.name == "rewards":
            for kind in get_args(RewardConfig):
                found |= settings(kind, f"{key}.NAME.") | {f"{key}.NAME.kind": "required"}
        elif field.name == "members":
            found |= settings(EnsembleMemberConfig, f"{key}.MEMBER.")
        elif field.name == "reward" or hint == ScheduleConfig or not parts:  # the settings of a reward again
            found[key] = default(field)
        else:
            for part in parts:
                for name, value in settings(part, f"{key}.").items():
                    # where kinds differ in their defaults, they stand in the order of the union
                    found[name] = " or ".join(dict.fromkeys(f"{found.get(name, value)} or {value}".split(" or ")))
            if len(parts) > 1:
                is_given = field.default is MISSING
                found[f"{key}.kind"] = "required" if is_given else f"`{field.default.kind}`"  # type: ignore[union-attr]
    return found


def expected() -> dict[str, str]:
    keys = settings(SweepConfig) | settings(ExperimentConfig)
    for part in (LinearConfig, CosineConfig, PiecewiseConfig):
        keys |= settings(part, "SCHEDULE.")
    keys["SCHEDULE.kind"] = "required"
    for domain in (FloatDomain, IntDomain):
        keys |= settings(domain, "search.space.KEY.")
    return keys | GIVEN


def documented() -> dict[str, str]:
    """The rows of the tables with the columns "key" and "default"."""
    found, in_table = dict[str, str](), False
    for line in REFERENCE.read_text().splitlines():
        in_table = line.startswith("| key | default |") or (in_table and line.startswith("|"))
        if in_table and (row := ROW.fullmatch(line)):
            assert row[1] not in found, f"{row[1]} stands there twice"
            found[row[1]] = row[2]
    return found


def commands() -> list[str]:
    """What the pages and the sweep files say to type, but for lines with a placeholder."""
    lines = [line for page in [*PAGES, *(ROOT / "sweeps").rglob("*.yaml")] for line in page.read_text().splitlines()]
    found = dict.fromkeys(match[1] for line in lines if (match := COMMAND.fullmatch(line)))
    return [command for command in found if not re.search(r" [A-Z]{4,}", command)]


@pytest.mark.parametrize("command", commands())
def test_commands_that_are_written_down_are_right(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command, comments=True)[1:]
    status = cli.main([*words, f"output={tmp_path / 'out'}", "--dry-run"])
    told = capsys.readouterr().err
    if "experiment=image2d" in words:
        assert "prior.path: no Stable Diffusion" in told
    elif any(word.startswith("sweeps/paper/") for word in words):
        assert "prior.path: no multi-view prior" in told
    else:
        assert status == 0 or "there is no 'mine'" in told


def test_the_reference_lists_every_setting_with_its_default() -> None:
    assert documented() == expected()


def test_what_a_sweep_starts_from_are_the_documented_defaults() -> None:
    """conf/sweep.yaml repeats the defaults of the dataclasses for readers; it must not differ from them."""
    given = yaml.safe_load((CONF / "sweep.yaml").read_text())
    flat = {
        f"{name}.{inner}" if isinstance(value, dict) else name: item
        for name, value in given.items()
        for inner, item in (value.items() if isinstance(value, dict) else [("", value)])
    }
    assert {key: f"`{shown(value)}`" for key, value in flat.items() if value != "???"} == {
        key: documented()[key] for key in flat if flat[key] != "???"
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere_and_lines_are_short(page: Path) -> None:
    text = page.read_text()
    missing = [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    assert missing == []
    if "results" in page.parts:
        return  # written by a benchmark
    prose = [line for line in text.splitlines() if not line.startswith("|") and "](http" not in line]
    assert [line for line in prose if len(line) > 120] == []


def test_decisions_are_numbered_once_and_named_by_their_number() -> None:
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert [page.name[:4] for page in pages] == [f"{number:04d}" for number in range(1, len(pages) + 1)]
    assert [page for page in pages if not page.read_text().startswith(f"# {page.name[:4]}: ")] == []
