"""AlphaEdit against the literal formula in float64, its limits and its refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastcov import (
    BadInput,
    NonFinite,
    NoNullSpace,
    NotPositiveDefinite,
    NullSpace,
    alphaedit,
    closed_form,
    factorize,
    null_space,
)
from reference import closed_form as literal

D, D_K, B, THRESHOLD = 7, 24, 5, 0.3


def tensor(x):
    return torch.from_numpy(np.ascontiguousarray(x))


@pytest.fixture(scope="module")
def problem():
    """C whose spectrum crosses the threshold, 5 edits, and 4 keys of earlier ones."""
    draw = np.random.default_rng(0)
    Q, _ = np.linalg.qr(draw.normal(size=(D_K, D_K)))
    C = Q @ np.diag(np.logspace(-3, 2, D_K)) @ Q.T
    K, K_p = draw.normal(size=(D_K, B)), draw.normal(size=(D_K, 4))
    return C, K, draw.normal(size=(D, B)), K_p


@pytest.fixture(scope="module")
def space(problem):
    return null_space(tensor(problem[0]), threshold=THRESHOLD)


def close(got, wanted, tolerance=1e-10):
    wanted = wanted.numpy() if isinstance(wanted, torch.Tensor) else wanted
    assert np.linalg.norm(got.numpy() - wanted) <= tolerance * np.linalg.norm(wanted)


def everything(d_k=D_K):
    """A null space that is the whole space: P = I."""
    return null_space(torch.zeros(d_k, d_k))


def test_one_by_one_by_hand():
    K, R = torch.tensor([[2.0]]), torch.tensor([[3.0]])
    found = alphaedit(everything(1), K, R, 4.0)
    assert found.dense().item() == pytest.approx(3 * 2 / (2 * 2 + 4))
    found = alphaedit(everything(1), K, R, 4.0, torch.tensor([[1.0, 1.0]]))
    assert found.dense().item() == pytest.approx(3 * 2 / (2 * 2 + 1 + 1 + 4))


@pytest.mark.parametrize("earlier", [0, 1, 4, 40])
@pytest.mark.parametrize("l2", [1e-3, 1.0, 10.0])
def test_it_equals_the_literal_formula(problem, space, earlier, l2):
    """With 40 earlier keys there are more keys than the null space has directions."""
    C, K, R, _ = problem
    K_p = np.random.default_rng(1).normal(size=(D_K, earlier))
    assert 5 < space.rank < 20
    wanted = literal.alphaedit(literal.null_projector(C, THRESHOLD), K, R, l2, K_p)
    close(alphaedit(space, tensor(K), tensor(R), l2, tensor(K_p)).dense(), wanted)


def test_no_earlier_keys_are_the_same_in_every_way_of_saying_so(problem, space):
    _, K, R, _ = problem
    plain = alphaedit(space, tensor(K), tensor(R), 10.0)
    empty = alphaedit(space, tensor(K), tensor(R), 10.0, torch.empty(D_K, 0))
    assert torch.equal(plain.right, empty.right) and torch.equal(plain.left, empty.left)


def test_equal_keys_are_fine_with_a_ridge(problem, space):
    C, K, R, _ = problem
    K = K[:, [0, 1, 0, 0, 2]]
    wanted = literal.alphaedit(literal.null_projector(C, THRESHOLD), K, R, 10.0)
    close(alphaedit(space, tensor(K), tensor(R), 10.0).dense(), wanted)


@pytest.mark.parametrize("l2", [0.5, 10.0])
def test_the_whole_space_is_ridge_regression_and_memit_with_A_of_l2(problem, l2):
    _, K, R, _ = problem
    found = alphaedit(everything(), tensor(K), tensor(R), l2).dense()
    close(found, R @ np.linalg.inv(K.T @ K + l2 * np.eye(B)) @ K.T)
    ridge = factorize(l2 * torch.eye(D_K, dtype=torch.float64))
    close(found, closed_form.memit(ridge, tensor(K), tensor(R)).dense())


def test_keys_outside_the_null_space_are_not_moved(problem, space):
    C, K, R, K_p = problem
    values, vectors = np.linalg.eigh(C)
    outside = tensor(vectors[:, values >= THRESHOLD])  # (d_k, d_k - r)
    change = alphaedit(space, tensor(K), tensor(R), 1e-2, tensor(K_p))
    assert outside.shape[1] == D_K - space.rank > 5
    moved = change.dense() @ outside
    assert moved.norm() <= 1e-12 * change.dense().norm()
    kept = torch.linalg.vector_norm(change.right - space.projector() @ change.right)
    assert kept <= 1e-12 * change.right.norm()


def test_without_a_ridge_keys_are_led_exactly_and_earlier_ones_stay(problem, space):
    C, K, R, K_p = problem
    change = alphaedit(space, tensor(K), tensor(R), 0.0, tensor(K_p)).dense()
    close(change @ tensor(K), R, 1e-8)
    assert (change @ tensor(K_p)).norm() <= 1e-8 * change.norm()
    limit = literal.alphaedit(literal.null_projector(C, THRESHOLD), K, R, 1e-9, K_p)
    close(change, limit, 1e-4)  # the literal one loses digits as l2 falls


def test_a_larger_ridge_is_a_smaller_change(problem, space):
    _, K, R, _ = problem
    sizes = [alphaedit(space, tensor(K), tensor(R), l2).dense().norm() for l2 in (0, 0.1, 1, 10)]
    assert sizes == sorted(sizes, reverse=True) and len(set(map(float, sizes))) == 4


def test_float32_keys_are_read_in_float64(problem, space):
    _, K, R, _ = problem
    found = alphaedit(space, tensor(K).float(), tensor(R).float(), 10.0)
    assert found.left.dtype == found.right.dtype == torch.float64
    assert found.left.shape == (D, B) and found.right.shape == (D_K, B)


@pytest.mark.parametrize("earlier", [0, 40])
def test_dependent_keys_without_a_ridge_are_refused(problem, space, earlier):
    _, K, R, _ = problem
    K = K if earlier else K[:, [0, 1, 2, 3, 0]]
    K_p = torch.randn(D_K, earlier, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(NotPositiveDefinite, match=r"l2=0, so .* pass l2=10") as caught:
        alphaedit(space, tensor(K), tensor(R), 0.0, K_p)
    assert caught.value.d == B + earlier


def test_keys_that_differ_outside_the_null_space_alone_depend_on_one_another(problem, space):
    C, K, R, _ = problem
    outside = np.linalg.eigh(C)[1][:, -1]
    K = np.stack([K[:, 0], K[:, 0] + outside], 1)
    with pytest.raises(NotPositiveDefinite, match="directions of the null space"):
        alphaedit(space, tensor(K), tensor(R[:, :2]), 0.0)
    alphaedit(space, tensor(K), tensor(R[:, :2]), 10.0)


def test_no_null_space_names_the_threshold_and_the_relative_one(problem):
    _, K, R, _ = problem
    empty = null_space(torch.eye(D_K))
    assert empty.rank == 0
    with pytest.raises(NoNullSpace, match=r"0\.02 \(the smallest is 1\).*relative") as caught:
        alphaedit(empty, tensor(K), tensor(R), 10.0)
    assert caught.value.columns == ()


def test_keys_that_have_nothing_in_the_null_space_are_named(problem, space):
    C, K, R, _ = problem
    K = K.copy()
    K[:, 1] = 3 * np.linalg.eigh(C)[1][:, -1]
    K[:, 3] = 0
    with pytest.raises(NoNullSpace, match=r"2 of 5 .* column 1, which lies outside") as caught:
        alphaedit(space, tensor(K), tensor(R), 10.0)
    assert caught.value.columns == (1, 3)
    with pytest.raises(NoNullSpace, match="column 0, which is zero"):
        alphaedit(space, tensor(K[:, 3:4]), tensor(R[:, :1]), 10.0)
    # A thousandth of the length is something.
    K[:, 1] += 3e-3 * np.linalg.eigh(C)[1][:, 0]
    assert alphaedit(space, tensor(K[:, :3]), tensor(R[:, :3]), 10.0).right.shape == (D_K, 3)


@pytest.mark.parametrize("l2", [-1.0, math.nan, math.inf])
def test_a_ridge_that_is_none_is_refused(problem, space, l2):
    _, K, R, _ = problem
    with pytest.raises(ValueError, match="l2 must be finite and not below 0"):
        alphaedit(space, tensor(K), tensor(R), l2)


def test_shapes_and_numbers_that_do_not_fit_are_refused(problem, space):
    _, K, R, K_p = (tensor(x) for x in problem)
    with pytest.raises(BadInput, match="null space of width 24"):
        alphaedit(space, K[:-1], R, 10.0)
    with pytest.raises(BadInput, match="do not fit 5 edit keys"):
        alphaedit(space, K, R[:, :2], 10.0)
    with pytest.raises(BadInput, match=r"earlier edits of shape \(23, 4\)"):
        alphaedit(space, K, R, 10.0, K_p[:-1])
    for bad in (K.index_fill(1, torch.tensor([2]), math.nan), K * math.inf):
        with pytest.raises(NonFinite):
            alphaedit(space, bad, R, 10.0)
    with pytest.raises(NonFinite):
        alphaedit(space, K, R, 10.0, K_p * math.nan)
    with pytest.raises(NonFinite):
        alphaedit(space, K, R * math.inf, 10.0)


def test_the_inputs_are_left_as_they_were(problem, space):
    _, K, R, K_p = (tensor(x).clone() for x in problem)
    before = [x.clone() for x in (K, R, K_p, space.basis)]
    alphaedit(space, K, R, 10.0, K_p)
    assert all(torch.equal(x, y) for x, y in zip((K, R, K_p, space.basis), before, strict=True))
    assert isinstance(space, NullSpace)
