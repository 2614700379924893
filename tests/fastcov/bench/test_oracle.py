from __future__ import annotations

import math

import pytest
import torch

from fastcov.bench import oracle
from fastcov.bench.oracle import Gate, expected_lower, failure, gate, lower_error


def test_expected_lower_by_hand(monkeypatch):
    X = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    C = torch.tensor([[10.0, 99.0], [1.0, 20.0]])
    assert expected_lower(C, X).tril().tolist() == [[20.0, 0.0], [0.0, 25.0]]
    assert C.tolist() == [[10.0, 99.0], [1.0, 20.0]]
    monkeypatch.setattr(oracle, "_BLOCK", 1)
    monkeypatch.setattr(oracle, "_CHUNK_BYTES", 1)
    assert expected_lower(C, X).tril().tolist() == [[20.0, 0.0], [0.0, 25.0]]
    double = C.double()
    expected_lower(double, X)
    assert double.tolist() == C.tolist()  # a float64 sum is not added to in place


@pytest.mark.parametrize("block", [1, 2, 1024])
def test_errors_by_hand_and_the_upper_triangle_does_not_count(monkeypatch, block):
    monkeypatch.setattr(oracle, "_BLOCK", block)
    wanted = torch.tensor([[3.0, -7.0, 1.0], [0.0, 4.0, 5.0], [0.0, 0.0, 1.0]]).double()
    got = torch.tensor([[3.3, 50.0, 60.0], [0.4, 4.0, 70.0], [0.0, 0.0, 1.0]])
    error, bias = lower_error(got, wanted)
    assert error == pytest.approx(0.5 / 26**0.5, rel=1e-5)  # (0.3, 0.4) of (3, 4, 1)
    assert bias == pytest.approx(0.1 / 3, rel=1e-5)
    got[0, 0] = 2.7
    assert lower_error(got, wanted)[1] == pytest.approx(-0.1 / 3, rel=1e-5)


def test_the_gates_are_those_of_the_documents():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert gate(cpu, torch.float32) == Gate(error=1e-6)
    assert gate(cuda, torch.float32) == Gate(error=1e-5, bias=3e-6)
    assert gate(cuda, torch.float64) == Gate(error=1e-13)


def test_what_fails_a_gate():
    both = Gate(error=1e-5, bias=3e-6)
    assert failure(both, 1e-5, -3e-6) is None
    assert failure(both, 2e-5, 0.0) == "relative error 2e-05 is above 1e-05"
    assert failure(both, 1e-6, -4e-6) == "diagonal bias -4e-06 is beyond 3e-06"
    assert failure(both, math.nan, 0.0) is not None
    assert failure(both, 0.0, math.nan) is not None
    assert failure(Gate(error=1e-6), 1e-7, 1.0) is None


@pytest.mark.parametrize("block", [1, 1024])
def test_a_change_above_the_diagonal_is_seen(monkeypatch, block):
    monkeypatch.setattr(oracle, "_BLOCK", block)
    before = torch.ones(3, 3)
    C = before.clone()
    C[2, 0] = C[1, 1] = 5.0
    assert oracle.upper_is_untouched(C, before)
    C[1, 2] = 5.0
    assert not oracle.upper_is_untouched(C, before)
