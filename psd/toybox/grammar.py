"""The scene grammar: which sentences the built-in world understands, and which objects they describe.

    prompt := object | object "on" object
    object := "a" colour shape | "a" colour "and" colour "striped" shape

Plain Python, so that a sweep file can be checked without loading torch.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.10, 0.10),
    "orange": (1.00, 0.52, 0.04),
    "yellow": (0.97, 0.90, 0.12),
    "green": (0.12, 0.62, 0.16),
    "cyan": (0.10, 0.82, 0.86),
    "blue": (0.10, 0.22, 0.86),
    "purple": (0.50, 0.12, 0.70),
    "pink": (1.00, 0.52, 0.76),
}
SHAPES = ("sphere", "cube", "cylinder", "cone", "torus", "diamond")
BASES = ("cube", "cylinder")  # what another object can stand on
BACKGROUNDS: dict[str, float] = {"white background": 0.95, "grey background": 0.5, "black background": 0.05}


@dataclass(frozen=True, kw_only=True)
class Solid:
    """One object; ``stripe`` is its second colour, if it has one. The two colours stand in alphabetical order."""

    shape: str
    color: str
    stripe: str | None = None

    def __str__(self) -> str:
        paint = self.color if self.stripe is None else f"{self.color} and {self.stripe} striped"
        return f"{'an' if paint[0] in 'aeiou' else 'a'} {paint} {self.shape}"


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a prompt describes: an object, and what it stands on."""

    top: Solid
    base: Solid | None = None

    def __str__(self) -> str:
        return str(self.top) if self.base is None else f"{self.top} on {self.base}"

    @property
    def kind(self) -> str:
        if self.base is not None:
            return "stacked"
        return "plain" if self.top.stripe is None else "striped"


_OBJECT = r"an? (?P<color{0}>\w+)(?: and (?P<stripe{0}>\w+) striped)? (?P<shape{0}>\w+)"
_PROMPT = re.compile(_OBJECT.format(0) + "(?: on " + _OBJECT.format(1) + ")?")


def parse(prompt: str) -> Description:
    """The description that a prompt stands for.

    Raises:
        ValueError: the prompt is outside the grammar; says what the grammar knows.
    """
    match = _PROMPT.fullmatch(" ".join(prompt.lower().split()).rstrip("."))
    if match is None:
        raise ValueError(f'the built-in world cannot read the prompt "{prompt}"; {_KNOWN}')
    solids = [_solid(prompt, match, index) for index in (0, 1) if match[f"shape{index}"]]
    if len(solids) == 2 and solids[1].shape not in BASES:
        raise ValueError(f'in "{prompt}" nothing can stand on a {solids[1].shape}; choose one of {", ".join(BASES)}')
    if len(solids) == 2 and any(solid.stripe for solid in solids):
        raise ValueError(f'in "{prompt}" stacked objects cannot be striped; {_KNOWN}')
    return Description(top=solids[0], base=solids[1] if len(solids) == 2 else None)


def _solid(prompt: str, match: re.Match[str], index: int) -> Solid:
    shape, color, stripe = (match[f"{name}{index}"] for name in ("shape", "color", "stripe"))
    for word, known in ((shape, SHAPES), (color, COLORS), (stripe, COLORS)):
        if word is not None and word not in known:
            raise ValueError(f'the built-in world does not know "{word}" in "{prompt}"; {_KNOWN}')
    if color == stripe:
        raise ValueError(f'the stripes in "{prompt}" need two different colours')
    if stripe is not None:
        color, stripe = sorted((color, stripe))
    return Solid(shape=shape, color=color, stripe=stripe)


_KNOWN = (
    'it knows "a COLOUR SHAPE", "a COLOUR and COLOUR striped SHAPE" and "a COLOUR SHAPE on a COLOUR BASE" with '
    f"COLOUR in {', '.join(COLORS)}; SHAPE in {', '.join(SHAPES)}; BASE in {', '.join(BASES)}"
)


def descriptions() -> Iterator[Description]:
    """Every description of the grammar, once."""
    for shape, color in itertools.product(SHAPES, COLORS):
        yield Description(top=Solid(shape=shape, color=color))
        for stripe in COLORS:
            if stripe > color:
                yield Description(top=Solid(shape=shape, color=color, stripe=stripe))
        for base, base_color in itertools.product(BASES, COLORS):
            if base_color != color:
                yield Description(top=Solid(shape=shape, color=color), base=Solid(shape=base, color=base_color))


def is_held_out(description: Description) -> bool:
    """Whether the combination is kept from all training."""
    return str(description) in _held_out_sentences()


@cache
def _held_out_sentences() -> frozenset[str]:
    """One in eight of each kind of sentence, in the order of their hashes: the same on every machine."""
    by_kind: dict[str, list[str]] = {}
    for description in descriptions():
        by_kind.setdefault(description.kind, []).append(str(description))
    ranked = (sorted(group, key=lambda s: hashlib.sha256(s.encode()).digest()) for group in by_kind.values())
    return frozenset(sentence for group in ranked for sentence in group[: len(group) // 8])


def held_out(num_prompts: int, kinds: tuple[str, ...] = ("plain", "striped", "stacked")) -> list[Description]:
    """``num_prompts`` held-out descriptions, kinds in turn, always the same ones."""
    by_kind = {kind: [d for d in descriptions() if d.kind == kind and is_held_out(d)] for kind in kinds}
    for group in by_kind.values():
        random.Random(0).shuffle(group)
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*by_kind.values()))
    return list(itertools.islice((d for d in in_turn if d is not None), num_prompts))
