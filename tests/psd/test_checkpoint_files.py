"""Where checkpoints are, and files that are not what they seem."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from psd.checkpoint_files import check_folder, check_weights, file_of_tensor, find_folder

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"x": torch.zeros(1000)}, tmp_path / WEIGHTS)
    return tmp_path


def test_whole_weights_are_taken(folder: Path) -> None:
    assert check_weights(folder, WEIGHTS) is None


def test_half_precision_files_are_taken_where_there_are_no_others(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model.fp16.safetensors")
    assert check_weights(folder, WEIGHTS) == "fp16"


def test_the_file_of_a_tensor(folder: Path) -> None:
    assert file_of_tensor(folder, WEIGHTS, "x") == folder / WEIGHTS
    (folder / WEIGHTS).rename(folder / "model-00002-of-00002.safetensors")
    (folder / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"x": "model-00002-of-00002.safetensors"}}')
    assert file_of_tensor(folder, WEIGHTS, "x") == folder / "model-00002-of-00002.safetensors"
    (folder / f"{WEIGHTS}.index.json").rename(folder / f"{WEIGHTS}.index.fp16.json")
    assert file_of_tensor(folder, WEIGHTS, "x") == folder / "model-00002-of-00002.safetensors"


@pytest.mark.parametrize("size", [0, 5, 20, 4000])
def test_a_download_that_broke_off_is_told(folder: Path, size: int) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=rf"model.safetensors is not whole: {size:,} of [\d,]+ bytes; fetch it again"):
        check_weights(folder, WEIGHTS)


def test_a_pointer_of_git_lfs_is_told(folder: Path) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4000\n")
    with pytest.raises(ValueError, match="is a pointer of Git LFS, not the weights: run `git lfs pull`"):
        check_weights(folder, WEIGHTS)


def test_another_format_under_this_name_is_told(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((4).to_bytes(8, "little") + b"PK\x03\x04 and so on")
    with pytest.raises(ValueError, match="is no safetensors file"):
        check_weights(folder, WEIGHTS)


def test_a_missing_shard_is_told(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    names = {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ValueError, match=r"no whole weights: model-00002-of-00002.safetensors is missing"):
        check_weights(folder, WEIGHTS)
    save_file({"y": torch.zeros(1)}, folder / "model-00002-of-00002.safetensors")
    assert check_weights(folder, WEIGHTS) is None


def test_an_id_is_found_in_the_hugging_face_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert find_folder("someone/model") == Path("someone/model")
    with pytest.raises(ValueError, match="neither a folder nor a model of the Hugging Face cache"):
        check_folder(find_folder("someone/model"), kind="prior")

    repository = tmp_path / "cache" / "models--someone--model"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert find_folder("someone/model") == repository / "snapshots" / "abc"

    (tmp_path / "someone" / "model").mkdir(parents=True)  # what is here goes before what is in the cache
    assert find_folder("someone/model") == Path("someone/model")
