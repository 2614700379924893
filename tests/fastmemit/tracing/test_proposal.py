"""Which layers are proposed for which effects."""

from __future__ import annotations

import numpy as np
import pytest

from fastmemit.tracing_report import propose


def effects(means: list[float], spread: float = 0.01, facts: int = 50) -> np.ndarray:
    """Facts that differ by `spread`, with exactly these averages."""
    noise = np.random.default_rng(0).normal(size=(facts, len(means)))
    return np.array(means) + spread * (noise - noise.mean(0))


@pytest.mark.parametrize(
    ("means", "peak", "layers"),
    [
        ([0.0, 0.3, 0.6, 1.0, 0.6, 0.1], 3, (2, 3)),  # 0.3 is less than half
        ([0.0, 0.5, 0.5, 0.5, 0.6, 0.6, 0.8, 1.0, 0.9], 7, (3, 4, 5, 6, 7)),  # five at most
        ([1.0, 0.9, 0.8], 0, (0,)),  # a peak at the first layer
        ([0.9, 0.95, 1.0, 0.2], 2, (0, 1, 2)),  # down to the first layer
        ([0.9, 0.1, 1.0], 2, (2,)),  # a gap ends the range
        ([-0.9, -0.2, 0.4], 2, (2,)),
    ],
)
def test_the_range_ends_at_the_peak(means: list[float], peak: int, layers: tuple[int, ...]) -> None:
    found = propose(effects(means))
    assert found is not None
    assert (found.peak, found.layers) == (peak, layers)
    assert found.low <= peak <= found.high


def test_an_uncertain_peak_has_a_wide_interval() -> None:
    flat = propose(effects([0.0, 1.0, 1.0001, 1.0, 0.0], spread=0.5))
    sharp = propose(effects([0.0, 0.1, 1.0, 0.1, 0.0], spread=0.1))
    assert flat is not None and (flat.low, flat.high) == (1, 3)
    assert sharp is not None and (sharp.low, sharp.high) == (2, 2)


def test_nothing_is_proposed_where_nothing_was_found() -> None:
    assert propose(effects([-0.1, -0.2, -0.1])) is None
    assert propose(effects([0.0, 0.0, 0.0])) is None
    assert propose(effects([0.1, 0.5, 0.1])[:1]) is None


def test_chance_among_many_layers_is_no_finding() -> None:
    """Of 200 traces of 40 layers without any effect at most 5 % may propose layers."""
    draw = np.random.default_rng(0)
    proposed = [propose(draw.normal(size=(100, 40))) is not None for _ in range(200)]
    assert np.mean(proposed) <= 0.05 + 3 * (0.05 * 0.95 / 200) ** 0.5
