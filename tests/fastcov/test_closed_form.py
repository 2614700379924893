from __future__ import annotations

import numpy as np
import pytest
import torch

from fastcov import BadInput, NonFinite, NotPositiveDefinite, closed_form, factorize, regularised
from reference import closed_form as literal

D, D_K = 11, 24
WEIGHT, RIDGE = 150.0, 0.01


@pytest.fixture(scope="module")
def problem():
    """C from 4 d_k keys with a spread of scales, and 5 edits."""
    rng = np.random.default_rng(0)
    scales = np.logspace(-1, 1, D_K)
    C = literal.second_moment(rng.normal(size=(4 * D_K, D_K)) * scales)
    K = rng.normal(size=(D_K, 5)) * scales[:, None]
    R = rng.normal(size=(D, 5))
    return C, K, R


def tensor(x):
    return torch.from_numpy(np.ascontiguousarray(x))


def factor_of(C, weight=WEIGHT, ridge=RIDGE):
    return factorize(regularised(tensor(C), weight, ridge))


def close(got, wanted, tolerance=1e-9):
    got = got.numpy() if isinstance(got, torch.Tensor) else got
    assert np.linalg.norm(got - wanted) <= tolerance * np.linalg.norm(wanted)


def test_one_by_one_by_hand():
    factor = factorize(torch.tensor([[4.0]], dtype=torch.float64))
    K, R = torch.tensor([[2.0]]).double(), torch.tensor([[3.0]]).double()
    assert closed_form.memit(factor, K, R).dense().item() == pytest.approx(6 / 8)  # 3*2/(4+2*2)
    assert closed_form.emmet(factor, K, R).dense().item() == pytest.approx(1.5)  # 3/2
    # 3 (2*2/4 + 1)^-1 2/4
    assert closed_form.emmet(factor, K, R, 1.0).dense().item() == pytest.approx(0.75)
    assert closed_form.rome(factor, K, R).dense().item() == pytest.approx(1.5)


@pytest.mark.parametrize("ridge", [0.0, RIDGE])
def test_every_form_equals_the_literal_formula(problem, ridge):
    C, K, R = problem
    factor, A = factor_of(C, ridge=ridge), literal.regularised(C, WEIGHT, ridge)
    k, r, q = K[:, 0], R[:, 0], K[:, 0] + 0.1 * K[:, 1]
    close(closed_form.memit(factor, tensor(K), tensor(R)).dense(), literal.memit(A, K, R))
    for lambda_e in (0.0, 0.1):
        got = closed_form.emmet(factor, tensor(K), tensor(R), lambda_e)
        close(got.dense(), literal.emmet(A, K, R, lambda_e))
    close(closed_form.rome(factor, tensor(k), tensor(r)).dense(), literal.rome(A, k, r))
    got = closed_form.rome(factor, tensor(k)[:, None], tensor(r)[:, None], denominator_key=tensor(q))
    close(got.dense(), literal.rome(A, k, r, q))


def test_identity_1_emmet_maps_every_key_to_its_residual_and_the_weight_cancels(problem):
    C, K, R = problem
    one = closed_form.emmet(factor_of(C, 1.0, 0.0), tensor(K), tensor(R)).dense()
    other = closed_form.emmet(factor_of(C, 1e5, 0.0), tensor(K), tensor(R)).dense()
    close(one @ tensor(K), R)
    close(one, other.numpy())


def test_identity_2_emmet_of_one_edit_is_rome(problem):
    C, K, R = problem
    factor, k, r = factor_of(C), tensor(K[:, :1]), tensor(R[:, :1])
    emmet = closed_form.emmet(factor, k, r)
    rome = closed_form.rome(factor, k, r)
    close(emmet.dense(), rome.dense().numpy())
    close(rome.dense(), closed_form.rome(factor, k, r, denominator_key=k).dense().numpy())


@pytest.mark.parametrize("lambda_e", [0.1, 3.0])
def test_identity_3_relaxed_emmet_is_memit_of_another_weight(problem, lambda_e):
    C, K, R = problem
    emmet = closed_form.emmet(factor_of(C, WEIGHT, 0.0), tensor(K), tensor(R), lambda_e)
    memit = closed_form.memit(factor_of(C, WEIGHT * lambda_e, 0.0), tensor(K), tensor(R))
    close(emmet.dense(), memit.dense().numpy())


def test_identity_4_woodbury(problem):
    C, K, _ = problem
    A = literal.regularised(C, WEIGHT, RIDGE)
    X = np.linalg.solve(A, K)
    direct = np.linalg.solve(A + K @ K.T, K)
    close(X @ np.linalg.inv(np.eye(5) + K.T @ X), direct)
    # What memit returns for R = I is that matrix, transposed.
    got = closed_form.memit(factor_of(C), tensor(K), torch.eye(5).double())
    close(got.dense().T, direct)


def test_the_factors_are_low_rank_and_in_the_weights_orientation(problem):
    C, K, R = problem
    delta = closed_form.memit(factor_of(C), tensor(K), tensor(R))
    assert delta.left.shape == (D, 5) and delta.right.shape == (D_K, 5)
    assert delta.dense().shape == (D, D_K)


