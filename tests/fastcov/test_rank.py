from __future__ import annotations

import pytest
import torch

from fastcov.linalg import pivots_


def keys(n, d, seed=0):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rank(A):
    A = A.clone()
    return len(pivots_(A, A.diagonal().clone()))


def test_pivots_by_hand():
    A = torch.tensor([[4.0, 2.0], [2.0, 2.0]])
    # The second coordinate has 2 - 2*2/4 = 1 left of its 2.
    assert pivots_(A, A.diagonal().clone()) == pytest.approx([1.0, 0.5])
    A = torch.diag(torch.tensor([1e-9, 1.0, 1e9], dtype=torch.float64))
    assert pivots_(A, A.diagonal().clone()) == pytest.approx([1.0, 1.0, 1.0])
    A = torch.ones(3, 3)
    assert pivots_(A, A.diagonal().clone()) == pytest.approx([1.0])
    assert pivots_(torch.zeros(3, 3), torch.zeros(3)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("n", "d"),
    # Widths about the blocks' 64 among them: there an order of no choice takes noise for pivots.
    [(1, 64), (50, 200), (63, 65), (64, 65), (128, 129), (128, 200), (299, 300), (500, 300)],
)
def test_the_rank_is_the_number_of_keys_or_the_width(n, d, dtype):
    for seed in range(4):
        X = keys(n, d, seed)
        assert rank((X.T @ X / n).to(dtype)) == min(n, d)


def test_dead_and_repeated_coordinates_and_scales_do_not_mislead():
    X = keys(400, 150)
    X[:, [3, 77]] = 0
    X[:, [20, 110, 149]] = 2 * X[:, [21, 21, 5]]
    assert rank(X.T @ X) == 145
    scaled = X * torch.logspace(-9, 3, 150, dtype=torch.float64)
    assert rank(scaled.T @ scaled) == 145


def test_the_upper_triangle_is_not_read():
    X = keys(30, 90)
    A = (X.T @ X).masked_fill(torch.ones(90, 90, dtype=torch.bool).triu(1), float("nan"))
    assert rank(A) == 30


def test_of_an_indefinite_matrix_the_positive_pivots_are_counted():
    assert rank(torch.diag(torch.tensor([1.0, 1.0, -0.5]))) == 2
    assert rank(-torch.eye(3)) == 0
    assert rank(torch.tensor([[1.0, 2.0], [2.0, 1.0]])) == 1  # eigenvalues 3 and -1
    A = keys(200, 200)
    found = rank(A + A.T)  # grows where it is eliminated; it must end all the same
    assert 0 < found < 200
