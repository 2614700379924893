"""Means of what is there."""

from __future__ import annotations

import pytest

from fastmemit.evaluation.scores import harmonic_mean, mean


def test_mean() -> None:
    assert mean([1.0, 2.0, 6.0]) == 3.0
    assert mean([]) is None


def test_harmonic_mean() -> None:
    assert harmonic_mean([1.0, 1.0, 0.6]) == pytest.approx(3 / (1 + 1 + 1 / 0.6))
    assert harmonic_mean([0.5]) == 0.5
    assert harmonic_mean([0.0, 1.0]) == 0.0
    assert harmonic_mean([0.0, None]) is None
