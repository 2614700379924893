from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fastmemit.evaluation.scores import SCORES
from fastmemit.experiments.intervals import Estimate, difference_intervals, kept_share, score_intervals
from tiny_sweeps import cell, record


def test_the_value_is_the_score_of_the_records() -> None:
    found = cell(multiplier=1.5, size=(4, 10))
    after = score_intervals(found["records"])
    before = score_intervals(found["records"], when="before")
    for estimates, scores in ((after, found["scores"]), (before, found["before"])):
        for name, estimate in estimates.items():
            assert estimate is not None
            assert estimate.value == pytest.approx(scores[name], abs=1e-9)  # type: ignore[literal-required]  # a name of the loop is one of its keys
            assert estimate.low <= estimate.value <= estimate.high


def test_intervals_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    records = cell(multiplier=1.2, size=(20, 10))["records"]
    shares = np.array([[r["after"][name] for name in ("es", "ps", "ns")] for r in records])

    def s(es: np.ndarray, ps: np.ndarray, ns: np.ndarray, axis: int = -1) -> np.ndarray:
        return 300 / sum(1 / x.mean(axis=axis) for x in (es, ps, ns))

    theirs = stats.bootstrap(
        tuple(shares.T), s, paired=True, vectorized=True, n_resamples=5000, method="percentile"
    ).confidence_interval
    ours = score_intervals(records)["s"]
    assert ours is not None
    # Two sets of draws: the ends differ by what chance makes of a percentile of 5,000 values, about
    # 0.04 of the standard deviation each; the interval is 3.9 of those long.
    chance = 4 * 0.04 * math.sqrt(2) * (ours.high - ours.low) / 3.9
    assert abs(ours.low - theirs.low) < chance
    assert abs(ours.high - theirs.high) < chance
    assert ours.high - ours.low > 1


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        outcomes = generator.binomial(1, 0.6, size=100).astype(float)
        es = score_intervals([record(i, e) for i, e in enumerate(outcomes)], resamples=500)["es"]
        assert es is not None
        hits += es.low <= 60 <= es.high
    # 190 are expected, with a standard deviation of 3; a 90 % interval would give 180, a 99 % 198.
    assert 181 <= hits <= 197


def test_records_that_all_agree_have_an_interval_of_no_length() -> None:
    found = score_intervals([record(i, 1.0, 1.0, 0.5) for i in range(8)])
    assert found["es"] == Estimate(100.0, 100.0, 100.0)
    assert found["s"] == Estimate(75.0, 75.0, 75.0)
    assert score_intervals([record(0, 0.0)])["s"] == Estimate(0.0, 0.0, 0.0)


def test_a_score_that_no_record_has_is_none_and_others_are_not() -> None:
    found = score_intervals([record(i, i % 2, None, 0.9) for i in range(10)])
    assert found["ps"] is None and found["s"] is None
    assert found["ns"] is not None and found["ns"].value == pytest.approx(90)


def test_a_mean_is_over_the_records_that_have_the_prompts() -> None:
    found = score_intervals([record(0, 1, 1.0), record(1, 1, None), record(2, 1, 0.5)])
    assert found["ps"] is not None and found["ps"].value == pytest.approx(75)
    # Draws without any paraphrase are left out, so no end is NaN.
    assert found["s"] is not None and not math.isnan(found["s"].low + found["s"].high)


def test_the_draws_are_the_same_each_time() -> None:
    records = cell(multiplier=1.2)["records"]
    assert score_intervals(records) == score_intervals(records)


def test_exact_matches_are_scored_as_the_others_and_are_no_part_of_s() -> None:
    records = [record(i, 1.0, 1.0, 0.5, ea=i % 2, pa=0.25, na=0.0) for i in range(4)]
    found = score_intervals(records)
    assert list(found) == ["es", "ps", "ns", "s", "ea", "pa", "na"]
    assert found["s"] == Estimate(75.0, 75.0, 75.0)
    assert found["ea"] is not None and found["ea"].value == 50 and found["ea"].low == 0
    assert found["pa"] == Estimate(25.0, 25.0, 25.0) and found["na"] == Estimate(0.0, 0.0, 0.0)
    assert score_intervals([record(0, 1.0)])["ea"] is None, "they were not always recorded"


def test_the_accuracies_of_zsre_have_their_own_mean() -> None:
    records = [{"after": {"ea": 1.0, "pa": 0.5, "na": 0.25}}] * 3
    found = score_intervals(records, names=("ea", "a"))
    assert found == {"ea": Estimate(100.0, 100.0, 100.0), "a": Estimate(300 / 7, 300 / 7, 300 / 7)}


def test_entropies_are_in_bits_and_what_else_a_record_has_is_in_percent() -> None:
    records = [
        {**record(i, 1.0), "after": {"em": em, "generation": {"ge": ge, "rs": rs, "texts": []}}}
        for i, (em, ge, rs) in enumerate([(0.2, 6.0, 0.25), (-0.1, 5.0, None), (0.5, 7.0, 0.75)])
    ]
    found = score_intervals(records, names=("em", "ge", "rs"))
    assert [round(each.value, 9) for each in found.values() if each] == [20.0, 6.0, 50.0]
    entropy = found["ge"]
    assert entropy is not None and 5.0 <= entropy.low < 6.0 < entropy.high <= 7.0
    assert score_intervals([record(0, 1.0)], names=("ge", "rs")) == {"ge": None, "rs": None}


