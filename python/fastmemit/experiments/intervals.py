"""How sure a score is: bootstrap intervals over records, of scores and of fast against full.

Records are drawn with replacement, as many as there are; every score is computed anew from the
draw, S as the harmonic mean of the drawn means. The interval runs from the 2.5th to the 97.5th
percentile of what the draws give (Efron, 1979). Percentiles, and not BCa: BCa's acceleration
divides by the spread of the jackknife, which is zero where every record has the same outcome, as
ES has wherever all edits succeed. A percentile is then that one value.

Records are drawn one by one, whatever batch they were edited in: what the records of one batch have
in common is not in the interval.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SCORES = ("es", "ps", "ns", "s")
LEVEL = 0.95
RESAMPLES = 5000
_BLOCK = 250  # draws that are multiplied at once: bounds the memory, changes no result

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value and its interval, in the unit of the value.

    Attributes:
        value: Of the records as they are.
        low: Lower end of the interval.
        high: Upper end.
    """

    value: float
    low: float
    high: float


def score_intervals(
    records: Sequence[Mapping[str, Any]],
    *,
    when: str = "after",
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Estimate | None]:
    """ES, PS, NS and S of a cell's records, in percent, each with its interval.

    Args:
        records: The records of a cell (``schema.CellRecord``).
        when: "after" the edit or "before" it.
        seed: Of the draws.
        resamples: How many draws.

    Returns:
        An estimate for each of "es", "ps", "ns" and "s"; None where no record has such prompts.
    """
    shares = _shares(records, when)
    value = _scores(_means(shares, np.ones((1, len(shares)))))[0]
    drawn = _scores(_resampled_means(shares, seed, resamples))
    return {
        name: _estimate(100 * value[column], 100 * drawn[:, column])
        for column, name in enumerate(SCORES)
    }


def ratio_interval(
    fast: Sequence[Mapping[str, Any]],
    full: Sequence[Mapping[str, Any]],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate | None:
    """S of one cell divided by S of another, paired: a draw takes the same records from both.

    Only cases that both cells have are used. Draws in which the full S is zero have no ratio and
    are left out.

    Args:
        fast: The records of the cell with few preserved keys.
        full: The records of the cell of the full precompute.
        seed: Of the draws.
        resamples: How many draws.

    Returns:
        The ratio, 1 where both are as good; None where there is none: no common case, a score that
        does not exist, or a full S of zero.
    """
    left = {record["case_id"]: record for record in fast}
    right = {record["case_id"]: record for record in full}
    common = sorted(left.keys() & right.keys())
    if not common:
        return None
    pair = [_shares([side[case] for case in common], "after") for side in (left, right)]
    weights = np.ones((1, len(common)))
    values = [_scores(_means(shares, weights))[0, 3] for shares in pair]
    if not values[1] > 0:  # NaN, where a score does not exist, is not either
        return None
    drawn = [_scores(_resampled_means(shares, seed, resamples))[:, 3] for shares in pair]
    has_ratio = drawn[1] > 0
    return _estimate(values[0] / values[1], drawn[0][has_ratio] / drawn[1][has_ratio])


def _shares(records: Sequence[Mapping[str, Any]], when: str) -> Array:
    """(n, 3): es, ps, ns of each record; NaN where it has none."""
    rows = [[record[when].get(name) for name in SCORES[:3]] for record in records]
    return np.array([[np.nan if share is None else share for share in row] for row in rows])


def _means(shares: Array, weights: Array) -> Array:
    """(draws, 3): weighted means over the records that have a share; NaN where none was drawn."""
    present = ~np.isnan(shares)
    totals = weights @ np.where(present, shares, 0.0)  # (draws, n) (n, 3)
    counts = weights @ present.astype(np.float64)
    return np.divide(totals, counts, out=np.full_like(totals, np.nan), where=counts > 0)


def _scores(means: Array) -> Array:
    """(draws, 4): the means and their harmonic mean, which is zero where one of them is."""
    with np.errstate(divide="ignore"):
        harmonic = 3 / np.sum(1 / means, axis=1)  # 1 / 0 = inf, and 3 / inf = 0: the limit
    return np.column_stack([means, harmonic])


def _resampled_means(shares: Array, seed: int, resamples: int) -> Array:
    counts = _draws(len(shares), seed, resamples)
    return np.concatenate(
        [
            _means(shares, counts[start : start + _BLOCK].astype(np.float64))
            for start in range(0, resamples, _BLOCK)
        ]
    )


# The cells of a sweep have few different numbers of records, and equal draws make pairs.
@functools.lru_cache(maxsize=4)
def _draws(n: int, seed: int, resamples: int) -> NDArray[np.uint16]:
    """(resamples, n): how often each record was drawn."""
    generator = np.random.default_rng(seed)
    counts = np.empty((resamples, n), np.uint16)
    for start in range(0, resamples, _BLOCK):
        size = min(_BLOCK, resamples - start)
        picked = generator.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        flat = np.bincount(picked.ravel(), minlength=size * n)
        counts[start : start + size] = flat.reshape(size, n)
    return counts


def _estimate(value: float, drawn: Array) -> Estimate | None:
    drawn = drawn[~np.isnan(drawn)]
    if np.isnan(value) or not drawn.size:
        return None
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Estimate(float(value), float(low), float(high))
