"""Averages over facts and their intervals."""

from __future__ import annotations

import numpy as np
import pytest

from fastmemit.tracing_report import average


def test_the_average_of_one_fact_has_no_interval() -> None:
    found = average(np.array([[0.25, -0.5]]))
    assert (found["facts"], found["low"], found["high"]) == (1, None, None)
    assert found["mean"] == [0.25, -0.5]


def test_equal_facts_leave_no_doubt() -> None:
    found = average(np.array([[0.25, -0.5]] * 7))
    for ends in (found["mean"], found["low"], found["high"]):
        np.testing.assert_allclose(ends, [0.25, -0.5], rtol=1e-12)


def test_the_interval_agrees_with_the_normal_one() -> None:
    draw = np.random.default_rng(1)
    effects = draw.normal([0.0, 1.0], [1.0, 3.0], size=(400, 2))
    found = average(effects)
    half = 1.96 * effects.std(0, ddof=1) / 400**0.5
    np.testing.assert_allclose(found["low"], effects.mean(0) - half, atol=0.1 * half.max())
    np.testing.assert_allclose(found["high"], effects.mean(0) + half, atol=0.1 * half.max())


def test_the_seed_decides() -> None:
    effects = np.random.default_rng(1).normal(size=(20, 3))
    one, same, other = average(effects, 3), average(effects, 3), average(effects, 4)
    assert one["low"] == same["low"] and one["low"] != other["low"]


def test_the_interval_covers_what_it_says() -> None:
    """About 95 of 100 intervals hold the true mean; 0.95 less 4 standard errors at least."""
    draw = np.random.default_rng(0)
    hits = []
    for seed in range(100):
        found = average(draw.normal(2.0, 1.0, size=(60, 1)), seed)
        assert found["low"] is not None and found["high"] is not None
        hits.append(found["low"][0] <= 2.0 <= found["high"][0])
    assert np.mean(hits) == pytest.approx(0.95, abs=4 * (0.95 * 0.05 / 100) ** 0.5)
