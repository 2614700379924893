from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastcov import BadInput, SecondMoment, errors, moments
from reference import closed_form as literal


def keys(n=200, d=7, dtype=torch.float64, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_three_by_three_by_hand():
    moment = SecondMoment(3)
    moment.update(torch.tensor([[[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]], [[9.0, 9.0, 9.0]] * 2]),
                  torch.tensor([[True, True], [False, False]]))  # fmt: skip
    assert moment.count == 2
    assert moment.sum.tolist() == [[1, 2, 3], [2, 5, 6], [3, 6, 9]]
    assert moment.second_moment.tolist() == [[0.5, 1, 1.5], [1, 2.5, 3], [1.5, 3, 4.5]]


def test_streaming_equals_batch_equals_literal():
    X = keys()
    whole = SecondMoment(7, dtype=torch.float64).update(X)
    parts = SecondMoment(7, dtype=torch.float64)
    for part in X.split([1, 0, 60, 39, 100]):
        parts.update(part)
    assert parts.count == whole.count == 200
    torch.testing.assert_close(parts.second_moment, whole.second_moment, rtol=1e-14, atol=1e-14)
    wanted = torch.from_numpy(literal.second_moment(X.numpy()))
    torch.testing.assert_close(whole.second_moment, wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masked_keys_of_any_dtype(dtype):
    X = keys(60, 5, dtype=torch.float32).reshape(6, 10, 5).to(dtype)
    mask = torch.rand(6, 10, generator=torch.Generator().manual_seed(1)) < 0.4
    moment = SecondMoment(5).update(X, mask.long())
    assert moment.count == int(mask.sum())
    wanted = torch.from_numpy(literal.second_moment(X.double().numpy(), mask.numpy()))
    torch.testing.assert_close(moment.second_moment.double(), wanted, rtol=1e-6, atol=1e-6)


def test_keys_without_a_view_as_a_matrix_are_summed_as_well():
    X = keys(60, 5).reshape(6, 10, 5)[:, 1:]
    mask = torch.rand(6, 9, generator=torch.Generator().manual_seed(1)) < 0.4
    moment = SecondMoment(5, dtype=torch.float64).update(X, mask)
    assert moment.count == int(mask.sum())
    wanted = torch.from_numpy(literal.second_moment(X.numpy(), mask.numpy()))
    torch.testing.assert_close(moment.second_moment, wanted, rtol=1e-13, atol=1e-13)


def test_a_count_that_the_caller_has_is_taken_at_its_word():
    mask = torch.tensor([True, False, True])
    moment = SecondMoment(2)
    moment.add_rows(torch.ones(3, 2), mask, 2)
    assert moment.count == 2 and moment.sum.tolist() == [[2.0, 2.0]] * 2
    with pytest.raises((RuntimeError, NotImplementedError)):  # a device without numbers to read
        SecondMoment(2, device="meta").update(torch.ones(3, 2, device="meta"), mask.to("meta"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_sum_of_fourth_powers_of_the_norms(dtype, monkeypatch):
    monkeypatch.setattr(moments, "_NORMED", 7)
    X = keys(60, 5, dtype=torch.float32).reshape(6, 10, 5).to(dtype)
    mask = torch.rand(6, 10, generator=torch.Generator().manual_seed(1)) < 0.4
    moment = SecondMoment(5, quartic=True).update(X, mask.long()).update(X)
    wanted = X[mask].double().norm(dim=-1).pow(4).sum() + X.double().norm(dim=-1).pow(4).sum()
    assert moment.quartic.dtype == torch.float64 and moment.quartic.shape == ()
    torch.testing.assert_close(moment.quartic, wanted, rtol=1e-6, atol=0)


def test_norms_whose_squares_overflow_the_keys_do_not_overflow():
    large = SecondMoment(2, quartic=True).update(torch.full((3, 2), 3e4, dtype=torch.float16))
    assert large.quartic.item() == pytest.approx(3 * (2 * 3e4**2) ** 2, rel=1e-3)
    wide = SecondMoment(2, dtype=torch.float64, quartic=True).update(torch.full((3, 2), 1e30))
    assert wide.quartic.item() == pytest.approx(3 * 4e120, rel=1e-5)


def test_fourth_powers_are_unknown_where_one_part_does_not_know_them():
    X = keys()
    whole = SecondMoment(7, dtype=torch.float64, quartic=True).update(X)
    known = SecondMoment.from_lower(whole.lower, 200, float(whole.quartic))
    assert torch.equal(known.quartic, whole.quartic)
    unknown = SecondMoment.from_lower(whole.lower.clone(), 200)
    assert unknown.quartic is None and unknown.update(X).quartic is None
    assert unknown.to("meta").quartic is None and whole.to("meta").quartic is not None
    assert unknown.merge(whole).quartic is None
    assert SecondMoment(7, dtype=torch.float64).update(X).quartic is None  # nobody asked for them
    assert SecondMoment(7, dtype=torch.float64, quartic=True).merge(unknown).quartic is None


def test_merge_adds_sums_and_counts():
    X = keys()
    whole = SecondMoment(7, dtype=torch.float64, quartic=True).update(X)
    left = SecondMoment(7, dtype=torch.float64, quartic=True).update(X[:50])
    right = SecondMoment(7, dtype=torch.float32, quartic=True).update(X[50:])
    before = right.sum
    assert left.merge(right) is left and left.count == 200
    torch.testing.assert_close(left.sum, whole.sum, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(left.quartic, whole.quartic, rtol=1e-6, atol=0)
    assert torch.equal(right.sum, before) and right.count == 150


def test_readings_are_symmetric_whatever_is_above_the_diagonal(monkeypatch):
    monkeypatch.setattr(moments, "_MIRRORED", 3)
    moment = SecondMoment(7, dtype=torch.float64).update(keys())
    wanted = moment.sum
    above = torch.ones(7, 7, dtype=torch.bool).triu(1)
    spoilt = SecondMoment.from_lower(moment.lower.masked_fill(above, float("nan")), 200)
    assert torch.equal(spoilt.sum, wanted) and torch.equal(wanted, wanted.mT)
    assert torch.equal(spoilt.second_moment, wanted / 200)
    spoilt.update(keys()).merge(moment)
    torch.testing.assert_close(spoilt.sum, 3 * wanted, rtol=1e-13, atol=1e-12)


def test_readings_are_copies():
    moment = SecondMoment(3).update(torch.ones(2, 3))
    moment.sum.zero_()
    moment.second_moment.zero_()
    assert moment.second_moment.tolist() == [[1.0] * 3] * 3


def test_to_another_device_and_what_it_says():
    moment = SecondMoment(3).update(torch.ones(2, 3))
    assert moment.to("cpu") is moment
    moved = moment.to("meta")
    assert moved.device.type == "meta" and moved.count == 2 and moment.device.type == "cpu"
    assert repr(moment) == "SecondMoment(d=3, count=2, dtype=torch.float32, device='cpu')"


def test_bad_input_is_named():
    with pytest.raises(BadInput, match="no key"):
        _ = SecondMoment(3).second_moment
    with pytest.raises(ValueError, match="at least 1"):
        SecondMoment(0)
    with pytest.raises(ValueError, match="float16"):
        SecondMoment(3, dtype=torch.float16)
    with pytest.raises(BadInput, match="width 3"):
        SecondMoment(3).update(torch.ones(2, 4))
    with pytest.raises(BadInput, match="mask"):
        SecondMoment(3).update(torch.ones(2, 3), torch.ones(3))
    with pytest.raises(BadInput, match="width 4"):
        SecondMoment(3).merge(SecondMoment(4))
    with pytest.raises(BadInput, match="square"):
        SecondMoment.from_lower(torch.zeros(2, 3), 1)
    with pytest.raises(ValueError, match="-1"):
        SecondMoment.from_lower(torch.zeros(2, 2), -1)


def test_a_refused_update_changes_nothing():
    moment = SecondMoment(3).update(torch.ones(2, 3))
    with pytest.raises(BadInput):
        moment.update(torch.ones(2, 4))
    assert moment.count == 2 and moment.sum.tolist() == [[2.0] * 3] * 3


def test_all_reduce_of_one_process_is_nothing():
    assert SecondMoment(3).update(torch.ones(2, 3)).all_reduce().count == 2


WORKER = """
import sys, torch, torch.distributed as dist
from fastcov import (SecondMoment)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
moment = SecondMoment(3, quartic=True)
for _ in range(rank + 1):
    moment.update(torch.tensor([[1.0, 2.0, 3.0 + rank]]))
moment.all_reduce()
assert moment.count == 3, moment.count
assert abs(moment.quartic.item() - (14**2 + 2 * 21**2)) < 1e-3, moment.quartic
assert moment.sum.tolist() == [[3, 6, 11], [6, 12, 22], [11, 22, 41]], moment.sum
half = SecondMoment.from_lower(torch.eye(3), 1, 9.0 if rank else None).all_reduce()
assert half.count == 2 and half.quartic is None
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_all_reduce_of_two_processes(tmp_path):
    root = Path(__file__).parents[2]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path / "meeting")],
            env={**os.environ, "PYTHONPATH": str(root)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for worker in workers:
        _, said = worker.communicate(timeout=120)
        assert worker.returncode == 0, said


def test_errors_survive_pickling():
    error = errors.BudgetNotMet("short", found=3, wanted=5)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.found, again.wanted) == ("short", 3, 5)
    again = pickle.loads(pickle.dumps(errors.NotPositiveDefinite("no", tried=(0.0,), d=4)))
    assert (again.tried, again.d) == ((0.0,), 4)
