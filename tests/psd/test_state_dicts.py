"""Published files, whole, broken, and hostile."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from psd.state_dicts import fill, read_state_dict

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(())}


class Hostile:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.trace),)


def same(found: dict[str, Tensor]) -> bool:
    return found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.parametrize(
    "content",
    [TENSORS, {"state_dict": TENSORS, "epoch": 3}, {f"module.{name}": value for name, value in TENSORS.items()}],
    ids=["bare", "wrapped", "parallel"],
)
def test_pickles_in_every_wrapping(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt")
    assert same(read_state_dict(tmp_path / "a.pt"))


def test_safetensors(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    assert same(read_state_dict(tmp_path / "a.safetensors"))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="nobody says what is mapped into memory")
def test_tensors_stay_in_their_file_and_a_model_takes_them_as_they_are(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, tmp_path / "a.pt")
    tensors = read_state_dict(tmp_path / "a.pt")
    assert str(tmp_path / "a.pt") in Path("/proc/self/maps").read_text()
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    fill(model, tensors, what="a layer", checkpoint=tmp_path / "a.pt")
    assert model.weight.data_ptr() == tensors["weight"].data_ptr()
    with pytest.raises(ValueError, match=r"a\.pt does not fill a layer: .*Missing key.*bias"):
        fill(model, {"weight": tensors["weight"]}, what="a layer", checkpoint=tmp_path / "a.pt")


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": TENSORS, "extra": Hostile(tmp_path / "ran")}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt is a pickle that asks for more than tensors, so it could run code"):
        read_state_dict(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_half_downloaded_files(name: str, kept: int, tmp_path: Path) -> None:
    file = tmp_path / name
    torch.save(TENSORS, file) if file.suffix == ".pt" else save_file(TENSORS, file)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match="fetch it again"):
        read_state_dict(file)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no file .*none\.pt"):
        read_state_dict(tmp_path / "none.pt")
    (tmp_path / "lfs.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match="a pointer of Git LFS, not the weights"):
        read_state_dict(tmp_path / "lfs.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        read_state_dict(tmp_path / "list.pt")
