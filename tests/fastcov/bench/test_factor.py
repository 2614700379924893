from __future__ import annotations

import pytest
import torch

from fastcov.bench import factor
from fastcov.bench.settings import parse
from fastcov.bench.timing import Effort, measure

CPU = torch.device("cpu")


@pytest.fixture
def settings():
    return parse(["factor", "--quick", "--sizes", "48", "--threads", "1"])


@pytest.fixture
def given():
    return factor.problem(48, CPU, count=2, size=4)


MAKERS = {
    "factorising": 48**3 / 3,
    "solving": 2 * 48 * 48 * 4,
    "editing": 48**3 / 3 + 2 * (2 * 48 * 48 * 4 + 2 * 48 * 4 * (4 + 12)),
}


@pytest.mark.parametrize("make", MAKERS)
def test_both_sides_are_right_and_the_operations_are_counted(settings, given, make):
    case, contenders = getattr(factor, make)(settings, given)
    rows = measure(case, contenders, Effort(0.01, 3, 3))
    assert {row.status for row in rows} == {"ok"}
    assert rows[0].kind == "ours" and rows[-1].ratio == 1.0
    assert case.flops() == pytest.approx(MAKERS[make])
    assert all(row.error < 1e-11 for row in rows)


def test_the_matrix_is_symmetric_positive_and_conditioned_like_a_moment(given):
    assert torch.equal(given.A, given.A.mT)
    assert torch.equal(given.A, given.A.float().double())
    eigenvalues = torch.linalg.eigvalsh(given.A)
    assert 1e3 < eigenvalues[-1] / eigenvalues[0] < 1e6


def test_a_wrong_update_fails(settings, given, monkeypatch):
    right = factor.closed_form.memit

    def wrong(factor_, K, R):
        return right(factor_, K, R * (1 + 1e-6))

    monkeypatch.setattr(factor.closed_form, "memit", wrong)
    case, contenders = factor.editing(settings, given)
    ours, theirs = measure(case, contenders, Effort(0.01, 3, 3))
    assert [ours.status, theirs.status] == ["failed", "ok"]
    assert ours.error == pytest.approx(1e-6, rel=1e-3)


def test_a_wrong_factor_fails(settings, given, monkeypatch):
    right = factor.factorize

    def wrong(A, **options):
        found = right(A, **options)
        found.lower.mul_(1 + 1e-9)
        return found

    monkeypatch.setattr(factor, "factorize", wrong)
    case, contenders = factor.factorising(settings, given)
    assert [row.status for row in measure(case, contenders, Effort(0.01, 3, 3))] == ["failed", "ok"]


def test_factorising_never_sees_its_own_result(settings, given):
    """In place, so that each call must get the matrix anew."""
    _, (ours, _) = factor.factorising(settings, given)
    for _ in range(2):
        ours.prepare()
        L = ours.run().tril()
        assert (L @ L.mT - given.A).norm() / given.A.norm() < 1e-12


def test_memory_is_counted_in_matrices_and_not_for_small_ones(settings, given, monkeypatch):
    case, contenders = factor.factorising(settings, given)
    row = measure(case, contenders, Effort(0.01, 3, 3))[0]
    monkeypatch.setattr(factor, "peak_beyond", lambda run, device: 3 * 48 * 48 * 8)
    assert factor.with_memory(row, contenders[0], case).memory is None
    monkeypatch.setattr(factor, "_SMALL", 0)
    assert factor.with_memory(row, contenders[0], case).memory == 3.0
