"""A table as text for a paper or a page: Markdown and LaTeX."""

from __future__ import annotations

import re
from collections.abc import Sequence

from orchestrator.report.tables import Column

_NUMERIC = re.compile(r"[-+.,\d\se\[\]]*\d[-+.,\d\se\[\]]*")
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    character: f"\\{character}" for character in "&%$#_{}"
}


def markdown(columns: Sequence[Column]) -> str:
    lines = [[column.header for column in columns], ["---", *["---:"] * (len(columns) - 1)], *_rows(columns)]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def latex(columns: Sequence[Column]) -> str:
    """A tabular with the rules of the package booktabs."""
    table = [[column.header for column in columns], *_rows(columns)]
    header, *body = [f"{' & '.join(map(_latex_cell, line))} \\\\" for line in table]
    lines = [rf"\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}", r"\toprule", header, r"\midrule", *body]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _rows(columns: Sequence[Column]) -> list[tuple[str, ...]]:
    return list(zip(*(column.cells for column in columns), strict=True))


def _latex_cell(text: str) -> str:
    if _NUMERIC.fullmatch(text):
        return f"${text}$"  # for the minus
    return "".join(_LATEX.get(character, character) for character in text)
