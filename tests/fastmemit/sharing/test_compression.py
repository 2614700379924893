"""Fewer columns, the same change: against NumPy's singular values of the whole change."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastmemit.delta import Delta
from fastmemit.errors import BadConfig
from fastmemit.sharing import compose, compressed


def change(delta: Delta) -> np.ndarray:
    left, right = delta.factors["w"]
    return left.double().numpy() @ right.double().numpy().T


def random(rows: int, columns: int, rank: int) -> Delta:
    return Delta({"w": (torch.randn(rows, rank), torch.randn(columns, rank))}, {"method": "memit"})


@pytest.mark.parametrize(("rows", "columns"), [(6, 9), (9, 6)])
def test_more_columns_than_the_width_go_without_loss(rows: int, columns: int) -> None:
    delta = random(rows, columns, 20)
    small = compressed(delta)
    assert small.factors["w"][0].shape == (rows, 6) and small.factors["w"][1].shape == (columns, 6)
    np.testing.assert_allclose(change(small), change(delta), rtol=0, atol=1e-5)
    done = small.provenance["compression"]["w"]
    assert (done["from"], done["to"]) == (20, 6) and done["relative_error"] < 1e-7
    assert small.provenance["method"] == "memit"


def test_columns_that_repeat_are_found() -> None:
    left, right = torch.randn(30, 2), torch.randn(40, 2)
    delta = Delta({"w": (torch.cat([left, left], 1), torch.cat([right, -0.5 * right], 1))})
    small = compressed(delta)
    assert small.factors["w"][0].shape[1] == 2
    np.testing.assert_allclose(change(small), change(delta), atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_lower_rank_is_the_best_one_and_its_error_on_record(rank: int) -> None:
    delta = random(12, 10, 6)
    small = compressed(delta, rank=rank)
    u, values, vt = np.linalg.svd(change(delta))
    best = (u[:, :rank] * values[:rank]) @ vt[:rank]
    np.testing.assert_allclose(change(small), best, atol=1e-5)
    error = np.linalg.norm(change(delta) - best) / np.linalg.norm(change(delta))
    assert small.provenance["compression"]["w"]["relative_error"] == pytest.approx(error, rel=1e-6)


def test_what_needs_all_of_its_columns_stays_the_same_object() -> None:
    delta = random(12, 10, 6)
    assert compressed(delta) is delta and compressed(delta, rank=6) is delta
    mixed = Delta({**delta.factors, "v": (torch.ones(4, 3), torch.ones(5, 3))})
    small = compressed(mixed)
    assert small.factors["w"][0] is mixed.factors["w"][0]
    assert small.factors["v"][0].shape == (4, 1)
    assert list(small.provenance["compression"]) == ["v"]


def test_nothing_at_all_and_no_numbers() -> None:
    zero = Delta({"w": (torch.zeros(4, 3), torch.ones(5, 3))})
    assert compressed(zero).factors["w"][0].shape == (4, 1)
    assert not change(compressed(zero)).any()
    empty = Delta({"w": (torch.zeros(4, 0), torch.ones(5, 0))})
    assert compressed(empty) is empty
    broken = Delta({"w": (torch.full((4, 9), torch.nan), torch.ones(5, 9))})
    assert compressed(broken) is broken


def test_bad_settings() -> None:
    with pytest.raises(BadConfig, match="rank must be 1 or more but is 0"):
        compressed(random(3, 3, 2), rank=0)
    with pytest.raises(BadConfig, match="tolerance must be from 0"):
        compressed(random(3, 3, 2), tolerance=1.0)


def test_composing_can_compress() -> None:
    deltas = [random(6, 9, 5) for _ in range(3)]
    whole, small = compose(deltas), compressed(compose(deltas))
    assert whole.factors["w"][0].shape[1] == 15 and small.factors["w"][0].shape[1] == 6
    np.testing.assert_allclose(change(small), sum(map(change, deltas)), atol=1e-4)
