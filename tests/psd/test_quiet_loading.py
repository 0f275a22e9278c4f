"""Loading what ships, or what training wrote, makes diffusers and transformers complain of nothing."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from diffusers import AutoencoderTiny

from psd import toybox
from psd.priors.multiview import MultiviewPrior
from psd.rewards.clip_preference import ClipPreferenceReward
from psd.toybox.train import autoencoder

CHECKPOINTS = Path(toybox.__file__).parent / "checkpoints"


@pytest.fixture
def complaints() -> Iterator[list[str]]:
    """What the libraries log at their usual level."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    listener, before = Listener(), [library.utils.logging.get_verbosity() for library in (diffusers, transformers)]
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_warning()
        library.utils.logging.add_handler(listener)
    yield said
    for library, verbosity in zip((diffusers, transformers), before, strict=True):
        library.utils.logging.remove_handler(listener)
        library.utils.logging.set_verbosity(verbosity)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_shipped_checkpoints_load_in_silence(dtype: torch.dtype, complaints: list[str]) -> None:
    MultiviewPrior.from_pretrained(CHECKPOINTS / "prior", dtype=dtype)
    ClipPreferenceReward.from_pretrained(CHECKPOINTS / "reward", dtype=dtype)
    assert complaints == []


def test_a_trained_autoencoder_is_saved_so_that_it_loads_in_silence(tmp_path: Path, complaints: list[str]) -> None:
    autoencoder.save(autoencoder.build(width=8), tmp_path)
    loaded = AutoencoderTiny.from_pretrained(tmp_path)
    assert list(loaded.config.block_out_channels) == [8, 8, 8]
    assert complaints == []
