"""The scores, against numbers worked out by hand and against the formulas written literally."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastmemit.errors import BadData
from fastmemit.evaluation.scores import NllPair, score_record, summarise


def test_one_record_by_hand() -> None:
    score = score_record(
        7,
        (1.0, 2.0),  # new is cheaper: success
        [(1.0, 2.0), (3.0, 2.0)],  # one of two
        [(5.0, 1.0), (5.0, 1.0), (5.0, 1.0), (0.5, 1.0)],  # true is cheaper in three of four
    )
    assert (score.case_id, score.es, score.ps, score.ns) == (7, 1.0, 0.5, 0.75)
    assert score.rewrite == NllPair(new=1.0, true=2.0)
    assert score.neighbourhood[3] == NllPair(new=0.5, true=1.0)


def test_a_tie_is_a_failure_on_every_side() -> None:
    score = score_record(0, (1.0, 1.0), [(1.0, 1.0)], [(1.0, 1.0)])
    assert (score.es, score.ps, score.ns) == (0.0, 0.0, 0.0)


def test_an_infinite_cost_loses_and_becomes_null_in_json() -> None:
    score = score_record(0, (1.0, math.inf), [(math.inf, 1.0)], [(math.inf, 1.0)])
    assert (score.es, score.ps, score.ns) == (1.0, 0.0, 1.0)
    assert json.loads(json.dumps(score.as_dict(), allow_nan=False))["nll"]["rewrite"] == [1.0, None]


def test_means_are_over_records_not_over_prompts() -> None:
    many = score_record(0, (1, 2), [(1, 2)] * 9, [(2, 1)] * 9)  # 1, 1, 1
    few = score_record(1, (2, 1), [(2, 1)], [(1, 2), (2, 1)])  # 0, 0, 1/2
    scores = summarise([many, few])
    assert (scores["es"], scores["ps"], scores["ns"]) == (50.0, 50.0, 75.0)
    assert scores["s"] == pytest.approx(3 / (1 / 50 + 1 / 50 + 1 / 75), rel=1e-12)  # 56.25
    assert scores["s"] == pytest.approx(56.25)


def test_records_without_paraphrases_do_not_count_in_ps() -> None:
    with_them = score_record(0, (1, 2), [(1, 2)], [(2, 1)])
    without = score_record(1, (1, 2), [], [(1, 2)])
    scores = summarise([with_them, without])
    assert without.ps is None
    assert (scores["ps"], scores["ns"]) == (100.0, 50.0)


def test_a_score_of_parts_is_not_s() -> None:
    found = summarise([score_record(0, (1, 2), [(1, 2)])])
    assert (found["es"], found["ps"], found["ns"], found["s"]) == (100.0, 100.0, None, None)
    assert [found[name] for name in ("nm", "ea", "pa", "na", "as")] == [None] * 5
    assert found["em"] == found["pm"] == pytest.approx(100 * (math.exp(-1) - math.exp(-2)))


def test_s_is_zero_when_one_part_is() -> None:
    assert summarise([score_record(0, (2, 1), [(1, 2)], [(2, 1)])])["s"] == 0.0


def test_printed_harmonic_mean() -> None:
    """Scores of 100, 100 and 60 are 81.8 together."""
    records = [score_record(i, (1, 2), [(1, 2)], [(2, 1)] * 6 + [(1, 2)] * 4) for i in range(5)]
    assert summarise(records)["s"] == pytest.approx(81.818, abs=1e-3)


@pytest.mark.parametrize(
    ("costs", "named"),
    [
        (((math.nan, 1.0), [], []), "target_new at the rewrite prompt of case 12"),
        (((1.0, 1.0), [(1.0, 1.0), (1.0, math.nan)], []), "target_true at paraphrase 1 of case 12"),
        (((1.0, 1.0), [], [(math.nan, 1.0)]), "target_new at neighbourhood prompt 0 of case 12"),
    ],
)
def test_nan_is_refused_by_name(costs: tuple, named: str) -> None:
    with pytest.raises(BadData, match=named):
        score_record(12, *costs)


def test_nothing_to_average() -> None:
    with pytest.raises(BadData, match="no record"):
        summarise([])


HALF, QUARTER, EIGHTH = (math.log(n) for n in (2, 4, 8))  # costs of p = 1/2, 1/4, 1/8


def test_magnitudes_by_hand() -> None:
    score = score_record(3, (HALF, QUARTER), [(HALF, EIGHTH), (EIGHTH, QUARTER)], [(QUARTER, HALF), (HALF, HALF)])
    assert score.shares()["em"] == pytest.approx(1 / 4)
    assert score.shares()["pm"] == pytest.approx((3 / 8 - 1 / 8) / 2)
    assert score.shares()["nm"] == pytest.approx((1 / 4 + 0) / 2)
    other = score_record(4, (QUARTER, HALF))
    assert (other.shares()["em"], other.shares()["pm"], other.shares()["nm"]) == (pytest.approx(-1 / 4), None, None)
    total = summarise([score, other])
    assert (total["em"], total["pm"], total["nm"]) == pytest.approx((0.0, 12.5, 12.5))


def test_a_cost_without_bound_has_no_probability() -> None:
    assert score_record(0, (math.inf, HALF)).shares()["em"] == pytest.approx(-0.5)


def test_exact_match_by_hand() -> None:
    new, true = (1.0, 2.0), (2.0, 1.0)
    nearby = [(*true, True), *[(*true, False)] * 3]
    score = score_record(1, (*new, True), [(*new, True), (*new, False)], nearby)
    assert (score.shares()["ea"], score.shares()["pa"], score.shares()["na"]) == (1.0, 0.5, 0.25)
    none = score_record(2, (*new, False))
    total = summarise([score, none])
    assert (total["ea"], total["pa"], total["na"]) == (50.0, 50.0, 25.0)
    unknown = score_record(3, new, [new] * 2, [true] * 4)
    assert (unknown.shares()["ea"], unknown.shares()["pa"], unknown.shares()["na"]) == (None, None, None)
    assert summarise([score, unknown])["ea"] == 100.0


def test_attribute_prompts_are_a_score_of_their_own() -> None:
    score = score_record(0, (1, 2), attributes=[(1, 2), (2, 1), (1, 1), (0, 3)])
    assert score.shares()["as"] == 0.5 and score.ps is None
    assert summarise([score, score_record(1, (1, 2))])["as"] == 50.0
    with pytest.raises(BadData, match="target_new at attribute prompt 1 of case 8"):
        score_record(8, (1, 2), attributes=[(1, 2), (math.nan, 1)])


def test_every_score_has_its_place_in_json() -> None:
    score = score_record(7, (1, 2, True), [(1, 2, False)], [(2, 1, True)], attributes=[(1, 3)])
    found = json.loads(json.dumps(score.as_dict(), allow_nan=False))
    names = ["es", "ps", "ns", "em", "pm", "nm", "ea", "pa", "na", "as"]
    assert list(found) == ["case_id", *names, "nll"]
    assert [found[name] for name in names] == list(score.shares().values())
    assert found["nll"]["attributes"] == [[1, 3]]
    assert list(summarise([score])) == ["es", "ps", "ns", "s", *names[3:]]


PAIRS = st.tuples(st.integers(0, 3), st.integers(0, 3))  # few values, so that ties are frequent


@given(
    st.lists(
        st.tuples(PAIRS, st.lists(PAIRS, min_size=1, max_size=3), st.lists(PAIRS, min_size=1)), min_size=1, max_size=6
    )
)
def test_against_the_literal_formula(cases: list) -> None:
    es = ps = ns = 0.0
    for (new, true), paraphrases, neighbours in cases:
        es += (new < true) / len(cases)
        ps += sum(n < t for n, t in paraphrases) / len(paraphrases) / len(cases)
        ns += sum(t < n for n, t in neighbours) / len(neighbours) / len(cases)
    s = 3 / (1 / es + 1 / ps + 1 / ns) if es and ps and ns else 0.0
    found = summarise(score_record(i, *case) for i, case in enumerate(cases))
    values = [found["es"], found["ps"], found["ns"], found["s"]]
    assert values == pytest.approx([100 * x for x in (es, ps, ns, s)])
