from __future__ import annotations

import math

import numpy as np
import pytest

from fastmemit.experiments.intervals import Estimate, ratio_interval, score_intervals
from fastmemit.metrics.score import harmonic_mean
from tiny_sweeps import cell, record


def test_the_value_is_the_score_of_the_records() -> None:
    found = cell(multiplier=1.5, size=(4, 10))
    after = score_intervals(found["records"])
    before = score_intervals(found["records"], when="before")
    for estimates, scores in ((after, found["scores"]), (before, found["before"])):
        for name, estimate in estimates.items():
            assert estimate is not None
            assert estimate.value == pytest.approx(scores[name], abs=1e-9)  # type: ignore[literal-required]
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


def test_the_seed_decides_on_the_draws() -> None:
    records = cell(multiplier=1.2)["records"]
    assert score_intervals(records) == score_intervals(records)
    assert score_intervals(records) != score_intervals(records, seed=1)


def test_a_ratio_is_paired_by_case() -> None:
    full = [record(i, i % 2, 1.0, 1.0) for i in range(40)]
    same = ratio_interval(full, full[::-1])
    assert same == Estimate(1.0, 1.0, 1.0), (
        "the same outcome in every case is a ratio without doubt"
    )
    # The same means from other cases: the ratio is 1 again, and not certain.
    other = [record(i, 1 - i % 2, 1.0, 1.0) for i in range(40)]
    crossed = ratio_interval(other, full)
    assert crossed is not None and crossed.value == pytest.approx(1)
    assert crossed.low < 0.9 and crossed.high > 1.1


def test_a_ratio_is_of_the_cases_that_both_have() -> None:
    fast = [record(i, 1.0, 1.0, 0.5) for i in range(5)]
    full = [record(i, 1.0, 1.0, 1.0 if i < 5 else 0.1) for i in range(9)]
    found = ratio_interval(fast, full)
    assert found is not None and found.value == pytest.approx(harmonic_mean([1, 1, 0.5]))


def test_a_draw_whose_full_s_is_zero_has_no_ratio() -> None:
    fast = [record(0, 1.0), record(1, 1.0)]
    full = [record(0, 1.0), record(1, 0.0)]  # a quarter of the draws takes the second one twice
    found = ratio_interval(fast, full)
    assert found is not None
    assert (found.low, found.value, found.high) == pytest.approx((1, 4 / 3, 4 / 3))


@pytest.mark.parametrize(
    ("fast", "full"),
    [
        ([record(0, 1.0)], [record(1, 1.0)]),
        ([record(0, 1.0)], [record(0, 0.0)]),
        ([record(0, 1.0, None)], [record(0, 1.0)]),
        ([record(0, 1.0)], [record(0, 1.0, None)]),
    ],
    ids=["no common case", "a full S of zero", "no fast S", "no full S"],
)
def test_there_is_no_ratio(fast: list, full: list) -> None:
    assert ratio_interval(fast, full) is None
