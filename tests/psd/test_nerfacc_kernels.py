"""Where nerfacc's kernels cannot be had, a warning says why, and hash grids are rendered all the same."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from psd.scenes.nerfacc_kernels import has_kernels
from psd.scenes.volume_rendering import render_field
from tests.psd.fields import Fog, views
from tests.psd.test_hash_grid import rough_grid

GPU = torch.device("cuda")
BACKEND = "nerfacc.cuda._backend"


@pytest.fixture(autouse=True)
def nothing_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    has_kernels.cache_clear()
    yield
    has_kernels.cache_clear()


def test_on_a_cpu_nobody_looks_for_them(tmp_path: Path) -> None:
    assert not has_kernels(torch.device("cpu"))
    assert list(tmp_path.iterdir()) == []


def test_compiled_ones_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, BACKEND, SimpleNamespace(_C=object()))
    assert has_kernels(GPU)


def test_the_build_finds_what_pip_installed_beside_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Building:
        def __getattr__(self, name: str) -> object:
            return shutil.which("tool")

    (tmp_path / "tool").touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setitem(sys.modules, BACKEND, Building())
    assert has_kernels(GPU)
    assert shutil.which("tool") is None


def test_without_a_toolkit_a_warning_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, BACKEND, SimpleNamespace(_C=None))
    with pytest.warns(UserWarning, match=r"there is no CUDA toolkit \(nvcc\); hash grids are marched through in torch"):
        assert not has_kernels(GPU)
    assert not has_kernels(GPU)


def test_a_build_that_fails_is_told_with_its_first_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __getattr__(self, name: str) -> object:
            raise RuntimeError("Ninja is required to load C++ extensions\nand more")

    monkeypatch.setitem(sys.modules, BACKEND, Broken())
    with pytest.warns(UserWarning, match=r"cannot be had: Ninja is required to load C\+\+ extensions; hash grids"):
        assert not has_kernels(GPU)


def test_without_them_only_samples_that_count_are_asked_for_their_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, too: which samples are occupied has been waited for."""

    class Counting(Fog):
        asked = 0

        def color(self, points: torch.Tensor) -> torch.Tensor:
            type(self).asked += len(points)
            return super().color(points)

    monkeypatch.setattr("psd.scenes.volume_rendering.picks_samples", lambda device: False)
    cameras = views(0.0, size=8)
    render_field(Counting(20.0), cameras, torch.ones(3), num_samples=32, occupancy=rough_grid().occupancy)
    assert 0 < Counting.asked < 8 * 8 * 32 / 2
