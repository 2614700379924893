from __future__ import annotations

import numpy as np
import pytest
import torch

from fastcov import BadInput, CholeskyFactor, closed_form, factorize
from fastcov.linalg import UpdatedFactor, updated
from reference import closed_form as literal

D_K, D = 24, 11


@pytest.fixture(scope="module")
def problem():
    """A, three blocks of earlier keys, and the keys and residuals of five edits."""
    rng = np.random.default_rng(0)
    scales = np.logspace(-1, 1, D_K)
    A = literal.regularised(literal.second_moment(rng.normal(size=(4 * D_K, D_K)) * scales), 20, 0.01)
    blocks = [rng.normal(size=(D_K, m)) * scales[:, None] for m in (3, 1, 40)]
    K = rng.normal(size=(D_K, 5)) * scales[:, None]
    return A, blocks, K, rng.normal(size=(D, 5))


def tensor(x):
    return torch.from_numpy(np.ascontiguousarray(x))


def close(got, wanted, tolerance=1e-10):
    assert np.linalg.norm(got.numpy() - wanted) <= tolerance * np.linalg.norm(wanted)


def updated_by(A, blocks):
    factor = factorize(tensor(A))
    for block in blocks:
        factor = updated(factor, tensor(block))
    return factor


@pytest.mark.parametrize("n", [1, 2, 3])  # the third block has more columns than A
def test_it_is_the_factor_of_the_literal_sum(problem, n):
    A, blocks, K, _ = problem
    factor, total = updated_by(A, blocks[:n]), literal.preserving(A, blocks[:n])
    close(factor.L @ factor.L.mT, total)
    close(factor.solve(tensor(K)), np.linalg.solve(total, K))
    close(factor.solve(tensor(K[:, 0])), np.linalg.solve(total, K[:, 0]))
    X, S = factor.solve_and_gram(tensor(K))
    close(X, np.linalg.solve(total, K))
    close(S, K.T @ np.linalg.solve(total, K))
    assert float(factor.logdet()) == pytest.approx(np.linalg.slogdet(total)[1])
    half = factor.half_solve(tensor(K))
    close(factor.L @ half, K)
    close(factor.L.mT @ factor.back_solve(half), half.numpy())


def test_every_closed_form_preserves_the_earlier_keys(problem):
    A, blocks, K, R = problem
    factor, total = updated_by(A, blocks), literal.preserving(A, blocks)
    close(closed_form.memit(factor, tensor(K), tensor(R)).dense(), literal.memit(total, K, R))
    close(closed_form.emmet(factor, tensor(K), tensor(R)).dense(), literal.emmet(total, K, R))
    rome = closed_form.rome(factor, tensor(K[:, 0]), tensor(R[:, 0])).dense()
    close(rome, literal.rome(total, K[:, 0], R[:, 0]))


def test_block_by_block_equals_all_at_once(problem):
    A, blocks, K, _ = problem
    whole = updated(factorize(tensor(A)), tensor(np.concatenate(blocks, 1)))
    parts = updated_by(A, blocks)
    torch.testing.assert_close(parts.small, whole.small)
    torch.testing.assert_close(parts.solve(tensor(K)), whole.solve(tensor(K)))


def test_a_key_that_was_edited_before_keeps_its_digits():
    """Heavy keys: A counts little against them, so that a difference of grams would lose digits."""
    rng = np.random.default_rng(1)
    A, K = 1e-9 * np.eye(D_K), rng.normal(size=(D_K, 6))
    factor = updated(factorize(tensor(A)), tensor(K))
    _, S = factor.solve_and_gram(tensor(K))
    # By Woodbury K^T (A + K K^T)^-1 K = (I + G^-1)^-1 with G = K^T A^-1 K = 1e9 K^T K.
    exact = np.linalg.inv(np.eye(6) + np.linalg.inv(K.T @ K) * 1e-9)
    # What a triangular solve may lose: the factor's condition number is the square root of that of
    # A + K K^T. A difference of grams would lose thousands of times as much.
    condition = 1 + np.linalg.eigvalsh(K.T @ K).max() * 1e9
    assert np.abs(S.numpy() - exact).max() <= D_K * np.finfo(float).eps * np.sqrt(condition)
    plain = factorize(tensor(A))
    _, G = plain.solve_and_gram(tensor(K))
    lossy = G - G @ torch.linalg.solve(G + torch.eye(6).double(), G)
    assert np.abs(lossy.numpy() - exact).max() > 1e-8


def test_the_factor_of_A_is_untouched_and_shared(problem):
    A, blocks, K, _ = problem
    factor = factorize(tensor(A))
    before, solved = factor.lower.clone(), factor.solve(tensor(K))
    first = updated(factor, tensor(blocks[0]))
    small, whitened = first.small.clone(), first.whitened.clone()
    second = updated(first, tensor(blocks[1]))
    assert second.lower.data_ptr() == factor.lower.data_ptr()
    assert torch.equal(factor.lower, before) and torch.equal(factor.solve(tensor(K)), solved)
    assert torch.equal(first.small, small) and torch.equal(first.whitened, whitened)
    assert isinstance(second, UpdatedFactor) and second.jitter == factor.jitter
    assert first.nbytes == factor.nbytes + 8 * (D_K * 3 + 9)


def test_what_cannot_be_updated_is_refused(problem):
    factor = factorize(tensor(problem[0]))
    for shape in ((D_K + 1, 2), (D_K,), (D_K, 0)):
        with pytest.raises(BadInput, match="do not fit a factor of width 24"):
            updated(factor, torch.ones(shape))
    assert isinstance(updated(factor, torch.ones(D_K, 1)), CholeskyFactor)
