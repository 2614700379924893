"""Facts on record, and whether two edits write the same one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from fastmemit.delta import Delta
from fastmemit.errors import BadData, BadRequest
from fastmemit.sharing import compose
from fastmemit.sharing.composition import check_facts, facts_of, listed_texts
from tiny_editors import FACTS


def made(requests: Any, seed: int = 0, **about: Any) -> Delta:
    left = torch.full((2, 1), float(seed))
    return Delta({"w": (left, torch.ones(3, 1))}, {"requests": requests, **about})


def test_what_is_on_record_is_read_and_nothing_is_nothing() -> None:
    assert facts_of(made([dataclasses.asdict(fact) for fact in FACTS])) == list(FACTS)
    assert facts_of(Delta({})) == []


@pytest.mark.parametrize(
    ("requests", "words"), [("text", "are no list but 'text'"), ([3], "Request 0"), ([{"prompt": "x"}], "Request 0")]
)
def test_facts_that_cannot_be_read(requests: Any, words: str) -> None:
    with pytest.raises(BadData, match=words):
        facts_of(made(requests))
    with pytest.raises(BadData, match=words):
        compose([made(requests), made([], 1)])


def test_texts_in_a_list() -> None:
    assert listed_texts(made([], on_top_of=["a", 3, "b"]), "on_top_of") == ["a", "b"]
    assert listed_texts(made([], on_top_of=7), "on_top_of") == []


def test_a_later_edit_may_repeat_what_it_was_computed_on() -> None:
    facts = [dataclasses.asdict(FACTS[0])]
    first = made(facts, 1)
    check_facts([first, made(facts, 2, on_top_of=[first.digest()])])
    with pytest.raises(BadRequest, match="Edits 1 and 2 both write"):
        check_facts([first, made(facts, 2, on_top_of=["0" * 64])])
