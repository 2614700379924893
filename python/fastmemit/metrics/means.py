"""Means as the scores need them: of what is there, and None where nothing is."""

from __future__ import annotations

import math
from collections.abc import Sequence


def mean(values: Sequence[float]) -> float | None:
    """The arithmetic mean; None of nothing."""
    return math.fsum(values) / len(values) if values else None


def harmonic_mean(values: Sequence[float | None]) -> float | None:
    """``n / sum(1 / value)`` of values >= 0.

    Returns:
        0 if one of them is 0, which is the limit; None if one of them is None.
    """
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    if any(value == 0 for value in known):
        return 0.0
    return len(known) / math.fsum(1 / value for value in known)


def percent(share: float | None) -> float | None:
    """A share as percent."""
    return None if share is None else 100 * share
