"""What `psd doctor` says of the devices."""

from __future__ import annotations

import pytest

from orchestrator import cli


@pytest.mark.parametrize(
    ("gpus", "nvcc", "build", "said", "ok"),
    [
        ((), None, "2.13.0+cpu", "no GPU (torch 2.13.0+cpu)\n", True),
        (("H100",), "/usr/bin/nvcc", "2.13.0", "H100 (torch 2.13.0)\n", True),
        (("H100",), None, "2.13.0", "(torch 2.13.0); without the CUDA toolkit (nvcc) hash grids take longer", True),
        (("H100",), None, "2.13.0+cpu", "this torch cannot use the GPU: pip install its CUDA build", False),
    ],
)
def test_devices(
    gpus: tuple[str, ...],
    nvcc: str | None,
    build: str,
    said: str,
    ok: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("orchestrator.cli.doctor.gpu_names", lambda: gpus)
    monkeypatch.setattr("orchestrator.cli.doctor.version", lambda name: build)
    monkeypatch.setattr("shutil.which", lambda name: nvcc)
    assert (cli.main(["doctor"]) == 0) is ok
    [line] = [line for line in capsys.readouterr().out.splitlines(keepends=True) if " devices " in line]
    assert said in line
    assert line.startswith("ok " if ok else "FAIL")
