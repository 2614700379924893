from __future__ import annotations

import pytest
import torch

from fastcov.accumulate import Ring


class Given:
    """What a ring handed on, copied, and where it lay."""

    def __init__(self):
        self.rows = []
        self.places = set()

    def __call__(self, rows):
        self.rows.append(rows.clone())
        self.places.add(rows.data_ptr())


def test_rows_are_handed_on_by_as_many_as_it_holds():
    given = Given()
    ring = Ring(4, given)
    X = torch.arange(22.0).reshape(11, 2)
    for part in X.split([1, 2, 0, 7, 1]):
        ring.add(part)
    assert [len(rows) for rows in given.rows] == [4, 4] and ring.held == 3
    ring.flush()
    ring.flush()
    assert [len(rows) for rows in given.rows] == [4, 4, 3] and ring.held == 0
    assert torch.equal(torch.cat(given.rows), X)
    assert len(given.places) == 1  # one buffer, filled from its start again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_only_kept_rows_are_taken_and_in_order(dtype):
    given = Given()
    ring = Ring(5, given)
    X = torch.randn(40, 3).to(dtype)
    mask = torch.rand(40) < 0.4
    for rows, kept in zip(X.split(9), mask.split(9), strict=True):
        ring.add(rows, kept)
    ring.close()
    assert all(len(rows) == 5 for rows in given.rows[:-1])
    got = torch.cat(given.rows)
    assert got.dtype == dtype and torch.equal(got, X[mask])


def test_rows_of_any_strides():
    given = Given()
    ring = Ring(6, given)
    base = torch.randn(3, 20)
    ring.add(base.T[::2], torch.tensor([True, False] * 5))
    ring.add(base.T[:2])
    ring.close()
    assert torch.equal(torch.cat(given.rows), torch.cat([base.T[::4], base.T[:2]]))


def test_keys_of_another_dtype_or_width_begin_another_buffer():
    given = Given()
    ring = Ring(4, given)
    ring.add(torch.ones(3, 2))
    ring.add(torch.ones(2, 2, dtype=torch.bfloat16))
    ring.add(torch.ones(1, 5, dtype=torch.bfloat16))
    ring.close()
    shapes = [(tuple(rows.shape), rows.dtype) for rows in given.rows]
    assert shapes == [((3, 2), torch.float32), ((2, 2), torch.bfloat16), ((1, 5), torch.bfloat16)]


def test_a_ring_of_nothing_is_refused():
    with pytest.raises(ValueError, match="size is 0"):
        Ring(0, print)
