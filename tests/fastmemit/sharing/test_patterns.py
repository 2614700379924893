"""The patterns of adapters, against the expression that PEFT builds of them."""

from __future__ import annotations

import random
import re

import pytest

from fastmemit.sharing.adapter import Patterns

NAME = "model.layers.1.mlp.down_proj"


def fits(pattern: str, name: str = NAME) -> bool:
    return Patterns([pattern]).first(name) == 0


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("down_proj", True),
        ("mlp.down_proj", True),
        ("mlp_down_proj", False),
        ("own_proj", False),
        ("down_pro", False),
        (NAME, True),
        (r"^model\.layers\.1\.mlp\.down_proj", True),
        (r"^layers\.1\.mlp\.down_proj", False),
        (r"layers\.[0-3]\.mlp\.(down|up)_proj$", True),
        (r"layers\.[^0-3]\.mlp\.(down|up)_proj$", False),
        (r"layers\.\d+\.mlp\.\w+", True),
        (r".*\.down_proj", True),
        (r"(?:attn|mlp)?\.?down_proj", True),
        ("", False),
        ("x|down_proj|y", True),
    ],
)
def test_what_fits_by_hand(pattern: str, expected: bool) -> None:
    assert fits(pattern) is expected


def test_drawn_patterns_fit_where_pefts_expression_does() -> None:
    draw = random.Random(0)
    atoms = ("a", "b", ".", r"\.", r"\w", r"\d", "1", "[ab]", "[^a.]", "(a|b1)", "(a|)", "(?:b|.)?")
    hits = 0
    for _ in range(4000):
        pattern = "".join(
            draw.choice(("", "", "", "", "^", "|")) + draw.choice(atoms) + end
            for _ in range(draw.randrange(1, 5))
            if (end := draw.choice(("", "", "*", "+", "?", "+?"))) is not None
        )
        if re.search(r"\)\??[*+?]", pattern):
            continue
        name = "".join(draw.choice("ab1.") for _ in range(draw.randrange(7)))
        expected = re.match(rf"(.*\.)?({pattern})$", name) is not None
        assert fits(pattern, name) is expected, (pattern, name)
        hits += expected
    assert 300 < hits < 3000


def test_the_first_that_fits_counts() -> None:
    found = Patterns(["up_proj", "mlp.*", "down_proj"])
    assert [found.first(n) for n in (NAME, "x.up_proj", "x.down_proj", "x")] == [1, 0, 2, None]


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        (".?" * 40 + "!", NAME),
        ("(.|.)" * 40 + "!", NAME),
        (".*" * 30 + "!", "a" * 4000),
        ("(a|a|a)?" * 100 + "$", "a" * 300),
        (".*.*.*!", "a" * 4000),
        ("[a]*" * 1000 + "b", "a" * 1000),
    ],
)
def test_what_others_search_for_ever_is_answered(pattern: str, name: str) -> None:
    """With backtracking none of these ends in this machine's life, or in a test's."""
    assert Patterns([pattern]).first(name) is None


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+b", "(", ")", "a)", "a**", "a{3}", "{", "(?=a)", "(?P<x>a)", "[", "[z-a]", r"\1", "\\",
     r"\bx", "*a", "+", "(a)*", "(" * 30 + ")" * 30, "a" * 100_001],
)  # fmt: skip
def test_what_is_more_is_refused_with_the_pattern(pattern: str) -> None:
    with pytest.raises(ValueError, match="pattern") as refused:
        Patterns(["fine", pattern])
    assert len(str(refused.value)) < 100
