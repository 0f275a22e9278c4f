"""`psd convert`: what it asks for, and that it leaves nothing half done."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator import cli


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["missing.pt", "out"], "missing.pt: no such file; psd weights says how to get it"),
        (["full/file", "out"], "the checkpoint has no tokenizer; give --base FOLDER"),
        (["full/file", "out", "--base", "nowhere"], "no Stable Diffusion 2.1 at nowhere"),
        (["full/file", "full", "--base", "."], "full is there already"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    arguments: list[str],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert cli.main(["convert", "mvdream", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"psd: {line}")
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
