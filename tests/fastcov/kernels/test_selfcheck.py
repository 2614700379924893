from __future__ import annotations

import logging
import re

import pytest
import torch

from fastcov import ops
from fastcov.kernels import gpu, plain
from tiny_kernels import offer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(gpu, "_failures", {})


def above(C):
    return torch.ones_like(C, dtype=torch.bool).triu(1)


def writes_above(C, X, mask, alpha):
    plain.reference(C, X, mask, alpha)
    C[0, 1] = 0.0


def forgets_the_mask(C, X, mask, alpha):
    plain.reference(C, X.nan_to_num(0.5), None, alpha)


def overwrites(C, X, mask, alpha):
    C.masked_fill_(~above(C), 0.0)
    plain.reference(C, X, mask, alpha)


def is_off_by_a_little(C, X, mask, alpha):
    plain.reference(C, X, mask, alpha * (1 + 3e-5))


def does_nothing(C, X, mask, alpha):
    pass


def is_wrong_without_a_mask(C, X, mask, alpha):
    plain.reference(C, X, mask, alpha if mask is not None else 2 * alpha)


def raises(C, X, mask, alpha):
    raise RuntimeError("no such instruction\nand a long story")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_right_kernel_passes(dtype):
    assert gpu.failure("right", plain.reference, CPU, dtype, 64) is None


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (writes_above, "above the diagonal"),
        (forgets_the_mask, "relative error"),
        (overwrites, "relative error"),
        (is_off_by_a_little, "relative error is [23]"),
        (does_nothing, "relative error"),
        (is_wrong_without_a_mask, "relative error"),
        (raises, r"fails there \(RuntimeError: no such instruction\)$"),
    ],
)
def test_a_wrong_kernel_fails_with_what_was_seen(run, words, caplog):
    with caplog.at_level(logging.WARNING, logger="fastcov"):
        found = gpu.failure("wrong", run, CPU, torch.float32, 64)
    assert found is not None
    assert re.search(words, found)
    assert "wrong" in caplog.text and "float32" in caplog.text


def test_the_check_runs_once_for_a_device_and_dtype(caplog):
    calls = []

    def run(*arguments):
        calls.append(1)

    with caplog.at_level(logging.WARNING, logger="fastcov"):
        for _ in range(3):
            assert gpu.failure("once", run, CPU, torch.float32, 64)
    assert len(calls) == 2 and len(caplog.records) == 1  # with a mask and without
    gpu.failure("once", run, CPU, torch.float16, 64)
    assert len(calls) == 4


def test_wide_keys_are_checked_on_their_own(monkeypatch):
    monkeypatch.setattr(gpu, "_WIDE", 1100)  # two blocks, quickly
    widths = []

    def wrong_where_wide(C, X, mask, alpha):
        widths.append(C.shape[0])
        plain.reference(C, X, mask, alpha)
        if C.shape[0] > 1000:
            C[1090, 3] += 100.0

    for _ in range(2):
        assert gpu.failure("wide", wrong_where_wide, CPU, torch.float32, 576) is None
        assert gpu.failure("wide", wrong_where_wide, CPU, torch.float32, 6400)
    assert widths == [400, 400, 1100, 1100]
    assert gpu.failure("fine", plain.reference, CPU, torch.float32, 6400) is None


def test_a_full_device_says_nothing_of_a_kernel():
    calls = []

    def full(*arguments):
        calls.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    for _ in range(2):
        assert gpu.failure("full", full, CPU, torch.float32, 64) is None
    assert len(calls) == 2  # and it is tried again


def test_the_check_moves_no_random_state():
    before = torch.get_rng_state()
    gpu.failure("right", plain.reference, CPU, torch.float32, 64)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_kernel_that_fails_its_check_is_not_chosen_but_can_be_named(monkeypatch):
    offer(monkeypatch, ops.Kernel("bad", does_nothing, lambda C=None, X=None: None, checked=True))
    C, X = torch.zeros(2, 2), torch.ones(1, 2)
    assert ops.chosen(C, X) == "reference"
    ops.rank_k_update(C, X)
    assert C[1, 0] == 1
    ops.rank_k_update(C, X, kernel="bad")
    assert C[1, 0] == 1


def test_a_choice_without_room_for_the_check_is_made_again(monkeypatch):
    calls = []

    def full(C, X, mask, alpha):
        calls.append(C.shape[0])
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    offer(monkeypatch, ops.Kernel("full", full, lambda C=None, X=None: None, checked=True))
    C, X = torch.zeros(2, 2), torch.ones(1, 2)
    assert ops.chosen(C, X) == "full"  # of which nothing is known
    assert ops.chosen(C, X) == "reference" and calls == [400, 400, 400]
