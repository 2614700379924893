from __future__ import annotations

import pytest
import torch

from fastcov import factorize, linalg
from fastcov.linalg import block_width, cholesky_, mirror

NAN, INF = float("nan"), float("inf")


def positive(d, dtype=torch.float64, seed=0):
    X = torch.randn(2 * d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (X.T @ X / d).to(dtype)


def layouts(A):
    """Copies of a matrix with other strides: by rows, by columns, in every second column."""
    d = A.shape[0]
    yield A.clone()
    yield A.mT.clone(memory_format=torch.contiguous_format).mT
    inside = torch.zeros(d + 3, 2 * d + 1, dtype=A.dtype)[2 : d + 2, : 2 * d : 2]
    yield inside.copy_(A)


def test_a_factor_by_hand_leaves_everything_above_the_diagonal():
    A = torch.tensor([[4.0, NAN, INF], [2.0, 10.0, -0.0], [-2.0, 5.0, 14.0]])
    assert cholesky_(A)
    assert A.tril().tolist() == [[2.0, 0.0, 0.0], [1.0, 3.0, 0.0], [-1.0, 2.0, 3.0]]
    assert A[0, 1].isnan() and A[0, 2] == INF and A[1, 2] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [1, 2, 127, 128, 129, 256, 400])
def test_blocks_make_the_factor_that_a_whole_makes(d, dtype):
    A = positive(d, dtype)
    wanted = torch.linalg.cholesky(A.double())
    above = torch.ones(d, d, dtype=torch.bool).triu(1)
    for work in layouts(A.masked_fill(above, NAN)):
        assert cholesky_(work)
        L = work.tril().double()
        assert (L - wanted).norm() <= 4 * torch.finfo(dtype).eps * d**0.5 * wanted.norm()
        assert work[above].isnan().all()


def test_an_ill_conditioned_matrix_is_factored_to_rounding():
    d = 400
    Q = torch.linalg.qr(positive(d))[0]
    A = Q * torch.logspace(0, -12, d, dtype=torch.float64) @ Q.T
    A = (A + A.T) / 2
    work = A.clone()
    assert cholesky_(work)
    ours, theirs = work.tril(), torch.linalg.cholesky(A)
    allowed = 2 * (theirs @ theirs.T - A).norm()
    assert (ours @ ours.T - A).norm() <= allowed <= 1e-15 * d * A.norm()


@pytest.mark.parametrize("bad", [0, 127, 128, 200, 299])
def test_a_pivot_that_is_not_above_zero_is_reported_in_any_block(bad):
    A = positive(300)
    A[bad, bad] = -1.0
    assert not cholesky_(A)
    singular = torch.eye(300, dtype=torch.float64)
    singular[bad, bad] = 0.0
    assert not cholesky_(singular)


def test_the_triangles_mirror_into_each_other():
    A = torch.tensor([[1, NAN, NAN], [2, 3, NAN], [4, 5, 6]])
    assert mirror(A) is A
    assert A.tolist() == [[1, 2, 4], [2, 3, 5], [4, 5, 6]]
    B = torch.tensor([[1, 2, 4], [NAN, 3, 5], [NAN, NAN, 6]])
    mirror(B.mT)
    assert torch.equal(A, B)
    d = 200  # several blocks, the last one not full
    C = torch.arange(d * d, dtype=torch.float32).reshape(d, d)
    for work in layouts(C):
        assert torch.equal(mirror(work), C.tril() + C.tril(-1).mT)


def test_a_cuda_device_with_room_takes_the_matrix_whole(monkeypatch):
    gpu, d = torch.device("cuda"), 4096
    free = 1.5 * 8 * d * d
    monkeypatch.setattr(linalg, "free_memory", lambda device: free)
    assert block_width(d, gpu) == d
    free -= 1
    assert block_width(d, gpu) == 320 and block_width(d, torch.device("cpu")) == 256


@pytest.mark.parametrize("case", ["sound", "singular"])
def test_whole_as_on_such_a_device_it_is_the_same_factor_with_the_same_jitter(monkeypatch, case):
    """Emulated on the CPU: one call of the library for each attempt, and of what it gives one number is read."""
    d, calls = 300, []
    A = positive(d)
    if case == "singular":
        A[:, 7], A[7] = A[:, 3], A[3]  # one coordinate twice
        A[7, 7] = A[3, 3]
    upper = torch.ones(d, d, dtype=torch.bool).triu(1)
    wanted = factorize(A.masked_fill(upper, NAN))
    real = torch.linalg.cholesky_ex
    monkeypatch.setattr(linalg, "block_width", lambda d, device: d)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda A: calls.append(len(A)) or real(A))
    found = factorize(A.masked_fill(upper, NAN))
    assert found.jitter == wanted.jitter and found.rank == wanted.rank
    attempts = 1 + linalg.JITTERS.index(found.jitter)
    assert calls == [d] * attempts and (attempts > 1) == (case == "singular")
    assert (found.L - wanted.L).norm() <= 1e-6 * wanted.L.norm()
    assert torch.equal(found.lower[upper], A[upper])


def test_blocks_are_narrow_enough_for_the_memory_and_wide_enough_for_the_products(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(linalg, "free_memory", lambda device: 0.0)
    assert [block_width(d, cpu) for d in (1, 1500, 3072, 16384)] == [64, 64, 192, 256]
    assert [block_width(d, gpu) for d in (1, 1500, 3072, 16384)] == [128, 128, 256, 1024]
    # What a factorisation takes besides: a panel and a copy of it, and two packed on a CPU.
    for d in range(1024, 20000, 97):
        assert 4 * block_width(d, cpu) <= 0.25 * d and 2 * block_width(d, gpu) <= 0.25 * d