def test_a_difference_is_paired_by_case() -> None:
    full = [record(i, i % 2, 1.0, 1.0) for i in range(40)]
    same = difference_intervals(full, full[::-1])
    assert same["es"] == Estimate(0.0, 0.0, 0.0), "equal in every case: no difference, no doubt"
    assert same["ea"] is None
    # The same means from other cases: no difference either, and not certain.
    crossed = difference_intervals([record(i, 1 - i % 2) for i in range(40)], full)["es"]
    assert crossed is not None and crossed.value == pytest.approx(0)
    assert crossed.low < -20 and crossed.high > 20
    # Every case is worse by a tenth: certain, though both scores have wide intervals.
    worse = [record(i, 1.0, 1.0, (i % 2) * 0.9) for i in range(40)]
    better = [record(i, 1.0, 1.0, (i % 2) * 0.9 + 0.1) for i in range(40)]
    found = difference_intervals(worse, better)["ns"]
    assert found is not None
    assert (found.low, found.value, found.high) == pytest.approx((-10, -10, -10))


def test_a_difference_is_of_the_cases_that_both_have() -> None:
    fast = [record(i, 1.0, 1.0, 0.5) for i in range(5)]
    full = [record(i, 1.0, 1.0, 1.0 if i < 5 else 0.1) for i in range(9)]
    found = difference_intervals(fast, full)
    assert found["ns"] == Estimate(-50.0, -50.0, -50.0)
    assert found["s"] == Estimate(-25.0, -25.0, -25.0)
    assert difference_intervals(fast, full[5:]) == dict.fromkeys(SCORES)


def test_after_minus_before() -> None:
    records = [record(i, 1.0) for i in range(3)]
    found = difference_intervals(records, records, whens=("after", "before"), names=("es",))
    assert found == {"es": Estimate(50.0, 50.0, 50.0)}


def _kept(fast: list, full: list, *more: Any) -> tuple[float, float, float, str]:
    found = kept_share(fast, full, *more)
    assert found is not None
    share, by = found
    return share.low, share.value, share.high, by


def test_what_is_kept_is_the_smallest_share() -> None:
    full = [record(i, 1.0, 1.0, 0.8, ea=1.0, pa=0.5, na=0.1) for i in range(8)]
    # S falls by 3 %, PA by 40 %.
    fast = [record(i, 1.0, 1.0, 0.76, ea=1.0, pa=0.3, na=0.1) for i in range(8)]
    assert _kept(fast, full) == pytest.approx((0.6, 0.6, 0.6, "pa"))
    assert _kept(full, full) == (1.0, 1.0, 1.0, "es")
    assert _kept(fast, full, (40.0, 20.0)) == pytest.approx((0.5, 0.5, 0.5, "perplexity"))
    assert _kept(fast, full, (21.0, 20.0)) == pytest.approx((0.6, 0.6, 0.6, "pa"))
    assert _kept(fast, full, (math.inf, 20.0)) == (0.0, 0.0, 0.0, "perplexity")


def test_a_broken_model_that_has_half_of_s_has_nothing_left() -> None:
    full = [record(i, 1.0, 1.0, 0.75, ea=1.0, pa=0.6, na=0.1) for i in range(10)]
    coin = [record(i, i % 2, 0.5, 0.5, ea=0.0, pa=0.0, na=0.0) for i in range(10)]
    s, s_full = score_intervals(coin)["s"], score_intervals(full)["s"]
    assert s is not None and s_full is not None and s.value / s_full.value > 0.55
    assert _kept(coin, full)[1] == 0.0


def test_a_draw_takes_the_smallest_of_its_own_shares() -> None:
    # One of ES and PS is lost in each half of the records, so a draw rarely halves both alike.
    full = [record(i, 1.0, 1.0) for i in range(20)]
    fast = [record(i, i % 2, 1 - i % 2) for i in range(20)]
    low, value, high, by = _kept(fast, full)
    assert (value, by) == (0.5, "es")
    assert low < 0.4 and high == 0.5, "the smaller of two that add up to one is at most half"


def test_a_score_that_the_full_precompute_has_not_is_left_out() -> None:
    full = [record(i, 1.0, None, 0.5, ea=0.0) for i in range(4)]
    fast = [record(i, 0.5, 1.0, 0.5, ea=1.0) for i in range(4)]
    assert _kept(fast, full) == (0.5, 0.5, 0.5, "es")


@pytest.mark.parametrize(
    ("fast", "full"),
    [([record(0, 1.0)], [record(1, 1.0)]), ([record(0, 1.0)], [record(0, 0.0, 0.0, 0.0)])],
    ids=["no common case", "nothing above zero"],
)
def test_there_is_no_share(fast: list, full: list) -> None:
    assert kept_share(fast, full) is None
