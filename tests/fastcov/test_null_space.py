"""The null space of a second moment: which directions, and what is left of preserved keys."""

from __future__ import annotations

import math

import pytest
import torch

from fastcov import BadInput, NonFinite, NullSpace, null_space


def rotated(eigenvalues, seed=0):
    """A matrix of these eigenvalues, and its eigenvectors in their order."""
    draw = torch.Generator().manual_seed(seed)
    d = len(eigenvalues)
    Q, _ = torch.linalg.qr(torch.randn(d, d, generator=draw, dtype=torch.float64))
    return Q @ torch.tensor(eigenvalues, dtype=torch.float64).diag() @ Q.T, Q


def test_it_is_the_eigenvectors_below_the_threshold():
    C, Q = rotated([5.0, 0.01, 1.0, 0.019, 0.021])
    found = null_space(C)
    wanted = Q[:, [1, 3]]
    assert isinstance(found, NullSpace) and found.rank == 2 and found.threshold == 0.02
    torch.testing.assert_close(found.projector(), wanted @ wanted.T)
    torch.testing.assert_close(found.basis.T @ found.basis, torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(found.eigenvalues, torch.tensor([0.01, 0.019, 0.021, 1.0, 5.0], dtype=torch.float64))


def test_a_diagonal_by_hand():
    found = null_space(torch.tensor([[3.0, 0, 0], [0, 0, 0], [0, 0, 0.01]]))
    assert found.projector().tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_the_relative_threshold_does_not_depend_on_the_scale_of_keys():
    C, _ = rotated([5.0, 0.01, 1.0, 0.3, 0.2])
    ranks = {scale: null_space(scale * C, relative=0.2).rank for scale in (1e-6, 1.0, 1e6)}
    assert set(ranks.values()) == {2}  # mean 1.302, so 0.26: above 0.01 and 0.2
    assert null_space(1e-6 * C).rank == 5 and null_space(1e6 * C).rank == 0  # the absolute one does


def test_only_the_lower_triangle_is_read():
    C, _ = rotated([5.0, 0.01, 1.0])
    torch.testing.assert_close(null_space(C.tril()).projector(), null_space(C).projector())


def test_preserved_keys_lose_next_to_nothing():
    draw = torch.Generator().manual_seed(1)
    keys = torch.randn(500, 4, generator=draw) @ torch.randn(4, 9, generator=draw)
    found = null_space(keys.T @ keys / 500, relative=1e-5)
    assert found.rank == 5
    assert float((keys.double() @ found.projector()).norm() / keys.norm()) < 1e-5


def test_full_rank_has_none_and_zero_has_all():
    assert null_space(torch.eye(4)).rank == 0
    assert null_space(torch.eye(4)).projector().abs().max() == 0
    assert null_space(torch.zeros(4, 4)).rank == 4


@pytest.mark.parametrize("shape", [(3,), (2, 3), (0, 0), (2, 2, 2)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(BadInput):
        null_space(torch.zeros(shape))


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["threshold", "relative"])
def test_thresholds_that_are_none_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        null_space(torch.eye(2), **{name: value})


def test_numbers_that_are_none_are_named():
    C = torch.eye(3)
    C[2, 1] = math.nan
    with pytest.raises(NonFinite, match="row 2, column 1") as caught:
        null_space(C)
    assert caught.value.where == (2, 1) and caught.value.entries == 1
