"""The bits below each edit of a weight, from few copies: as if there were a copy for each."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

import fastmemit.edits as chain_module
from fastmemit.delta import add_low_rank
from fastmemit.edits import COPIES, PINNED, Chain
from fastmemit.errors import BadUndo
from fastmemit.models import checksum


class Weight:
    """A weight under a chain, beside a list of all the bits that it ever had."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.draw = torch.Generator().manual_seed(0)
        self.bits = torch.randn(8, 5, generator=self.draw).to(dtype)
        self.copies = [self.bits.clone()]
        self.chain = Chain(self.bits)
        self.owners: list[object] = []

    def push(self) -> None:
        covered = self.chain.covered(self.bits)
        assert torch.equal(covered, self.copies[-1])
        factors = (torch.randn(8, 2, generator=self.draw), torch.randn(5, 2, generator=self.draw))
        add_low_rank(self.bits, *factors)
        self.owners.append(object())
        self.chain.add(self.owners[-1], factors, self.bits, checksum(self.bits))
        self.copies.append(self.bits.clone())

    def pop(self) -> None:
        self.copies.pop()
        before = self.chain.before()
        assert torch.equal(before, self.copies[-1])
        self.bits.copy_(before)
        self.chain.cut(self.owners.pop())

    def held(self) -> int:
        return len(self.chain._copies)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_all_bits_come_back_from_few_copies(dtype: torch.dtype) -> None:
    weight = Weight(dtype)
    for _ in range(60):
        weight.push()
        assert weight.held() <= 1 + COPIES
    for _ in range(60):
        weight.pop()
        assert weight.held() <= 1 + COPIES
    assert len(weight.chain) == 0 and len(weight.copies) == 1


def test_pushes_and_pops_in_any_order_give_the_bits() -> None:
    weight, draw = Weight(), random.Random(0)
    for _ in range(400):
        if weight.owners and draw.random() < 0.48:
            weight.pop()
        else:
            weight.push()
        assert weight.held() <= 1 + COPIES


def test_going_back_through_many_edits_does_not_begin_at_the_bottom_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, additions = Weight(), 0

    def counted(bits: Tensor, left: Tensor, right: Tensor) -> None:
        nonlocal additions
        additions += 1
        add_low_rank(bits, left, right)

    monkeypatch.setattr(chain_module, "add_low_rank", counted)
    n = 400
    for _ in range(n):
        weight.push()
    assert additions <= n  # each was added again once, to see that this gives the same bits
    additions = 0
    for _ in range(n):
        weight.pop()
    assert additions < n * 30  # from the bottom each time it would be n * n / 2 = n * 200


def test_bits_that_adding_again_does_not_give_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = Weight()

    def otherwise(bits: Tensor, left: Tensor, right: Tensor) -> None:
        add_low_rank(bits, left, right)
        bits[0, 0] += 1  # as a device does that adds in another order each time

    monkeypatch.setattr(chain_module, "add_low_rank", otherwise)
    for _ in range(PINNED + 1):
        weight.push()
    with pytest.raises(BadUndo, match="does not give the same bits twice"):
        weight.push()
    assert torch.equal(weight.bits, weight.copies[-1])
    for _ in range(PINNED + 1):
        weight.pop()
    weight.push()


def test_bits_that_cannot_be_computed_again_are_refused_and_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = Weight()
    for _ in range(20):
        weight.push()
    with monkeypatch.context() as patch:

        def otherwise(bits: Tensor, left: Tensor, right: Tensor) -> None:
            add_low_rank(bits, left, right)
            bits[0, 0] += 1

        patch.setattr(chain_module, "add_low_rank", otherwise)
        weight.pop()  # from a copy
        with pytest.raises(BadUndo, match="cannot be computed again bit for bit"):
            while True:
                weight.chain.before()
                weight.pop()
    assert len(weight.chain) == len(weight.owners) > 5
    while weight.owners:
        weight.pop()


def test_the_number_of_threads_is_that_of_the_time_of_the_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = Weight()

    def by_threads(bits: Tensor, left: Tensor, right: Tensor) -> None:
        plain(bits, left, right)
        bits[0, 0] += torch.get_num_threads()

    plain, threads = add_low_rank, torch.get_num_threads()
    monkeypatch.setattr(chain_module, "add_low_rank", by_threads)
    monkeypatch.setitem(globals(), "add_low_rank", by_threads)
    try:
        torch.set_num_threads(2)
        for _ in range(10):
            weight.push()
        torch.set_num_threads(1)
        for _ in range(10):
            weight.pop()
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


def test_an_edit_that_is_not_on_top_is_not_cut() -> None:
    weight = Weight()
    weight.push()
    weight.push()
    weight.chain.cut(weight.owners[0])
    weight.chain.cut(object())
    assert len(weight.chain) == 2
    weight.pop()
    weight.pop()
