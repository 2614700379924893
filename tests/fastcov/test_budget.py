from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcov import BadInput, budget


@pytest.mark.parametrize(
    ("multiplier", "d_k", "keys"),
    [
        (10, 6400, 64_000),
        (10, 16384, 163_840),
        (10, 11008, 110_080),
        (3, 6400, 19_200),
        (0.37, 1536, 568),  # 568.32
        (2.5, 1537, 3842),  # 3842.5, to the even number
        (2.5, 1539, 3848),  # 3847.5
        (np.float32(0.5), 10, 5),
    ],
)
def test_budget_is_the_rounded_product(multiplier, d_k, keys):
    assert budget(multiplier, d_k) == keys
    assert type(budget(multiplier, d_k)) is int


@settings(deadline=None)
@given(st.floats(min_value=1e-3, max_value=1e4), st.integers(min_value=1000, max_value=50_000))
def test_budget_is_within_half_a_key(multiplier, d_k):
    assert abs(budget(multiplier, d_k) - multiplier * d_k) <= 0.5


@pytest.mark.parametrize("multiplier", [0, -1, -0.5, math.nan, math.inf, -math.inf, True, "10", None])
def test_a_multiplier_that_is_no_number_above_0_is_refused(multiplier):
    with pytest.raises(BadInput, match="multiplier"):
        budget(multiplier, 100)


def test_a_multiplier_that_rounds_to_nothing_or_overflows_is_refused():
    with pytest.raises(BadInput, match="rounds to no key"):
        budget(0.004, 100)
    with pytest.raises(BadInput, match="overflows"):
        budget(1e308, 100)


@pytest.mark.parametrize("d_k", [0, -3, 1.5, True])
def test_a_width_that_is_no_whole_number_above_0_is_refused(d_k):
    with pytest.raises(BadInput, match="d_k"):
        budget(10, d_k)


def test_a_bad_budget_is_a_value_error():
    with pytest.raises(ValueError):
        budget(0, 100)
