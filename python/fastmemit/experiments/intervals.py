"""How sure a score is: bootstrap intervals over records, of scores and of two cells compared.

Records are drawn with replacement, as many as there are; every score is computed anew from the draw, S as the harmonic
mean of the drawn means. The interval runs from the 2.5th to the 97.5th percentile of what the draws give (Efron, 1979).
Percentiles, and not BCa: BCa's acceleration divides by the spread of the jackknife, which is zero where every record
has the same outcome, as ES has wherever all edits succeed. A percentile is then that one value.

Two cells are compared by record: a draw takes the same cases from both, so that what makes a case easy or hard for both
cancels. Their single intervals may overlap far where the paired difference has no doubt, and the other way round.

Records are drawn one by one, whatever batch they were edited in: what the records of one batch have in common is not in
the interval.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: What a record of CounterFact is scored by, each a share of its prompts.
SHARES = ("es", "ps", "ns", "ea", "pa", "na")
#: The scores in the order in which they are shown: S beside what it is made of.
SCORES = ("es", "ps", "ns", "s", "ea", "pa", "na")
#: Harmonic means of the others: S of CounterFact, A of zsRE.
HARMONIC = {"s": ("es", "ps", "ns"), "a": ("ea", "pa", "na")}
#: What limits a share of the full precompute's quality and is no score.
PERPLEXITY = "perplexity"
LEVEL = 0.95
RESAMPLES = 5000
_BLOCK = 250  # draws that are multiplied at once: bounds the memory, changes no result

Array = NDArray[np.float64]
Records = Sequence[Mapping[str, Any]]


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


@dataclass(frozen=True)
class Kept:
    """How much of another cell's quality a cell has: the smallest of its shares.

    Attributes:
        share: 1 where nothing is worse. A draw takes the smallest of its own shares.
        by: Which score is the smallest one, or "perplexity".
    """

    share: Estimate
    by: str


def score_intervals(
    records: Records, *, when: str = "after", names: Sequence[str] = SCORES, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, Estimate | None]:
    """The scores of records, in percent, each with its interval.

    Args:
        records: The records of a cell (``schema.CellRecord``).
        when: "after" the edit or "before" it.
        names: Which scores.
        seed: Of the draws.
        resamples: How many draws.

    Returns:
        An estimate for each name; None where no record has such prompts.
    """
    value, drawn = _drawn(_shares(records, when), names, seed, resamples)
    return {name: _estimate(value[name], drawn[name]) for name in names}


def difference_intervals(
    these: Records,
    others: Records,
    *,
    whens: tuple[str, str] = ("after", "after"),
    names: Sequence[str] = SCORES,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Estimate | None]:
    """The scores of some records minus those of others, paired by case, in points.

    Args:
        these: Records of one cell.
        others: Records of another, or the same ones at another time.
        whens: "after" the edit or "before" it, of these and of the others.
        names: Which scores.
        seed: Of the draws.
        resamples: How many draws.

    Returns:
        An estimate for each name, above 0 where these are better; None where there is none: no case that both have, or
        a score that one of them lacks.
    """
    pair = _paired(these, others, whens)
    if pair is None:
        return dict.fromkeys(names)
    (value, drawn), (other, drawn_other) = (_drawn(each, names, seed, resamples) for each in pair)
    return {name: _estimate(value[name] - other[name], drawn[name] - drawn_other[name]) for name in names}


def kept_share(
    fast: Records,
    full: Records,
    perplexities: tuple[float, float] | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Kept | None:
    """The smallest share of another cell's scores and perplexity, paired by case.

    ES, PS, NS, EA, PA and NA are divided by the other cell's, and the other cell's perplexity by this one's. S is not
    among them: three of these are what it is made of. The smallest of several noisy shares lies below the smallest of
    the true ones, so where nothing is lost at all this is a little below 1.

    Args:
        fast: The records of the cell with few preserved keys.
        full: The records of the cell of the full precompute.
        perplexities: Of the first cell and of the second, where both were measured.
        seed: Of the draws.
        resamples: How many draws.

    Returns:
        The share; None where there is none: no case that both have, or no score above zero.
    """
    pair = _paired(fast, full, ("after", "after"))
    if pair is None:
        return None
    (value, drawn), (other, drawn_other) = (_drawn(each, SHARES, seed, resamples) for each in pair)
    shares = {name: _divide(value[name], other[name]) for name in SHARES}
    draws = [_divide(drawn[name], drawn_other[name]) for name in SHARES]
    if perplexities is not None:
        cost = _perplexity_share(*perplexities)
        shares[PERPLEXITY] = np.float64(cost)
        draws.append(np.full(resamples, cost))
    known = {name: float(share) for name, share in shares.items() if not np.isnan(share)}
    if not known:
        return None
    by = min(known, key=lambda name: known[name])
    with warnings.catch_warnings():  # of a draw in which there is no share at all
        warnings.simplefilter("ignore", RuntimeWarning)
        found = _estimate(np.float64(known[by]), np.nanmin(np.stack(draws), axis=0))
    return None if found is None else Kept(found, by)


def _perplexity_share(this: float, full: float) -> float:
    """1 where nothing is lost; NaN where both are without bound."""
    if math.isinf(this):
        return math.nan if math.isinf(full) else 0.0
    return full / this


def _paired(these: Records, others: Records, whens: tuple[str, str]) -> list[Array] | None:
    """The shares of the cases that both have, in the same order."""
    sides = [{record["case_id"]: record for record in side} for side in (these, others)]
    common = sorted(sides[0].keys() & sides[1].keys())
    if not common:
        return None
    return [_shares([side[case] for case in common], when) for side, when in zip(sides, whens, strict=True)]


def _shares(records: Records, when: str) -> Array:
    """(n, len(SHARES)): the shares of each record; NaN where it has none."""
    rows = [[record[when].get(name) for name in SHARES] for record in records]
    return np.array([[np.nan if share is None else share for share in row] for row in rows])


def _drawn(
    shares: Array, names: Sequence[str], seed: int, resamples: int
) -> tuple[dict[str, np.float64], dict[str, Array]]:
    """Each score of the records as they are, and (draws,) of every draw, in percent."""
    value = _scores(_means(shares, np.ones((1, len(shares)))), names)
    drawn = _scores(_resampled_means(shares, seed, resamples), names)
    return {name: column[0] for name, column in value.items()}, drawn


def _scores(means: Array, names: Sequence[str]) -> dict[str, Array]:
    """The columns of (draws, len(SHARES)) by name, and harmonic means of them, in percent."""
    columns = dict(zip(SHARES, 100 * means.T, strict=True))
    for name in names:
        if name in HARMONIC:
            parts = np.stack([columns[part] for part in HARMONIC[name]])
            with np.errstate(divide="ignore"):
                # 1 / 0 = inf, and 3 / inf = 0: the limit
                columns[name] = len(parts) / np.sum(1 / parts, axis=0)
    return {name: columns[name] for name in names}


def _means(shares: Array, weights: Array) -> Array:
    """(draws, k): weighted means over the records that have a share; NaN where none was drawn."""
    present = ~np.isnan(shares)
    totals = weights @ np.where(present, shares, 0.0)  # (draws, n) (n, k)
    counts = weights @ present.astype(np.float64)
    return np.divide(totals, counts, out=np.full_like(totals, np.nan), where=counts > 0)


def _divide(one: Any, other: Any) -> Any:
    """A share of another score; NaN where that one is zero or does not exist."""
    return np.divide(one, other, out=np.full_like(one, np.nan), where=np.greater(other, 0))


def _resampled_means(shares: Array, seed: int, resamples: int) -> Array:
    counts = _draws(len(shares), seed, resamples)
    return np.concatenate(
        [_means(shares, counts[start : start + _BLOCK].astype(np.float64)) for start in range(0, resamples, _BLOCK)]
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


def _estimate(value: np.float64, drawn: Array) -> Estimate | None:
    drawn = drawn[~np.isnan(drawn)]
    if np.isnan(value) or not drawn.size:
        return None
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Estimate(float(value), float(low), float(high))
