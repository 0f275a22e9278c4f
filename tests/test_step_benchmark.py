"""What a step costs: the table's sums and ratios, and that all methods can be measured side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from benchmarks import step
from benchmarks.step import (
    PHASES,
    PSD,
    Cost,
    PeakMemory,
    Size,
    chosen,
    count,
    measure,
    optimizations,
    random_models,
    table,
    verdict,
)
from psd.scenes.hash_grid import HashGridConfig

TINY = Size(
    image_size=16,
    max_tokens=32,
    text=step._transformer(32, 1, 2),
    unet={
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "attention_head_dim": (2, 4),
    },
    autoencoder={"block_out_channels": (32, 32)},
    vision=step._transformer(32, 1, 2) | {"image_size": 16, "patch_size": 8},
    reward_text=step._transformer(32, 1, 2),
)  # fmt: skip


def cost(calls: float, peak_gb: float | None = None, **milliseconds: float) -> Cost:
    return Cost(phases=dict.fromkeys(PHASES, 0.0) | milliseconds, unet_calls=calls, peak_gb=peak_gb)


@pytest.fixture
def costs() -> dict[str, Cost]:
    return {
        "SDS": cost(8, unet=60, backward=40),
        "DreamDPO": cost(16, unet=120, backward=40, decode=30, reward=10),
        PSD[0]: cost(16, unet=120, backward=40, decode=30, reward=20),
        PSD[1]: cost(18, 3.25, unet=140, backward=40, decode=30, reward=30),
    }


def test_the_floor_is_the_baseline_with_the_methods_calls(costs: dict[str, Cost]) -> None:
    assert costs["DreamDPO"].total == 200
    assert costs["DreamDPO"].floor(costs["SDS"]) == pytest.approx(1.6)  # 100 + 60 more for the UNet
    assert costs["SDS"].floor(costs["SDS"]) == 1


def test_the_table_has_a_row_for_each_method(costs: dict[str, Cost]) -> None:
    lines = table(costs, "ms").splitlines()
    assert len(lines) == 2 + len(costs)
    assert lines[3].startswith("| DreamDPO | 16 | 200 | 2.00 | 1.60 | - |")
    assert "| 18 | 240 | 2.40 | 1.75 | 3.2 |" in lines[5]


def test_psd_is_held_against_the_goals(costs: dict[str, Cost]) -> None:
    assert verdict(costs).splitlines() == [
        "- PSD, preference alone: 1.05 x DreamDPO (goal: at most 1.15), 2.10 x SDS (goal: at most 2.2): met",
        "- PSD, negative embedding every 4th step: 1.20 x DreamDPO (goal: at most 1.15), "
        "2.40 x SDS (goal: at most 2.2): not met",
    ]


def measured(scene: str, *patterns: str) -> dict[str, Cost]:
    prior, reward, image_size = random_models(TINY, "cpu", torch.float32)
    options = argparse.Namespace(scene=scene, device="cpu")
    return measure(optimizations(chosen(patterns), prior, reward, image_size, options), 4, 0, "cpu")


def test_all_methods_are_measured_side_by_side() -> None:
    found = measured("voxel_grid", "*")
    calls = {name: round(cost.unet_calls, 2) for name, cost in found.items()}
    assert list(calls.values()) == [8, 16, 8, 56, 16, 18]
    assert all(cost.total > cost.phases["unet"] > 0 for cost in found.values())


def test_some_methods_on_a_hash_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "HashGridConfig", lambda: HashGridConfig(num_levels=2, log2_table_size=8, num_samples=16))
    assert list(measured("hash_grid", "PSD, n*")) == ["SDS", "DreamDPO", PSD[1]]


def test_operations_are_counted_without_computing() -> None:
    prior, reward, image_size = random_models(TINY, "meta", torch.float32)
    found = {name: cost.phases for name, cost in count(chosen(["PSD*", "DreamR*"]), prior, reward, image_size).items()}
    sds, dreamdpo, dreamreward, plain, refining = found.values()
    assert plain == dreamdpo
    assert plain["unet"] == 2 * sds["unet"] > 0
    assert dreamreward["backward"] > sds["backward"], "through the reward, too"
    assert refining["unet"] == pytest.approx(18 / 8 * sds["unet"])
    assert 2 / 8 < refining["negative"] / sds["unet"] < 2 * 2 / 8, "a quarter of a backward pass through eight views"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no account of a process's memory")
def test_the_peak_of_memory_is_that_since_the_reset() -> None:
    memory = PeakMemory("cpu")
    memory.reset()
    before = memory.gb()
    torch.ones(2**26)  # a quarter of a gigabyte, and gone
    assert memory.gb() - before == pytest.approx(2**28 / 1e9, rel=0.2)
    memory.reset()
    assert memory.gb() - before < 0.1