def test_more_edits_than_the_keys_are_wide():
    rng = np.random.default_rng(1)
    C = literal.second_moment(rng.normal(size=(100, 6)))
    K, R = rng.normal(size=(6, 20)), rng.normal(size=(4, 20))
    A = literal.regularised(C, 2.0, 0.0)
    got = closed_form.memit(factor_of(C, 2.0, 0.0), tensor(K), tensor(R))
    close(got.dense(), literal.memit(A, K, R))
    with pytest.raises(NotPositiveDefinite, match="20 edit keys"):
        closed_form.emmet(factor_of(C, 2.0, 0.0), tensor(K), tensor(R))


def test_equal_keys_are_fine_for_memit_and_refused_by_exact_emmet(problem):
    C, K, R = problem
    K = K[:, [0, 1, 0]]
    R = R[:, :3]
    factor, A = factor_of(C), literal.regularised(C, WEIGHT, RIDGE)
    close(closed_form.memit(factor, tensor(K), tensor(R)).dense(), literal.memit(A, K, R))
    with pytest.raises(NotPositiveDefinite, match=r"not independent.*duplicate.*lambda_e=0\.1") as error:
        closed_form.emmet(factor, tensor(K), tensor(R))
    assert error.value.d == 3 and error.value.rank == 2
    got = closed_form.emmet(factor, tensor(K), tensor(R), 0.1)
    close(got.dense(), literal.emmet(A, K, R, 0.1))


def test_too_few_keys_still_give_an_edit():
    rng = np.random.default_rng(2)
    C = literal.second_moment(rng.normal(size=(15, D_K)))  # rank 15 of 24
    factor = factor_of(C, 1.0, 0.0)
    assert factor.jitter > 0
    K, R = tensor(rng.normal(size=(D_K, 5))), tensor(rng.normal(size=(D, 5)))
    close(closed_form.emmet(factor, K, R).dense() @ K, R.numpy(), 1e-6)
    assert closed_form.memit(factor, K, R).dense().isfinite().all()


def test_a_float32_factor_edits_as_a_float64_one_of_the_same_matrix(problem):
    C, K, R = problem
    single = regularised(tensor(C), WEIGHT, RIDGE, dtype=torch.float32)
    A, factor = single.double().numpy(), factorize(single)
    k, r, q = K[:, 0], R[:, 0], K[:, 0] + 0.1 * K[:, 1]
    got = closed_form.memit(factor, tensor(K), tensor(R))
    assert got.left.dtype == got.right.dtype == factor.dtype == torch.float32
    close(got.dense(), literal.memit(A, K, R), 1e-3)
    for lambda_e in (0.0, 0.1):
        close(closed_form.emmet(factor, tensor(K), tensor(R), lambda_e).dense(), literal.emmet(A, K, R, lambda_e), 1e-3)
    close(closed_form.rome(factor, tensor(k), tensor(r)).dense(), literal.rome(A, k, r), 1e-3)
    got = closed_form.rome(factor, tensor(k), tensor(r), denominator_key=tensor(q))
    close(got.dense(), literal.rome(A, k, r, q), 1e-3)


def test_arguments_are_read_in_the_factors_dtype(problem):
    C, K, R = problem
    got = closed_form.memit(factor_of(C), tensor(K).float(), tensor(R).float())
    assert got.left.dtype == got.right.dtype == torch.float64
    close(got.dense(), literal.memit(literal.regularised(C, WEIGHT, RIDGE), K, R), 1e-5)


@pytest.mark.parametrize("form", [closed_form.memit, closed_form.emmet])
def test_shapes_that_do_not_fit(problem, form):
    C, K, R = problem
    factor, K, R = factor_of(C), tensor(K), tensor(R)
    for bad_k, bad_r, words in [
        (K[1:], R, "width 24"),
        (K[:, 0], R, "columns"),
        (K[:, :0], R[:, :0], "at least 1"),
        (K, R[:, 1:], "5 edit keys"),
        (K, R[:, 0], "5 edit keys"),
    ]:
        with pytest.raises(BadInput, match=words):
            form(factor, bad_k, bad_r)


@pytest.mark.parametrize("form", [closed_form.memit, closed_form.emmet])
def test_non_finite_input_is_named(problem, form):
    C, K, R = problem
    factor = factor_of(C)
    bad = tensor(K)
    bad[3, 2] = float("nan")
    with pytest.raises(NonFinite, match=r"1 of 5 edit keys .* column 2"):
        form(factor, bad, tensor(R))
    bad = tensor(R.copy())
    bad[0, 1:3] = float("inf")
    with pytest.raises(NonFinite, match=r"2 of 5 residuals .* column 1") as error:
        form(factor, tensor(np.abs(R[:1]).repeat(D_K, 0)), bad)
    assert error.value.entries == 2 and error.value.where == (0, 1)


def test_bad_rome_and_lambda(problem):
    C, K, R = problem
    factor, K, R = factor_of(C), tensor(np.nan_to_num(K)), tensor(R)
    with pytest.raises(BadInput, match="one edit"):
        closed_form.rome(factor, K, R)
    with pytest.raises(NotPositiveDefinite, match="zero"):
        closed_form.rome(factor, torch.zeros(D_K), R[:, 0])
    with pytest.raises(NotPositiveDefinite, match="denominator"):
        closed_form.rome(factor, K[:, 0], R[:, 0], denominator_key=-K[:, 0])
    with pytest.raises(BadInput):
        closed_form.rome(factor, K[:, 0], R[:, 0], denominator_key=K[1:, 0])
    for bad in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="lambda_e"):
            closed_form.emmet(factor, K, R, bad)
