"""The variants of a sweep file against one of them, in pairs: at equal steps and, where it can be, at equal UNet calls.

    python -m benchmarks.ablation sweeps/ablations/methods.yaml --dry-run          what would run
    python -m benchmarks.ablation sweeps/ablations/methods.yaml --processes 2      run what is missing, then report
    python -m benchmarks.ablation sweeps/ablations/methods.yaml --report           report whatever is there

Experiment, variants, prompts and seeds are the file's; the baseline is its first variant. Variants that differ from the
baseline in nothing but the number of groups of views are what others are compared with at equal UNet calls. Writes
docs/results/NAME.md, .csv and .png, NAME being the sweep's.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.comparison import Variant
from benchmarks.comparison_runner import Benchmark, run
from orchestrator import config
from orchestrator.errors import UserError
from orchestrator.settings import difference, merge, nest

GROUPS = "cameras.num_groups"


def ablation(file: Path) -> Benchmark:
    """Raises:
    UserError: the file is no sweep of variants.
    """
    sweep = config.load(file)
    variants = sweep.config.search.variants
    if not variants:
        raise UserError("has no variants to compare", file=str(file), key="search.variants")
    changes = {name: _changes(sweep.experiment, settings) for name, settings in variants.items()}
    baseline = next(iter(variants))
    return Benchmark(
        name=sweep.config.name,
        command=f"python -m benchmarks.ablation {file}",
        title=f"Variants of {sweep.config.name}",
        introduction=_header(file.read_text(encoding="utf-8")),
        variants=[Variant(name=name, what="", settings=settings) for name, settings in changes.items()],
        baseline=baseline,
        compose=partial(config.load, file),
        prompts=sweep.config.prompts,
        num_prompts=len(sweep.config.prompts),
        seeds=sweep.config.seeds,
        references=[name for name in variants if name != baseline and _adds_groups(changes[name], changes[baseline])],
    )


def _changes(base: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a variant changes in the experiment, by dotted key; what it only repeats is left out."""
    return difference(base, merge(base, nest(settings)))


def _adds_groups(changes: Mapping[str, Any], baseline: Mapping[str, Any]) -> bool:
    return GROUPS in changes and {**changes, GROUPS: 1} == {**baseline, GROUPS: 1}


def _header(text: str) -> str:
    """A sweep file's first comment, without the commands in it, which are indented."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("#  "):
            lines.append(line.removeprefix("#").strip())
    return "\n".join(lines).strip()


def main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        print(__doc__)
        return 0 if arguments else 2
    try:
        benchmark = ablation(Path(arguments[0]))
    except UserError as error:
        print(f"benchmarks.ablation: {error}", file=sys.stderr)
        return 2
    return run(benchmark, arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
