"""Intensities of shrinkage: those of scikit-learn and of the papers, from a moment alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastcov import BadInput, NonFinite, SecondMoment, ledoit_wolf, moments, oas
from fastcov.moments import shrunk
from reference import shrinkage as literal
from reference import stopping as literal_solution

SHAPES = [(5, 12), (12, 12), (13, 12), (40, 12), (3000, 12), (7, 1), (2, 30)]


def keys(n, d, seed=0, tail=False):
    """Keys that are not centred, of falling scales; heavy tails on request."""
    draw = np.random.default_rng(seed)
    X = draw.normal(size=(n, d)) / np.sqrt(np.arange(1, d + 1)) + 0.3
    return torch.from_numpy(X * (1 + 5 * draw.random((n, 1)) ** 8) if tail else X)


def moment_of(X, **settings):
    return SecondMoment(X.shape[1], dtype=torch.float64, quartic=True).update(X, **settings)


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_the_intensities_are_those_of_scikit_learn(n, d, tail):
    covariance = pytest.importorskip("sklearn.covariance")
    X = keys(n, d, tail=tail)
    moment = moment_of(X)
    for ours, theirs in ((ledoit_wolf, covariance.ledoit_wolf), (oas, covariance.oas)):
        wanted, intensity = theirs(X.numpy(), assume_centered=True)
        assert ours(moment) == pytest.approx(intensity, rel=1e-9, abs=1e-12)
        got = shrunk(moment.second_moment, ours(moment))
        torch.testing.assert_close(got, torch.from_numpy(np.atleast_2d(wanted)))


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize(("n", "d"), [shape for shape in SHAPES if shape[1] > 1])
def test_the_intensities_are_those_of_the_papers(n, d, tail):
    X = keys(n, d, seed=1, tail=tail)
    assert ledoit_wolf(moment_of(X)) == pytest.approx(literal.ledoit_wolf(X.numpy()), rel=1e-9)
    assert oas(moment_of(X)) == pytest.approx(literal.oas(X.numpy()), rel=1e-9)


def test_heavy_tails_are_seen_by_ledoit_wolf_alone():
    gaussian = torch.randn(400, 20, dtype=torch.float64)
    lengths = torch.ones(400, 1, dtype=torch.float64)
    lengths[::40] = 10.0  # one in forty is ten times as long
    even, uneven = moment_of(gaussian), moment_of(gaussian * lengths)
    assert ledoit_wolf(even) == pytest.approx(oas(even), rel=0.1)
    assert ledoit_wolf(uneven) > 3 * oas(uneven)


def test_streaming_equals_batch_and_masked_keys_do_not_count():
    X = keys(90, 8, tail=True)
    parts = SecondMoment(8, dtype=torch.float64, quartic=True)
    for part in X.split([1, 0, 40, 49]):
        parts.update(part)
    mask = torch.arange(180) % 2 == 0
    spoilt = torch.full((180, 8), math.nan, dtype=torch.float64)
    spoilt[mask] = X
    masked = SecondMoment(8, dtype=torch.float64, quartic=True)
    # The kernels leave out masked rows and do not multiply them; so does the sum of norms.
    masked.update(spoilt.reshape(9, 20, 8), mask.reshape(9, 20))
    halves = moment_of(X[:30]).merge(moment_of(X[30:]))
    for intensity in (ledoit_wolf, oas):
        wanted = intensity(moment_of(X))
        for moment in (parts, masked, halves):
            assert intensity(moment) == pytest.approx(wanted, rel=1e-12)


def test_the_sums_are_taken_block_by_block(monkeypatch):
    moment = moment_of(keys(30, 17))
    wanted = ledoit_wolf(moment), oas(moment)
    monkeypatch.setattr(moments, "_SQUARED", 5)
    moment.lower[torch.ones(17, 17).triu(1).bool()] = math.nan  # nobody reads these
    assert (ledoit_wolf(moment), oas(moment)) == pytest.approx(wanted, rel=1e-12)


def test_a_float32_sum_is_enough():
    X = keys(200, 16)
    moment = SecondMoment(16, quartic=True).update(X.float())
    assert ledoit_wolf(moment) == pytest.approx(literal.ledoit_wolf(X.numpy()), rel=1e-4)
    huge = SecondMoment(16, quartic=True).update((X * 1e13).float())  # squares of its sums pass float32
    assert oas(huge) == pytest.approx(oas(moment), rel=1e-4)


def test_without_shrinkage_as_many_keys_as_the_width_are_the_worst_number():
    d = 64
    true = 1 / torch.arange(1, d + 1, dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    X = torch.randn(3 * d + 100, d, generator=draw, dtype=torch.float64) * true.sqrt()
    fresh, C = X[-100:].numpy(), torch.diag(true).numpy()

    def excess(n, intensity=None, ridge=0.0):
        moment = moment_of(X[:n])
        S = shrunk(moment.second_moment, 0.0 if intensity is None else intensity(moment))
        S.diagonal().add_((1e-8 + ridge) * S.diagonal().mean())
        return literal_solution.excess(S.numpy(), C, fresh)

    few, peak, many = (excess(n) for n in (d // 2, d, 3 * d))
    assert peak > 10 * few and peak > 10 * many
    assert excess(d, ridge=1e-2) < peak / 10
    for n in (d // 2, d, 3 * d):
        for intensity in (ledoit_wolf, oas):
            assert excess(n, intensity) < excess(n)


def test_nothing_to_shrink():
    one = SecondMoment(3, quartic=True).update(torch.tensor([[1.0, 2.0, 3.0]]))
    assert ledoit_wolf(one) < 1e-6  # S is that key's own product: nothing says it is noise
    round_ = SecondMoment(2, quartic=True).update(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert (ledoit_wolf(round_), oas(round_)) == (0.0, 1.0)


def test_shrunk_by_hand_and_in_place():
    C = torch.tensor([[1.0, math.nan], [0.5, 3.0]])  # the lower triangle alone
    got = shrunk(C, 0.25)
    assert got.tril().tolist() == [[1.25, 0.0], [0.375, 2.75]]
    assert C.tril().tolist() == [[1.0, 0.0], [0.5, 3.0]]
    assert shrunk(C, 0.25, in_place=True) is C and torch.equal(C.tril(), got.tril())
    full = keys(20, 4).T @ keys(20, 4)
    wanted = torch.from_numpy(literal.shrunk(full.numpy(), 0.3))
    torch.testing.assert_close(shrunk(full, 0.3), wanted)
    assert shrunk(full, 1.0).equal(full.diagonal().mean() * torch.eye(4, dtype=torch.float64))
    assert shrunk(full, 0.0).equal(full)


def test_bad_input_is_named():
    for intensity in (ledoit_wolf, oas):
        with pytest.raises(BadInput, match="width 3"):
            intensity(SecondMoment(3))
        with pytest.raises(NonFinite, match="width 2"):
            intensity(SecondMoment.from_lower(torch.full((2, 2), math.nan), 3, 1.0))
    known = SecondMoment(2, quartic=True).update(torch.randn(5, 2))
    unknown = SecondMoment.from_lower(known.lower, 5)
    assert 0 < oas(unknown) <= 1
    for moment in (unknown, SecondMoment(2).update(torch.randn(5, 2))):
        with pytest.raises(BadInput, match=r"without quartic=True.*precompute --quartic"):
            ledoit_wolf(moment)
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="from 0 to 1"):
            shrunk(torch.eye(2), bad)
    with pytest.raises(BadInput, match="square"):
        shrunk(torch.ones(2, 3), 0.5)
