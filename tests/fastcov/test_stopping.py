"""When to stop collecting: against keys whose true second moment is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastcov import BadInput, SecondMoment, sizing
from fastcov.sizing import StoppingRule, checkpoints
from reference import stopping as literal

D = 128


def spectrum(power=1.0, d=D):
    return 1 / torch.arange(1, d + 1, dtype=torch.float64) ** power


def gaussian(n, true, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, len(true), generator=draw, dtype=torch.float64) * true.sqrt()


def looked_at(rule, X, sizes, dtype=torch.float64):
    """What the rule says of the moment after each number of keys, until it says stop."""
    moment, said = SecondMoment(X.shape[1], dtype=dtype), []
    for n in sizes:
        moment.update(X[moment.count : n])
        said.append(rule.update(moment))
        if said[-1]:
            break
    return said


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_the_excess_is_the_true_distance_of_the_solution(power):
    true = spectrum(power)
    X, fresh = gaussian(8 * D, true), gaussian(100, true, seed=1).numpy()
    rule = StoppingRule(tolerance=1e-9, limit=9, probes=256)
    looked_at(rule, X, [round(m * D) for m in (1.5, 2, 3, 5, 8)])
    for look in rule.looks[1:]:
        S = (X[: look.keys].T @ X[: look.keys] / look.keys).numpy()
        wanted = literal.excess(S, np.diag(true.numpy()), fresh)
        law = (D - 1) / (look.keys - D)
        assert look.excess == pytest.approx(wanted, rel=0.15)
        assert look.excess == pytest.approx(law, rel=0.15)
        assert look.worth == pytest.approx(1, abs=0.1)


def test_with_a_ridge_the_distance_is_that_of_the_ridged_solution():
    true, ridge = spectrum(2.0), 1e-2
    X, fresh = gaussian(8 * D, true), gaussian(100, true, seed=1).numpy()
    rule = StoppingRule(tolerance=1e-9, limit=9, relative_ridge=ridge, probes=256)
    looked_at(rule, X, [D // 2, D, 2 * D, 4 * D])
    plain = StoppingRule(tolerance=1e-9, limit=9, probes=256)
    looked_at(plain, X, [D // 2, D, 2 * D, 4 * D])
    for ridged, bare in zip(rule.looks[1:], plain.looks[1:], strict=True):
        S = (X[: ridged.keys].T @ X[: ridged.keys] / ridged.keys).numpy()
        S, C = (M + ridge * np.mean(np.diag(M)) * np.eye(D) for M in (S, np.diag(true.numpy())))
        # With a ridge the two are no longer one number: what is measured errs to the high side.
        assert 0.9 < ridged.excess / literal.excess(S, C, fresh) < 1.5
        assert ridged.excess < 0.6 * bare.excess


@pytest.mark.parametrize("ridge", [0.0, 1e-2])
def test_a_leverage_is_that_of_the_keys_themselves(ridge):
    X = gaussian(600, spectrum())
    rule = StoppingRule(tolerance=1e-9, relative_ridge=ridge, probes=1000)
    looked_at(rule, X, [250, 600])
    wanted = literal.leverage(X[:250].numpy(), X[250:].numpy(), ridge)
    assert rule.looks[1].leverage == pytest.approx(wanted, rel=0.02)
    assert math.isnan(rule.looks[0].leverage) and rule.looks[0].excess == math.inf
    assert rule.looks[1].worth == pytest.approx((1 - 1 / wanted) * 250 / D, rel=0.02)
    assert rule.looks[1].multiplier == 600 / D


@pytest.mark.parametrize(("tolerance", "stops"), [(0.7, 3), (0.4, 4), (0.15, 8), (0.01, 10)])
def test_it_stops_where_the_law_is_within_the_tolerance(tolerance, stops):
    rule = StoppingRule(tolerance=tolerance)
    sizes = [m * D for m in (1, 2, 3, 4, 5, 6, 8, 10)]
    said = looked_at(rule, gaussian(10 * D, spectrum()), sizes)
    assert said.index(True) == sizes.index(stops * D)
    assert rule.looks[said.index(True)].excess <= tolerance or stops == 10
    assert rule.converged == (tolerance > 0.01)


def test_keys_that_say_the_same_twice_are_half_as_many():
    X = gaussian(4 * D, spectrum()).repeat_interleave(2, 0)  # (8 D, d)
    rule = StoppingRule(tolerance=0.6)
    sizes = [2 * D + 64, 3 * D, 4 * D, 5 * D, 6 * D, 8 * D]
    said = looked_at(rule, X, sizes)
    assert said.index(True) == sizes.index(6 * D)  # 3 of independent keys
    assert rule.looks[-1].worth == pytest.approx(2, abs=0.25)


def test_topics_of_documents_make_it_collect_more():
    draw = torch.Generator().manual_seed(2)
    true = spectrum(1.0, 64)
    topics = torch.randn(100, 1, 64, generator=draw, dtype=torch.float64)
    own = torch.randn(100, 20, 64, generator=draw, dtype=torch.float64)
    X = ((topics + own) * true.sqrt()).reshape(-1, 64)
    rules = StoppingRule(tolerance=0.3, limit=30), StoppingRule(tolerance=0.3, limit=30)
    sizes = checkpoints(64, 30)
    needed = [
        sizes[looked_at(rule, keys, sizes).index(True)]
        for rule, keys in zip(rules, (X, gaussian(2000, true)), strict=True)
    ]
    assert needed[0] >= 2 * needed[1]


def test_the_limit_ends_it_whatever_was_seen():
    rule = StoppingRule(tolerance=1e-6, limit=2.0)
    assert looked_at(rule, gaussian(300, spectrum()), [200, 255, 256]) == [False, False, True]
    assert not rule.converged and len(rule.looks) == 3
    few = StoppingRule(limit=0.5)
    assert looked_at(few, gaussian(64, spectrum()), [32, 64]) == [False, True]
    assert [look.excess for look in few.looks] == [math.inf, math.inf]


def test_coordinates_that_are_always_zero_do_not_keep_it_from_stopping(caplog):
    X = gaussian(6 * D, spectrum())
    X[:, 5] = 0
    rule = StoppingRule(tolerance=0.4)
    said = looked_at(rule, X, [m * D for m in (2, 3, 4, 5, 6)])
    assert said.index(True) == 2
    zero = SecondMoment(4).update(torch.zeros(10, 4))
    nothing = StoppingRule()
    assert not nothing.update(zero)
    assert not nothing.update(zero.update(torch.zeros(10, 4))) and not nothing.converged


def test_a_float32_sum_of_one_triangle_is_enough(monkeypatch):
    X = gaussian(3 * D, spectrum())
    wanted, got = StoppingRule(tolerance=1e-9), StoppingRule(tolerance=1e-9)
    looked_at(wanted, X, [2 * D, 3 * D])
    monkeypatch.setattr(sizing, "_BLOCK", 50)
    moment = SecondMoment(D)
    moment.lower[torch.ones(D, D).triu(1).bool()] = math.nan
    for part in (X[: 2 * D], X[2 * D :]):
        got.update(moment.update(part.float()))
    assert got.looks[1].excess == pytest.approx(wanted.looks[1].excess, rel=1e-3)


def test_what_is_held_between_two_looks_is_no_matrix_and_decisions_repeat():
    X = gaussian(4 * D, spectrum())
    rules = [StoppingRule(tolerance=1e-9, probes=8) for _ in range(2)]
    for rule in rules:
        looked_at(rule, X, [2 * D, 3 * D])
        assert rule._before.V.numel() == 8 * D
    assert rules[0].looks[1] == rules[1].looks[1]
    moment = SecondMoment(D).update(X.float())
    before = moment.lower.clone()
    StoppingRule().update(moment)
    assert torch.equal(moment.lower, before) and moment.count == 4 * D


def test_checkpoints():
    assert checkpoints(100) == [100, 150, 200, 300, 400, 500, 600, 800, 1000]
    assert checkpoints(100, 2.5) == [100, 150, 200, 250]
    assert checkpoints(100, 25)[-3:] == [1500, 2000, 2500]
    assert checkpoints(100, 0.5) == [50] and checkpoints(100, 120)[-2:] == [10000, 12000]
    assert checkpoints(1536, 10)[-1] == 15360
    with pytest.raises(BadInput):
        checkpoints(100, 0)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="tolerance"):
        StoppingRule(tolerance=0)
    with pytest.raises(ValueError, match="tolerance"):
        StoppingRule(tolerance=math.nan)
    with pytest.raises(ValueError, match="probe"):
        StoppingRule(probes=0)
    with pytest.raises(BadInput, match="multiplier"):
        StoppingRule(limit=-1)
    rule = StoppingRule()
    moment = SecondMoment(4).update(torch.randn(10, 4))
    rule.update(moment)
    with pytest.raises(BadInput, match="10 keys and had 10"):
        rule.update(moment)
    with pytest.raises(BadInput, match="5 wide"):
        rule.update(SecondMoment(5).update(torch.randn(20, 5)))
