"""The walls stand: imports go one way, no drawers, no long functions, shapes are checked."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

from psd.cameras import Cameras

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for package in ("psd", "orchestrator") for path in (ROOT / package).rglob("*.py"))
DRAWERS = {"utils", "util", "helpers", "helper", "misc", "common"}
MAX_FUNCTION_LINES = 59


def functions_longer_than(max_lines: int, source: str) -> list[str]:
    nodes = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    lengths = {node: (node.end_lineno or node.lineno) - node.lineno + 1 for node in nodes}
    return [f"{node.name}: {length} lines" for node, length in lengths.items() if length > max_lines]


def test_import_contracts_hold():
    """In a process of its own: it configures logging, and switches off the loggers that are there."""
    program = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_logo=True))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_module_is_a_drawer():
    assert SOURCES
    assert [str(path) for path in SOURCES if path.stem in DRAWERS or path.parent.name in DRAWERS] == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_stay_short(path):
    assert functions_longer_than(MAX_FUNCTION_LINES, path.read_text()) == []


def test_function_length_counts_the_signature_and_the_last_line():
    source = "def f(\n    a,\n):\n    b = a\n    return b\n"
    assert functions_longer_than(5, source) == []
    assert functions_longer_than(4, source) == ["f: 5 lines"]


def test_every_package_has_an_init_so_that_it_is_installed():
    folders = {path.parent for path in SOURCES}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_shapes_are_checked_at_run_time():
    with pytest.raises(TypeCheckError, match="fov_deg"):
        Cameras(c2w=torch.eye(4).repeat(2, 1, 1), fov_deg=torch.tensor([40.0]), height=4, width=4)
