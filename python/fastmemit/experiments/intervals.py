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

from fastmemit.evaluation.scores import HARMONIC, SCORES, SHARES

#: What limits a share of the full precompute's quality and is no score.
PERPLEXITY = "perplexity"
#: n-gram entropy, which alone is not in percent.
ENTROPY = "ge"
LEVEL = 0.95
RESAMPLES = 5000
_BLOCK = 250  # draws that are multiplied at once: bounds the memory, changes no result

Array = NDArray[np.float64]
Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Estimate:
    """A value of the records as they are, and the two ends of its interval, in the unit of the value."""

    value: float
    low: float
    high: float


def score_intervals(
    records: Records, *, when: str = "after", names: Sequence[str] = SCORES, resamples: int = RESAMPLES
) -> dict[str, Estimate | None]:
    """The scores of records "after" the edit or "before" it; None where there are no such prompts.

    A name is one of `SCORES`, or of what else a record has: em, pm, nm, as, a, ge, rs. All are in percent but ge, which
    is in bits.
    """
    drawn = _drawn(_values(records, when, _parts(names)), names, resamples)
    return {name: _estimate(each) for name, each in drawn.items()}


def difference_intervals(
    these: Records,
    others: Records,
    *,
    whens: tuple[str, str] = ("after", "after"),
    names: Sequence[str] = SCORES,
    resamples: int = RESAMPLES,
) -> dict[str, Estimate | None]:
    """The scores of some records minus those of others, paired by case, in points.

    `whens` says of which time these and the others are taken. An estimate is above 0 where these are better, and None
    where there is none: no case that both have, or a score that one of them lacks.
    """
    pair = _paired(these, others, whens, _parts(names))
    if pair is None:
        return dict.fromkeys(names)
    one, other = (_drawn(values, names, resamples) for values in pair)
    return {name: _estimate(one[name] - other[name]) for name in names}


def kept_share(
    fast: Records, full: Records, perplexities: tuple[float, float] | None = None, *, resamples: int = RESAMPLES
) -> tuple[Estimate, str] | None:
    """The smallest share of another cell's scores and perplexity, paired by case, and which score or perplexity it is.

    It is 1 where nothing is worse, and a draw takes the smallest of its own shares. ES, PS, NS, EA, PA and NA are
    divided by the other cell's, and the other cell's perplexity by this one's. S is not among them: three of these are
    what it is made of. The smallest of several noisy shares lies below the smallest of the true ones, so where nothing
    is lost at all this is a little below 1. `perplexities` are the first cell's and the second's, where both were
    measured. There is no share without a case that both have and a score above zero.
    """
    pair = _paired(fast, full, ("after", "after"), SHARES)
    if pair is None:
        return None
    one, other = (_drawn(values, SHARES, resamples) for values in pair)
    # A share is NaN where the other's score is zero or does not exist.
    shares = {
        name: np.divide(one[name], other[name], out=np.full(resamples + 1, np.nan), where=other[name] > 0)
        for name in SHARES
    }
    if perplexities is not None:
        this, best = perplexities
        cost = best / this if math.isfinite(this) else (math.nan if math.isinf(best) else 0.0)
        shares[PERPLEXITY] = np.full(resamples + 1, cost)
    known = {name: drawn for name, drawn in shares.items() if not np.isnan(drawn[0])}
    if not known:
        return None
    with warnings.catch_warnings():  # of a draw in which there is no share at all
        warnings.simplefilter("ignore", RuntimeWarning)
        found = _estimate(np.nanmin(np.stack(list(shares.values())), axis=0))
    return None if found is None else (found, min(known, key=lambda name: float(known[name][0])))


def _paired(these: Records, others: Records, whens: tuple[str, str], parts: Sequence[str]) -> list[Array] | None:
    """The values of the cases that both have, in the same order."""
    sides = [{record["case_id"]: record for record in side} for side in (these, others)]
    common = sorted(sides[0].keys() & sides[1].keys())
    if not common:
        return None
    return [_values([side[case] for case in common], when, parts) for side, when in zip(sides, whens, strict=True)]


def _parts(names: Sequence[str]) -> tuple[str, ...]:
    """What these scores are made of."""
    return tuple(dict.fromkeys(part for name in names for part in HARMONIC.get(name, (name,))))


def _values(records: Records, when: str, parts: Sequence[str]) -> Array:
    """(n, len(parts)): the values of each record, a share of 1 or bits; NaN where it has none."""
    rows = []
    for record in records:
        found = record[when]
        found = {**found, **found.get("generation", {})}
        rows.append([np.nan if found.get(name) is None else found[name] for name in parts])
    return np.array(rows).reshape(len(rows), len(parts))


def _drawn(values: Array, names: Sequence[str], resamples: int) -> dict[str, Array]:
    """(1 + draws,) of each score: of the records as they are, then of every draw."""
    present = ~np.isnan(values)
    counts = _draws(len(values), resamples)
    blocks = [np.ones((1, len(values)), np.uint16), *np.split(counts, range(_BLOCK, resamples, _BLOCK))]
    means = []
    for weights in (block.astype(np.float64) for block in blocks):
        totals = weights @ np.where(present, values, 0.0)  # (draws, n) (n, k)
        drawn = weights @ present.astype(np.float64)
        means.append(np.divide(totals, drawn, out=np.full_like(totals, np.nan), where=drawn > 0))
    columns = {
        name: (1 if name == ENTROPY else 100) * column
        for name, column in zip(_parts(names), np.concatenate(means).T, strict=True)
    }
    for name in names:
        if name in HARMONIC:
            parts = np.stack([columns[part] for part in HARMONIC[name]])
            with np.errstate(divide="ignore"):  # 1 / 0 = inf, and 3 / inf = 0: the limit
                columns[name] = len(parts) / np.sum(1 / parts, axis=0)
    return {name: columns[name] for name in names}


# The cells of a sweep have few different numbers of records, and equal draws make pairs.
@functools.lru_cache(maxsize=4)
def _draws(n: int, resamples: int) -> NDArray[np.uint16]:
    """(resamples, n): how often each record was drawn."""
    generator = np.random.default_rng(0)
    counts = np.empty((resamples, n), np.uint16)
    for start in range(0, resamples, _BLOCK):
        size = min(_BLOCK, resamples - start)
        picked = generator.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        counts[start : start + size] = np.bincount(picked.ravel(), minlength=size * n).reshape(size, n)
    return counts


def _estimate(drawn: Array) -> Estimate | None:
    value, draws = drawn[0], drawn[1:][~np.isnan(drawn[1:])]
    if np.isnan(value) or not draws.size:
        return None
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Estimate(float(value), float(low), float(high))
