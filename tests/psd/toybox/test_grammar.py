from __future__ import annotations

import pytest

from psd.scenes.backgrounds import FLAT_LEVELS
from psd.toybox import grammar
from psd.toybox.grammar import Description, Solid, parse


def test_every_description_is_read_back_from_its_sentence() -> None:
    for description in grammar.descriptions():
        assert parse(str(description)) == description


def test_counts_of_the_grammar() -> None:
    kinds = [d.kind for d in grammar.descriptions()]
    assert kinds.count("plain") == 6 * 8
    assert kinds.count("striped") == 6 * 8 * 7 // 2  # the order of the two colours does not count
    assert kinds.count("stacked") == 6 * 8 * 2 * 7
    assert len(set(grammar.descriptions())) == len(kinds)


def test_stripes_are_the_same_in_either_order() -> None:
    expected = Description(top=Solid(shape="cone", color="blue", stripe="orange"))
    assert parse("a blue and orange striped cone") == expected
    assert parse("An orange and blue  striped cone.") == expected


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a red dog", '"dog"'),
        ("a mauve cube", '"mauve"'),
        ("hello", "a COLOUR SHAPE"),
        ("", "a COLOUR SHAPE"),
        ("a red cube on a red torus", "nothing can stand on a torus"),
        ("a red and red striped cube", "two different colours"),
        ("a red and blue striped cube on a green cube", "cannot be striped"),
        ("a red cube, white background", "a COLOUR SHAPE"),
    ],
)
def test_what_is_outside_the_grammar_is_refused_with_what_is_inside(prompt: str, said: str) -> None:
    with pytest.raises(ValueError, match=r"\S") as error:
        parse(prompt)
    assert said in str(error.value)


def test_held_out_sentences_are_an_eighth_of_each_kind_and_fixed() -> None:
    held_out = [d for d in grammar.descriptions() if grammar.is_held_out(d)]
    kinds = [d.kind for d in held_out]
    assert (kinds.count("plain"), kinds.count("striped"), kinds.count("stacked")) == (6, 21, 84)
    assert [str(d) for d in grammar.held_out(3)] == [
        "a cyan diamond",
        "a blue and green striped cone",
        "a red sphere on a blue cube",
    ]
    assert all(grammar.is_held_out(d) for d in grammar.held_out(32))


def test_the_worlds_backgrounds_are_those_that_scenes_are_put_on() -> None:
    assert grammar.BACKGROUNDS == FLAT_LEVELS
