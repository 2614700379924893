from __future__ import annotations

import pytest
import torch

from fastcov.bench import memory
from fastcov.bench.memory import peak_beyond

CPU = torch.device("cpu")


def test_the_peak_of_a_call_is_what_it_held_at_once():
    def run():
        first = torch.ones(64 << 20, dtype=torch.uint8)
        del first
        return torch.ones(96 << 20, dtype=torch.uint8)

    peak = peak_beyond(run, CPU)
    if peak is None:
        pytest.skip("this system does not let a process reset its high-water mark")
    assert 0.95 * (96 << 20) < peak < 1.3 * (96 << 20)


def test_memory_that_an_earlier_call_left_with_malloc_counts_again():
    def run():
        return [torch.ones(4 << 20, dtype=torch.uint8) for _ in range(16)]

    for _ in range(3):
        run()
    peak = peak_beyond(run, CPU)
    if peak is None:
        pytest.skip("this system does not let a process reset its high-water mark")
    assert 0.95 * (64 << 20) < peak < 1.3 * (64 << 20)


def test_where_it_cannot_be_measured_it_is_not(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "no folder" / "clear_refs")
    assert peak_beyond(lambda: None, CPU) is None
