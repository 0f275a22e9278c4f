"""Checkpoint folders of diffusers and transformers: where they are, what must be in them, and errors that say what is
missing.

Loads no torch, so that a slip is told before anything starts.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

Model = TypeVar("Model")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_LFS_POINTER = b"version https://git-lfs"
_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",))  # one of these makes a tokenizer


def find_folder(path: str) -> Path:
    """The local folder of a path, or of a model that the Hugging Face cache holds under this id.

    Never asks the network. Where neither is there, the path as it is.
    """
    folder = Path(path).expanduser()
    if folder.exists() or not _HUB_ID.fullmatch(path):
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, local_files_only=True))
    except LocalEntryNotFoundError:
        return folder


def read_json(path: Path, *, kind: str) -> dict[str, Any]:
    """A JSON object from a checkpoint folder; ``kind`` says in errors what the folder should have been.

    Raises:
        ValueError: the file is missing or not JSON.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent} is no {kind}: {path.name} is missing")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} should hold a JSON object, got {type(content).__name__}")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def check_folder(folder: Path, *, kind: str) -> None:
    if folder.is_dir():
        return
    if folder.exists():
        raise ValueError(f"no {kind} at {folder}: it is a file; `psd convert` makes folders of some published files")
    may_be_cached = _HUB_ID.fullmatch(str(folder)) is not None
    fact = "neither a folder nor a model of the Hugging Face cache" if may_be_cached else "no such folder"
    raise ValueError(f"no {kind} at {folder}: {fact}")


def check_tokenizer(folder: Path, *, kind: str) -> None:
    """Raises:
    ValueError: its settings or its vocabulary are missing; ``kind`` says what the folder should have been.
    """
    read_json(folder / "tokenizer_config.json", kind=kind)
    if not any(all((folder / name).is_file() for name in names) for names in _VOCABULARIES):
        listed = ", or ".join(" with ".join(names) for names in _VOCABULARIES)
        raise ValueError(f"{folder} is no {kind}: the tokenizer's vocabulary is missing, which is {listed}")


def check_weights(folder: Path, filename: str) -> str | None:
    """The variant of the weights that is there: None for the plain one, ``fp16`` where only that was fetched.

    Only safetensors count as weights: a pickle could run any code.

    Raises:
        ValueError: there are none, or a file of them is not whole.
    """
    for variant, file, index in _variants(folder, filename):
        if file.is_file():
            check_file(file)
            return variant
        if index.is_file():
            for shard in sorted(set(read_json(index, kind="index of weights").get("weight_map", {}).values())):
                if not (folder / str(shard)).is_file():
                    raise ValueError(f"{folder} has no whole weights: {shard} is missing; fetch it again")
                check_file(folder / str(shard))
            return variant
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    found = f" (there is {pickles[0]}, a pickle: save it again with safe_serialization=True)" if pickles else ""
    raise ValueError(f"{folder} has no weights: {filename} is missing{found}")


def file_of_tensor(folder: Path, filename: str, name: str) -> Path:
    """Which file of the weights that ``check_weights`` finds holds a tensor."""
    found = check_weights(folder, filename)
    file, index = next((file, index) for variant, file, index in _variants(folder, filename) if variant == found)
    return file if file.is_file() else folder / read_json(index, kind="index of weights")["weight_map"][name]


def _variants(folder: Path, filename: str) -> tuple[tuple[str | None, Path, Path], ...]:
    """The names that weights may have: of a variant, in one file or, of several files, the index."""
    stem = filename.removesuffix(".safetensors")
    return (
        (None, folder / filename, folder / f"{filename}.index.json"),
        ("fp16", folder / f"{stem}.fp16.safetensors", folder / f"{stem}.safetensors.index.fp16.json"),
    )


def load_model(load: Callable[[], tuple[Model, dict[str, Any]]], folder: Path) -> Model:
    """Runs a ``from_pretrained`` with loading info; a checkpoint that does not fill the whole model is an error."""
    try:
        model, info = load()
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        lines = " ".join(" ".join(str(error).split("\n")[:2]).split())
        reason = re.split(r"\. (?=[A-Z])", lines)[0]  # the rest is advice to who calls from_pretrained
        raise ValueError(f"the weights in {folder} cannot be read: {reason}") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"the weights in {folder} lack {len(missing)} of the model's parameters, such as {missing[0]}")
    return model


def check_file(path: Path) -> None:
    """A published file of tensors, as far as it can be judged without reading them.

    Raises:
        ValueError: it is missing, a pointer of Git LFS, or its end is missing.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    with path.open("rb") as stream:
        start = stream.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        raise ValueError(f"{path} is a pointer of Git LFS, not the weights: run `git lfs pull` there")
    if path.suffix == ".safetensors":
        _check_whole(path)
    elif not start or (start.startswith(b"PK") and not zipfile.is_zipfile(path)):  # its table of contents is the end
        raise ValueError(f"{path} is damaged or not whole: {path.stat().st_size:,} bytes; fetch it again")


def _check_whole(file: Path) -> None:
    """A safetensors file says in its header how long it is; a download that broke off is shorter."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        expected = 8 + header_size
        if size >= expected > 8:
            try:
                header = json.loads(stream.read(header_size))
                expected += max((item["data_offsets"][1] for key, item in header.items() if key != "__metadata__"))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{file} is no safetensors file: {error}") from error
    if size < expected or size <= 8:
        raise ValueError(f"{file} is not whole: {size:,} of {expected:,} bytes; fetch it again")
