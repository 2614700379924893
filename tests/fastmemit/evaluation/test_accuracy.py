"""zsRE's accuracies, by hand."""

from __future__ import annotations

import pytest

from fastmemit.errors import BadData
from fastmemit.evaluation.scores import accuracy_record, summarise


def test_one_record_by_hand() -> None:
    found = accuracy_record(3, [True, False], [[True, True, False]], [[False], [True, False]])
    assert (found.case_id, found.ea) == (3, 0.5)
    assert found.pa == pytest.approx(2 / 3) and found.na == pytest.approx((0 + 1 / 2) / 2)
    whole = {"ew": 0.0, "pw": 0.0, "nw": 0.0}
    assert found.as_dict() == {"case_id": 3, "ea": found.ea, "pa": found.pa, "na": found.na, **whole}


def test_an_answer_is_said_whole_or_not() -> None:
    found = accuracy_record(3, [True, True], [[True, False], [True]], [[True], [False], [True], [True]])
    assert (found.ew, found.pw, found.nw) == (1.0, 0.5, 0.75)
    # Of a model that says half of every answer's tokens nobody hears an answer.
    half = [accuracy_record(i, [True, False], [[False, True]]) for i in range(4)]
    total = summarise(half)
    assert (total["ea"], total["ew"], total["pw"], total["nw"]) == (50.0, 0.0, 0.0, None)


def test_means_are_over_records_and_answers_not_over_tokens() -> None:
    long = accuracy_record(0, [True] * 9, [[True] * 9], [[True]])
    short = accuracy_record(1, [False], [[False]], [[True]])
    total = summarise([long, short])
    assert (total["ea"], total["pa"], total["na"]) == (50.0, 50.0, 100.0)
    assert total["a"] == pytest.approx(3 / (1 / 50 + 1 / 50 + 1 / 100))
    assert total == {"ea": 50.0, "pa": 50.0, "na": 100.0, "a": total["a"], "ew": 50.0, "pw": 50.0, "nw": 100.0}


def test_what_was_not_asked() -> None:
    bare = accuracy_record(0, [True])
    assert (bare.pa, bare.na) == (None, None)
    total = summarise([bare, accuracy_record(1, [True], [[True]], [[False]])])
    assert (total["pa"], total["na"], total["a"]) == (100.0, 0.0, 0.0)
    assert summarise([bare])["a"] is None


def test_nothing_to_judge() -> None:
    with pytest.raises(BadData, match="no record"):
        summarise([])
    with pytest.raises(BadData, match="answer to a rephrased question of case 6 has no token"):
        accuracy_record(6, [True], [[]])
