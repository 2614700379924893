from __future__ import annotations

import pytest
import torch

from fastcov import BadInput, CholeskyFactor, factorize


def keys(n, d, seed=0):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moment_of(X):
    return X.T @ X / X.shape[0]


def test_a_factor_that_shares_its_matrix_solves_as_a_clean_one_does():
    C = moment_of(keys(500, 300))
    B = keys(300, 20, seed=1)
    clean = torch.linalg.cholesky(C)
    for wanted, factor in [(clean, factorize(C)), (clean, CholeskyFactor(clean, 0.0))]:
        half = torch.linalg.solve_triangular(wanted, B, upper=False)
        torch.testing.assert_close(factor.half_solve(B), half, rtol=1e-11, atol=1e-11)
        X, S = factor.solve_and_gram(B)
        torch.testing.assert_close(X, torch.linalg.solve(C, B), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(S, B.T @ X, rtol=1e-10, atol=1e-10)
        assert float(factor.logdet()) == pytest.approx(float(torch.logdet(C)))
    spoilt = clean.masked_fill(torch.ones_like(clean, dtype=torch.bool).triu(1), float("nan"))
    torch.testing.assert_close(CholeskyFactor(spoilt, 0.0).solve(B), factor.solve(B))


def test_a_solve_of_condition_1e12_is_as_good_as_one_with_a_factor_made_by_torch():
    Q = torch.linalg.qr(keys(300, 300))[0]
    C = Q * torch.logspace(0, -12, 300, dtype=torch.float64) @ Q.T
    C = (C + C.T) / 2
    factor = factorize(C)
    assert factor.jitter == 0
    for B in (keys(300, 5, seed=1), C @ keys(300, 5, seed=1)):
        theirs = torch.cholesky_solve(B, torch.linalg.cholesky(C))
        assert (C @ factor.solve(B) - B).norm() <= 3 * (C @ theirs - B).norm()


def test_dtype_device_and_size_are_those_of_what_is_answered_and_held():
    C = moment_of(keys(60, 30))
    plain, single = factorize(C), factorize(C.float())
    assert (plain.dtype, plain.nbytes, plain.device.type) == (torch.float64, 7200, "cpu")
    assert (single.dtype, single.nbytes, single.device.type) == (torch.float32, 3600, "cpu")
    b = keys(30, 1)[:, 0]
    assert plain.solve(b).shape == (30,)
    torch.testing.assert_close(plain.solve(b)[:, None], plain.solve(b[:, None]))
    with pytest.raises(BadInput, match="width 30"):
        plain.solve(torch.ones(29))
    X, S = plain.solve_and_gram(keys(30, 4))
    torch.testing.assert_close(S, keys(30, 4).T @ X, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(S, S.T, rtol=1e-15, atol=0)
