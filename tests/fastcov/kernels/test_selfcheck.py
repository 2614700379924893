from __future__ import annotations

import logging
import re

import pytest
import torch

from fastcov import ops
from fastcov.kernels import reference, selfcheck

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(selfcheck, "_failures", {})


def above(C):
    return torch.ones_like(C, dtype=torch.bool).triu(1)


def writes_above(C, X, mask, rows, alpha):
    reference.rank_k_update(C, X, mask, rows, alpha)
    C[0, 1] = 0.0


def forgets_the_mask(C, X, mask, rows, alpha):
    reference.rank_k_update(C, X.nan_to_num(0.5), None, rows, alpha)


def overwrites(C, X, mask, rows, alpha):
    C.masked_fill_(~above(C), 0.0)
    reference.rank_k_update(C, X, mask, rows, alpha)


def is_off_by_a_little(C, X, mask, rows, alpha):
    reference.rank_k_update(C, X, mask, rows, alpha * (1 + 3e-5))


def does_nothing(C, X, mask, rows, alpha):
    pass


def raises(C, X, mask, rows, alpha):
    raise RuntimeError("no such instruction\nand a long story")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_right_kernel_passes(dtype):
    assert selfcheck.failure("right", reference.rank_k_update, CPU, dtype) is None


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (writes_above, "above the diagonal"),
        (forgets_the_mask, "relative error"),
        (overwrites, "relative error"),
        (is_off_by_a_little, "relative error is [23]"),
        (does_nothing, "relative error"),
        (raises, r"fails there \(RuntimeError: no such instruction\)$"),
    ],
)
def test_a_wrong_kernel_fails_with_what_was_seen(run, words, caplog):
    with caplog.at_level(logging.WARNING, logger="fastcov"):
        found = selfcheck.failure("wrong", run, CPU, torch.float32)
    assert found is not None
    assert re.search(words, found)
    assert "wrong" in caplog.text and "float32" in caplog.text


def test_the_check_runs_once_for_a_device_and_dtype(caplog):
    calls = []

    def run(*arguments):
        calls.append(1)

    with caplog.at_level(logging.WARNING, logger="fastcov"):
        for _ in range(3):
            assert selfcheck.failure("once", run, CPU, torch.float32)
    assert len(calls) == 1 and len(caplog.records) == 1
    selfcheck.failure("once", run, CPU, torch.float16)
    assert len(calls) == 2


def test_the_check_moves_no_random_state():
    before = torch.get_rng_state()
    selfcheck.failure("right", reference.rank_k_update, CPU, torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_kernel_that_fails_its_check_is_not_chosen_but_can_be_named(monkeypatch):
    monkeypatch.setattr(ops, "_KERNELS", {"reference": ops._KERNELS["reference"]})
    ops.register(
        ops.Kernel("bad", does_nothing, lambda: None, lambda C, X: None, rank=9, checked=True)
    )
    C, X = torch.zeros(2, 2), torch.ones(1, 2)
    assert ops.chosen(C, X) == "reference"
    ops.rank_k_update(C, X)
    assert C[1, 0] == 1
    ops.rank_k_update(C, X, kernel="bad")
    assert C[1, 0] == 1
