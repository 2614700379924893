from __future__ import annotations

import logging
import math
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fastcov import BadInput, CholeskyFactor, NonFinite, NotPositiveDefinite, SecondMoment, factorize, regularised
from fastcov.kernels import cpu

# L L^T by hand, with L below.
A = torch.tensor([[4.0, 2.0, -2.0], [2.0, 10.0, 5.0], [-2.0, 5.0, 14.0]], dtype=torch.float64)
L = torch.tensor([[2.0, 0.0, 0.0], [1.0, 3.0, 0.0], [-1.0, 2.0, 3.0]], dtype=torch.float64)


def keys(n, d, seed=0):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moment_of(X):
    return SecondMoment(X.shape[1], dtype=torch.float64).update(X).second_moment


def test_three_by_three_by_hand():
    factor = factorize(A)
    assert factor.d == 3 and factor.jitter == 0
    torch.testing.assert_close(factor.L, L, rtol=1e-15, atol=1e-15)
    assert float(factor.logdet()) == pytest.approx(2 * math.log(18))
    b = torch.tensor([4.0, 17.0, 17.0], dtype=torch.float64)  # A (1, 1, 1)
    torch.testing.assert_close(factor.solve(b), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(factor.solve(b[:, None]), torch.ones(3, 1, dtype=torch.float64))
    half = factor.half_solve(b)
    torch.testing.assert_close(L @ half, b)
    torch.testing.assert_close(factor.back_solve(half), factor.solve(b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_the_lower_triangle_is_read(dtype):
    above = torch.ones(3, 3, dtype=torch.bool).triu(1)
    spoilt = A.to(dtype).masked_fill(above, float("nan"))
    factor = factorize(spoilt)
    assert factor.L.dtype == dtype
    torch.testing.assert_close(factor.L, L.to(dtype))
    # The retry with a jitter as well.
    singular = torch.ones(3, 3, dtype=dtype).masked_fill(above, float("inf"))
    assert factorize(singular).jitter > 0


def test_the_matrix_is_left_alone_unless_it_may_be_changed():
    singular = torch.ones(3, 3, dtype=torch.float64)
    before = singular.clone()
    jitter = factorize(singular).jitter
    assert jitter == 1e-10 and torch.equal(singular, before)
    inside = factorize(singular, in_place=True)
    assert inside.jitter == jitter and inside.lower.data_ptr() == singular.data_ptr()
    L = singular.tril()  # the factor lies in the matrix's own lower triangle
    wanted = before + 1e-10 * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(L @ L.mT, wanted, rtol=1e-14, atol=1e-14)
    assert torch.equal(singular.triu(1), before.triu(1))  # and A above its diagonal
    torch.testing.assert_close(inside.L, L, rtol=0, atol=0)


def test_after_an_error_the_lower_triangle_is_as_it_was():
    C = moment_of(keys(300, 200))
    C[150, 150] = -1.0
    before = C.tril()
    with pytest.raises(NotPositiveDefinite):
        factorize(C, in_place=True)
    assert torch.equal(C.tril(), before)
    C[199, 3] = before[199, 3] = float("inf")
    with pytest.raises(NonFinite):
        factorize(C, in_place=True)
    assert torch.equal(C.tril(), before)


def peak_of(work):
    """The most held at a time for a piece of work, in bytes beyond what torch held before.

    What the native kernel packs keys in counts from the beginning: it keeps it for its next call.
    """
    native = cpu.native()
    if native is not None:
        native.cpu_release_workspace()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        work()
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak + (0 if native is None else native.cpu_workspace())


@pytest.mark.parametrize("what", ["positive", "few keys", "indefinite"])
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("d", [1024, 1500])
def test_besides_one_matrix_a_factorisation_takes_three_tenths_of_it(what, in_place, d):
    C = moment_of(keys(100 if what == "few keys" else 2 * d, d))
    if what == "indefinite":
        C = torch.diag(torch.linspace(1, -1, d, dtype=torch.float64))
        C[0, 0] = d
    size = d * d * 8

    def run():
        with pytest.raises(NotPositiveDefinite) if what == "indefinite" else nullcontext():
            assert (factorize(C, in_place=in_place).jitter > 0) == (what == "few keys")

    peak = peak_of(run)
    assert 0.05 * size < peak - (0 if in_place else size) <= 0.3 * size


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e9])
def test_the_jitter_is_relative_and_logged(scale, caplog):
    X = keys(10, 30)
    C = moment_of(X) * scale
    with caplog.at_level(logging.WARNING, logger="fastcov"):
        factor = factorize(C)
    assert factor.jitter == 1e-10
    assert "1e-10" in caplog.text and "30" in caplog.text
    assert factor.rank == 10 and "rank is about 10" in caplog.text
    added = C + 1e-10 * C.diagonal().mean() * torch.eye(30, dtype=torch.float64)
    torch.testing.assert_close(factor.L @ factor.L.T, added, rtol=1e-9, atol=scale * 1e-13)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("n", "d"), [(99, 100), (50, 200), (1, 64), (299, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_too_few_keys_give_a_usable_factor_with_its_jitter_on_record(n, d, dtype, seed):
    # Rounding lets the plain factorisation of some of these matrices pass, with pivots of noise.
    X = keys(n, d, seed)
    C = moment_of(X).to(dtype)
    factor = factorize(C)
    assert factor.jitter > 0 and factor.rank == n
    B = (X[:1].T).to(dtype)  # a key that is in the moment
    solved = factor.solve(B)
    residual = (C.double() @ solved.double() - B.double()).norm() / B.double().norm()
    assert residual < (1e-2 if dtype == torch.float32 else 1e-4)
    assert solved.abs().max() < 1e6


def test_enough_keys_need_no_jitter():
    for d in (1, 50, 300):
        for dtype in (torch.float32, torch.float64):
            factor = factorize(moment_of(keys(d + 2, d)).to(dtype))
            assert factor.jitter == 0 and factor.rank is None


def test_coordinates_of_small_scale_are_not_taken_for_singular():
    scales = torch.logspace(-9, 3, 40, dtype=torch.float64)
    C = moment_of(keys(400, 40) * scales)
    factor = factorize(C)
    assert factor.jitter == 0
    wanted = keys(40, 3, seed=1) / scales[:, None]
    torch.testing.assert_close(factor.solve(C @ wanted), wanted, rtol=1e-9, atol=0)


def test_dead_coordinates_are_solved_around():
    X = keys(400, 40)
    X[:, [3, 17]] = 0
    factor = factorize(moment_of(X))
    assert factor.jitter == 1e-10 and factor.rank == 38
    B = X[:5].T
    solved = factor.solve(B)
    assert solved[[3, 17]].abs().max() == 0
    torch.testing.assert_close(moment_of(X) @ solved, B, rtol=1e-7, atol=1e-7)


def test_an_indefinite_matrix_is_refused_with_what_was_tried():
    bad = torch.diag(torch.tensor([1.0, 1.0, -0.5], dtype=torch.float64))
    with pytest.raises(NotPositiveDefinite, match=r"width 3.*0\.0001.*ridge") as error:
        factorize(bad)
    assert error.value.d == 3 and error.value.rank == 2 and "about 2" in str(error.value)
    assert error.value.tried == (0.0, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4)
    with pytest.raises(NotPositiveDefinite) as error:
        factorize(torch.ones(2, 2, dtype=torch.float64), jitters=(0.0,))
    assert error.value.tried == (0.0,) and error.value.rank == 1
    with pytest.raises(NotPositiveDefinite, match="tried none") as error:
        factorize(torch.eye(2), jitters=())
    assert error.value.tried == () and error.value.rank == 2


def test_the_noise_of_a_float32_sum_does_not_count_as_rank():
    X = keys(50, 200).float()
    factor = factorize((X.T @ X / 50).double())
    assert factor.jitter >= 1e-8 and factor.rank == 50


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_diagonal_of_nothing_is_refused_at_once(value):
    with pytest.raises(NotPositiveDefinite, match="mean") as error:
        factorize(value * torch.eye(4))
    assert error.value.tried == () and error.value.rank == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [(0, 0), (2, 1), (2, 2)])
def test_non_finite_is_another_error_than_indefinite(value, where):
    bad = A.clone()
    bad[where] = value
    with pytest.raises(NonFinite, match="1 entries") as error:
        factorize(bad)
    assert error.value.entries == 1 and error.value.where == where


def test_all_non_finite_entries_are_counted_and_the_first_is_named():
    bad = moment_of(keys(300, 200))
    bad[199, 0] = bad[130, 7] = bad[130, 9] = float("nan")
    bad[5, 60] = float("nan")  # above the diagonal: not read
    with pytest.raises(NonFinite, match=r"3 entries .* row 130, column 7") as error:
        factorize(bad)
    assert error.value.entries == 3 and error.value.where == (130, 7)


@pytest.mark.parametrize(
    "error", [NotPositiveDefinite("no", tried=(0.0, 1e-10), d=3, rank=2), NonFinite("no", entries=2, where=(1, 0))]
)
def test_errors_keep_their_values_between_processes(error):
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == "no" and vars(again) == vars(error)


@pytest.mark.parametrize("shape", [(2, 3), (3,), (0, 0), (2, 2, 2)])
def test_what_is_no_square_matrix_is_refused(shape):
    with pytest.raises(BadInput):
        factorize(torch.zeros(shape))


def test_other_bad_input():
    with pytest.raises(ValueError, match="float16"):
        factorize(torch.eye(2).half())
    with pytest.raises(BadInput, match="width 3"):
        factorize(A).solve(torch.ones(4, 2, dtype=torch.float64))
    with pytest.raises(BadInput):
        CholeskyFactor(L, 0.0).half_solve(torch.ones(2))


def test_from_a_moment_to_its_factor_there_is_one_matrix():
    d = 1500
    moment = SecondMoment(d).update(keys(2 * d, d).float())
    peak = peak_of(lambda: factorize(regularised(moment, 1.0, 0.1), in_place=True))
    assert d * d * 8 < peak <= 1.3 * d * d * 8
