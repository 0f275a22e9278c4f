"""What a hash grid's encoding costs: nanoseconds a point, forward and with its gradient, beside the floor of its bytes.

python -m benchmarks.hash_grid                 # the built-in world's small grid, and MVDream's, on one thread
python -m benchmarks.hash_grid --device cuda

The floor is what the memory takes that must be moved for a point: of each level eight entries of the table, read once
forward, read and written once backward, at the rate at which this machine copies a large tensor.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from psd.scenes.hash_grid import HashEncoding, HashGridConfig

GRIDS = {
    "built-in world": HashGridConfig(num_levels=6, log2_table_size=14, base_resolution=6, level_scale=1.5),
    "MVDream": HashGridConfig(),
}
REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=2**15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console()
    console.print(f"torch {torch.__version__}, {options.device}, {options.threads} threads, {platform.processor()}")
    console.print(report(options.points, options.device))


def report(num_points: int, device: str) -> Table:
    table = Table(title=f"Nanoseconds a point, {num_points} points")
    for column in ("grid", "forward", "floor", "forward and backward", "floor"):
        table.add_column(column, justify="left" if column == "grid" else "right")
    byte_ns = nanoseconds_per_byte(device)
    for name, config in GRIDS.items():
        encoding = HashEncoding(config).to(device)
        points = torch.rand(num_points, 3, device=device)
        outer = torch.randn(num_points, encoding.num_features, device=device)

        def forward(encoding: HashEncoding = encoding, points: torch.Tensor = points) -> torch.Tensor:
            return encoding(points)

        def both(run: Callable[[], torch.Tensor] = forward, outer: torch.Tensor = outer) -> None:
            run().backward(outer)

        entries_bytes = 8 * 4 * encoding.num_features
        seconds = [fastest(run, device) / num_points * 1e9 for run in (forward, both)]
        floors = [entries_bytes * byte_ns, 3 * entries_bytes * byte_ns]
        table.add_row(name, *(f"{value:.0f}" for pair in zip(seconds, floors, strict=True) for value in pair))
    return table


def nanoseconds_per_byte(device: str) -> float:
    """Of a copy, which reads and writes."""
    large = torch.ones(2**24, device=device)
    return fastest(large.clone, device) / (2 * 4 * len(large)) * 1e9


def fastest(run: Callable[[], object], device: str) -> float:
    """The least seconds of several repeats, after one to warm up: a busy machine only ever adds."""
    times = []
    for _ in range(1 + REPEATS):
        started_s = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started_s)
    return min(times[1:])


if __name__ == "__main__":
    main()
