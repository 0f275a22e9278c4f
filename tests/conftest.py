"""What every test stands on: shapes checked at run time, one thread, no network, fixed seeds, the gpu tier."""

from __future__ import annotations

import os
import random

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false")

import numpy as np
import pytest
import torch
from jaxtyping import install_import_hook

# Before anything imports psd. The numeric tower: an int is a good float, as in mypy.
install_import_hook("psd", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")
torch.set_num_threads(1)  # sums in another order are other numbers

EXIT_STATUS = "psd/exit_status"  # in pytest's cache: how the last session ended


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--second-chance", action="store_true",
        help="with --last-failed: refuse unless the last session ran all of its tests, and those that failed start "
        "processes, since any other failure is no accident",
    )  # fmt: skip


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if hasattr(session.config, "cache") and not hasattr(
        session.config, "workerinput"
    ):  # a worker's is not the session's
        session.config.cache.set(EXIT_STATUS, int(exitstatus))


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.getoption("--second-chance"):
        if session.config.cache.get(EXIT_STATUS, None) != pytest.ExitCode.TESTS_FAILED:
            raise pytest.UsageError("no second chance: the last session did not end with all tests run and some failed")
        accused = [item.nodeid for item in session.items if not {"processes", "cluster"} & item.keywords.keys()]
        if accused:
            raise pytest.UsageError(f"no second chance for tests that start no processes: {', '.join(accused)}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="the gpu tier needs a CUDA device, and torch sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (third parties draw from the global one)
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
