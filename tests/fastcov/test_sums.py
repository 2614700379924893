"""What every sum of k k^T is; see test_npz.py for each message."""

from __future__ import annotations

import torch

from fastcov.npz import not_a_sum


def test_sums_of_float32_are_sums_whatever_their_scale() -> None:
    keys = torch.randn(3000, 700) * torch.logspace(-18, 3, 700)  # squares below float32's least
    keys[:, 5] = 0
    total = torch.zeros(700, 700)
    for part in keys.split(100):
        total += part.T @ part
    assert not_a_sum(total) is None
    assert not_a_sum(total.double()) is None


def test_a_place_in_a_later_block_is_named() -> None:
    total = torch.eye(700)
    total[650, 20] = 0.5
    assert not_a_sum(total) == "it is not symmetric in row 20, column 650"
    total[650, 20] = total[20, 650] = 2
    assert not_a_sum(total) == "row 20, column 650 is larger than its diagonal allows"


def test_looking_changes_nothing() -> None:
    total = torch.tensor([[1.0, -0.5], [-0.5, 1.0]], dtype=torch.float64)
    assert not_a_sum(total) is None
    assert total.tolist() == [[1.0, -0.5], [-0.5, 1.0]]


def test_rounding_of_a_long_sum_is_no_asymmetry() -> None:
    total = torch.tensor([[1.0, 0.5], [0.5005, 1.0]])
    assert not_a_sum(total) is None
    total[1, 0] = 0.51
    assert not_a_sum(total) == "it is not symmetric in row 0, column 1"
