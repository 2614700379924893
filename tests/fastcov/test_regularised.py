"""A = weight * C + ridge * I: what is added, of what is shrunk, from a mean or from a sum."""

from __future__ import annotations

import math

import pytest
import torch

from fastcov import BadInput, SecondMoment, factorize, regularised
from reference import closed_form as literal
from reference import shrinkage as literal_shrinkage


def keys(n, d, seed=0):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_regularised_by_hand():
    C = torch.tensor([[1.0, 0.5], [0.5, 2.0]])
    got = regularised(C, weight=10, ridge=0.25)
    assert got.dtype == torch.float64
    assert got.tolist() == [[10.25, 5.0], [5.0, 20.25]]
    assert C.tolist() == [[1.0, 0.5], [0.5, 2.0]]
    double = C.double()
    assert regularised(double, 1, 0) is not double  # always a new matrix
    assert regularised(C, 1, 0, dtype=torch.float32).dtype == torch.float32


def test_a_relative_ridge_and_a_shrinkage_by_hand():
    C = torch.tensor([[1.0, 0.5], [0.5, 3.0]], dtype=torch.float64)  # the mean of the diagonal is 2
    ridged = regularised(C, 10, 0.25, relative_ridge=0.1)  # 0.25 + 0.1 * 10 * 2
    assert ridged.tolist() == [[12.25, 5.0], [5.0, 32.25]]
    shrunk = regularised(C, 10, 0.25, shrinkage=0.5)
    assert shrunk.tolist() == [[15.25, 2.5], [2.5, 25.25]]
    both = regularised(C, 10, 0.25, relative_ridge=0.1, shrinkage=0.5)
    assert both.tolist() == [[17.25, 2.5], [2.5, 27.25]]
    X = keys(50, 6)
    S = X.T @ X / 50
    got = regularised(SecondMoment(6, dtype=torch.float64).update(X), 7.0, 0.1,
                      relative_ridge=1e-2, shrinkage=0.3)  # fmt: skip
    wanted = literal_shrinkage.shrunk(S.numpy(), 0.3)
    wanted = literal.regularised(wanted, 7.0, 0.1 + 1e-2 * 7.0 * float(S.diagonal().mean()))
    torch.testing.assert_close(got.tril(), torch.from_numpy(wanted).tril())


def test_without_them_the_matrix_is_the_same_bit_for_bit():
    C = keys(50, 6).float()[:6]
    plain = C.double().mul_(15000.0)
    plain.diagonal().add_(0.01)
    assert torch.equal(regularised(C, 15000.0, 0.01), plain)
    assert torch.equal(regularised(C, 15000.0, 0.01, relative_ridge=0.0, shrinkage=0.0), plain)


def test_of_a_moment_the_sum_is_read_where_it_lies():
    moment = SecondMoment(2).update(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))  # sum 10 2 / 2 4
    moment.lower[0, 1] = float("nan")
    got = regularised(moment, weight=10, ridge=0.25)
    assert got.dtype == torch.float64
    assert got.tril().tolist() == [[50.25, 0.0], [10.0, 20.25]]
    assert factorize(got).L.square().sum(1).tolist() == pytest.approx([50.25, 20.25])
    with pytest.raises(BadInput, match="width 3"):
        regularised(SecondMoment(3), 1, 0)


@pytest.mark.parametrize("bad", [{"weight": 0}, {"weight": math.nan}, {"weight": -1},
                                 {"ridge": -1e-3}, {"ridge": math.inf},
                                 {"relative_ridge": -1e-3}, {"relative_ridge": math.nan},
                                 {"shrinkage": 1.5}, {"shrinkage": math.nan}])  # fmt: skip
def test_regularised_refuses_bad_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        regularised(torch.eye(2), **{"weight": 1.0, "ridge": 0.0, **bad})
    with pytest.raises(BadInput):
        regularised(torch.ones(2, 3), 1, 0)
