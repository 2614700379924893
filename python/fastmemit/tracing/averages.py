"""Averages over facts with bootstrap intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Average:
    """An averaged effect per layer.

    Attributes:
        count: How many facts were averaged.
        mean: Per layer the average over facts.
        low: Per layer the lower end of the 95 % interval; None for a single fact.
        high: Per layer its upper end; None for a single fact.
    """

    count: int
    mean: NDArray[np.float64]
    low: NDArray[np.float64] | None
    high: NDArray[np.float64] | None


def average(effects: NDArray[np.float64], seed: int = 0) -> Average:
    """The average over facts with its percentile bootstrap interval.

    Facts are drawn with replacement, all layers of a fact together; noise samples are not drawn again, so the interval
    is about other facts of the same kind.

    Args:
        effects: (facts, layers).
        seed: Of the draws.
    """
    count, mean = len(effects), effects.mean(0)
    if count < 2:
        return Average(count, mean, None, None)
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(resampled(effects, seed), [tail, 100 - tail], axis=0)
    return Average(count, mean, low, high)


def resampled(effects: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Averages of bootstrap samples of the facts, (RESAMPLES, layers)."""
    count = len(effects)
    draws = np.random.default_rng(seed).multinomial(count, [1 / count] * count, size=RESAMPLES)
    return draws @ effects / count
