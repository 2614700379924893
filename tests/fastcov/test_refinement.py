from __future__ import annotations

import pytest
import torch

from fastcov import factorize
from fastcov.errors import ResidualTooLarge
from fastcov.factor import CholeskyFactor, place_of_float64, refined_solve, upper_product


def conditioned(d, exponent, seed=0):
    """Symmetric float32 (d, d) with eigenvalues from 1 down to 10^-exponent."""
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator))[0]
    A = (Q * torch.logspace(0, -exponent, d, dtype=torch.float64) @ Q.T).float()
    return A.tril() + A.tril(-1).T


def columns(d, m, seed=1):
    return torch.randn(d, m, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def relative(residual, B):
    return float((residual.norm(dim=0) / B.norm(dim=0)).max())


def test_the_product_with_one_triangle_by_hand():
    nan = float("nan")
    A = torch.tensor([[nan, 2.0, 3.0], [nan, nan, 4.0], [nan, nan, nan]])
    diagonal = torch.tensor([1.0, 5.0, 6.0], dtype=torch.float64)
    got = upper_product(A, diagonal, torch.tensor([[1.0], [10.0], [100.0]], dtype=torch.float64))
    assert got.tolist() == [[321.0], [452.0], [643.0]]


def test_the_product_with_one_triangle_over_many_blocks():
    d = 300
    A, X = conditioned(d, 1), columns(d, 4)
    spoilt = A.masked_fill(torch.ones(d, d, dtype=torch.bool).tril(), float("nan"))
    got = upper_product(spoilt, A.diagonal().double(), X)
    torch.testing.assert_close(got, A.double() @ X, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("exponent", [1, 4, 6, 7])
def test_a_float32_factor_solves_as_a_float64_one_does(exponent):
    A = conditioned(300, exponent)
    factor = factorize(A, refine=True)
    assert factor.jitter == 0 and factor.lower.dtype == torch.float32
    exact = A.double()
    for B in (columns(300, 7), exact @ columns(300, 7)):
        X = factor.solve(B)
        reference = torch.linalg.solve(exact, B)
        assert X.dtype == torch.float64
        # As small a residual as LU in float64 leaves, or 1e-12; the plain factor is far from it.
        allowed = max(1e-12, 10 * relative(exact @ reference - B, B))
        assert relative(exact @ X - B, B) <= allowed
        plain = CholeskyFactor.solve(factor, B.float()).double()
        assert relative(exact @ plain - B, B) > 1e3 * allowed
        assert (X - reference).norm() <= 1e-15 * 10 ** (exponent + 2) * reference.norm()


def test_the_jitter_that_float32_needed_belongs_to_the_matrix():
    A = conditioned(200, 9)
    factor = factorize(A, refine=True)
    assert factor.jitter > 0
    exact = A.double()
    exact.diagonal().add_(factor.jitter * exact.diagonal().mean())
    B = exact @ columns(200, 3)
    assert relative(exact @ factor.solve(B) - B, B) <= 1e-11


def test_what_cannot_be_refined_is_an_error_and_not_a_bad_solve():
    A = conditioned(100, 2)
    factor = factorize(A, refine=True)
    factor.lower[0, 50] += 100.0  # another matrix, and not a positive definite one
    B = columns(100, 3)
    with pytest.raises(ResidualTooLarge, match=r"width 100 .* column \d.* above the 1e-12") as error:
        factor.solve(B)
    assert error.value.tolerance == 1e-12 and error.value.residual > 1e-6


def test_steps_that_lead_nowhere_end():
    with pytest.raises(ResidualTooLarge, match="residual of 1 in column 0"):
        refined_solve(torch.zeros_like, lambda R: R, columns(4, 2), torch.ones(4).double())
    with pytest.raises(ResidualTooLarge, match="residual of inf"):
        nan = torch.full((4, 1), float("nan")).double()
        refined_solve(lambda X: X, lambda R: R, nan, torch.ones(4).double())


def test_columns_of_zeros_and_of_any_size_are_solved_side_by_side():
    A = conditioned(150, 3)
    sizes = torch.tensor([0.0, 1e-250, 1.0, 1e250], dtype=torch.float64)
    B = columns(150, 4)
    X = factorize(A, refine=True).solve(B * sizes)
    assert X[:, 0].abs().max() == 0
    assert relative(A.double() @ (X / sizes)[:, 1:] - B[:, 1:], B[:, 1:]) <= 1e-12


def test_float64_lives_on_the_cpu_where_the_device_has_none():
    assert place_of_float64(torch.device("mps")).type == "cpu"
    assert place_of_float64(torch.device("cuda:1")) == torch.device("cuda:1")
