from __future__ import annotations

import dis
import random
import sys

import numpy as np
import pytest
import torch
from torch import nn

import fastcov
from fastcov.hooks import evaluation_mode, isolated, random_state_kept
from fastcov.moments import shrunk
from torch_states import STATES, random_states, settings


@pytest.mark.parametrize("name", STATES)
def test_isolated_is_torch_as_imported_and_all_comes_back(name):
    plain = settings() | {"grad": False}
    with STATES[name]():
        before = settings()
        with isolated():
            inside = settings()
            with isolated():  # nested
                assert settings() == inside
        assert settings() == before
        with pytest.raises(ZeroDivisionError), isolated(gradients=True):
            assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
            raise ZeroDivisionError
        assert settings() == before
    # What is left to the caller, and what older torch shows of settings that are "none" by default.
    for field in ("deterministic", "autocast dtype", "function modes", "fp32"):
        inside.pop(field), plain.pop(field)
    assert inside == plain


class Interrupt:
    """Raise at the n-th place in `isolated` where CPython looks for signals: as a call begins, and behind one."""

    def __init__(self, left):
        self.left, self.last = left, ""

    def __call__(self, frame, event, _):
        if not frame.f_code.co_filename.endswith("hooks.py") or frame.f_code.co_name == "inside":
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            last, self.last = self.last, dis.opname[frame.f_code.co_code[frame.f_lasti]]
        if event == "call" or (event == "opcode" and last == "CALL"):
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self


@pytest.mark.parametrize("name", STATES)
def test_all_comes_back_wherever_an_interrupt_stops_isolated(name):
    def work():
        with torch.no_grad():
            return 1

    def stopped():
        torch.set_grad_enabled(False)  # as torch.no_grad leaves it where it is stopped on the way out
        raise KeyboardInterrupt

    for gradients in (False, True):
        with STATES[name]():
            before = settings()
            places = Interrupt(-1)
            sys.settrace(places)
            isolated(gradients=gradients)(work)()
            sys.settrace(None)
            assert -places.left - 1 > 8
            for place in range(1, -places.left):
                sys.settrace(Interrupt(place))
                try:
                    with pytest.raises(KeyboardInterrupt):
                        isolated(gradients=gradients)(work)()
                finally:
                    sys.settrace(None)
                assert settings() == before, place
            with pytest.raises(KeyboardInterrupt):
                isolated(gradients=gradients)(stopped)()
            assert settings() == before


def test_isolated_can_be_entered_again_after_it_was_left():
    apart = isolated()
    for _ in range(2):
        with apart:
            assert not torch.is_grad_enabled()
        with pytest.raises(ZeroDivisionError), apart:
            assert not torch.is_grad_enabled()
            raise ZeroDivisionError
        assert torch.is_grad_enabled()


def test_isolated_decorates_functions_that_call_themselves():
    seen = []

    @isolated(gradients=True)
    def recursive(depth):
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return recursive(depth - 1) if depth else torch.ones(1)

    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert not recursive(2).is_inference()
        assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
    assert seen == [(True, False)] * 3


def half_trained():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)))
    model.eval()
    model[1][0].train()
    model[0].weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("frozen", [False, True])
def test_evaluation_mode_gives_every_flag_back(frozen):
    model = half_trained()
    before = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    with pytest.raises(ZeroDivisionError), evaluation_mode(model, frozen=frozen):
        assert not any(module.training for module in model.modules())
        assert any(p.requires_grad for p in model.parameters()) is not frozen
        raise ZeroDivisionError
    assert before == ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()])


def test_random_states_come_back_and_a_seed_decides_inside():
    before = random_states()
    drawn = []
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), random_state_kept(7):
            drawn.append(torch.rand(3).tolist())
            random.random(), np.random.rand()
            raise ZeroDivisionError
        assert random_states() == before
    assert drawn[0] == drawn[1] == torch.rand(3, generator=torch.Generator().manual_seed(7)).tolist()


# Every public numeric function of fastcov, from the same numbers to bits that can be compared.


def _numbers():
    draw = torch.Generator().manual_seed(0)
    X = torch.randn(60, 6, generator=draw, dtype=torch.float32, device="cpu")
    K = torch.randn(6, 2, generator=draw, dtype=torch.float32, device="cpu")
    R = torch.randn(3, 2, generator=draw, dtype=torch.float32, device="cpu")
    return X, K, R


with torch.no_grad():
    X, K, R = _numbers()
    MOMENT = fastcov.SecondMoment(6, quartic=True).update(X)
    A = fastcov.regularised(MOMENT, 2.0, 0.1, torch.float32)
    FACTOR = fastcov.factorize(A.clone())
    NULL = fastcov.null_space(MOMENT, relative=1.0)


def _updated(kernel):
    with isolated():
        C = A.clone()
    fastcov.rank_k_update(C, X, kernel=kernel)
    with isolated():
        return [C.tril()]


def _collected():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) % 5 - number)
    batches = [{"input": X[:30]}, {"input": X[30:]}]
    return model, batches


with torch.no_grad():
    MODEL, BATCHES = _collected()


def _hooked():
    keys = []
    with fastcov.KeyHooks(MODEL, ["1"], lambda _name, x: keys.append(x.clone())) as hooks:
        hooks.run(BATCHES[0])
    return keys


def _low(change):
    return [change.left, change.right, change.dense()]


FUNCTIONS = {
    "rank_k_update": lambda: _updated(None),
    "rank_k_update by the reference": lambda: _updated("reference"),
    "SecondMoment": lambda: [fastcov.SecondMoment(6).update(X).update(X[:5]).second_moment],
    "merge": lambda: [fastcov.SecondMoment(6).merge(MOMENT).sum],
    "regularised": lambda: [fastcov.regularised(MOMENT, 2.0, 0.1, shrinkage=0.1)],
    "shrunk": lambda: [shrunk(MOMENT, 0.3)],
    "oas": lambda: [fastcov.oas(MOMENT), fastcov.ledoit_wolf(MOMENT)],
    "factorize": lambda: [fastcov.factorize(A).L, fastcov.factorize(A).logdet()],
    "solve": lambda: [FACTOR.solve(K), *FACTOR.solve_and_gram(K)],
    "memit": lambda: _low(fastcov.closed_form.memit(FACTOR, K, R)),
    "emmet": lambda: _low(fastcov.closed_form.emmet(FACTOR, K, R, 0.1)),
    "rome": lambda: _low(fastcov.closed_form.rome(FACTOR, K[:, 0], R[:, 0])),
    "null_space": lambda: [fastcov.null_space(MOMENT, relative=1.0).projector()],
    "alphaedit": lambda: _low(fastcov.alphaedit(NULL, K, R, 10.0, X[:4].T)),
    "collect": lambda: [m.sum for m in fastcov.collect_moments(MODEL, ["0", "1"], BATCHES, 40).values()],
    "collect in bfloat16": lambda: [
        m.sum for m in fastcov.collect_moments(MODEL, ["0", "1"], BATCHES, 40, forward=torch.bfloat16).values()
    ],
    "KeyHooks": _hooked,
    "StoppingRule": lambda: [
        float(fastcov.StoppingRule().update(m)) for m in (MOMENT, fastcov.SecondMoment(6).merge(MOMENT))
    ],
}


@pytest.fixture(scope="module")
def plain():
    return {name: function() for name, function in FUNCTIONS.items()}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_setting_of_the_caller_changes_a_bit(name, state, plain):
    seeds = random_states()
    with STATES[state]():
        before = settings()
        got = FUNCTIONS[name]()
        assert settings() == before
    assert random_states() == seeds
    for value, wanted in zip(got, plain[name], strict=True):
        if isinstance(wanted, float):
            assert value == wanted
        else:
            assert value.dtype == wanted.dtype and torch.equal(value, wanted)
            assert not value.is_inference() and not value.requires_grad


def test_batches_are_made_with_the_settings_of_the_caller():
    def batches():
        assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float64
        yield {"input": X}

    torch.set_default_dtype(torch.float64)
    try:
        fastcov.collect_moments(MODEL, ["0"], batches(), None)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_model_of_inference_tensors_is_read():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        model.load_state_dict(MODEL.state_dict())
    (moment,) = fastcov.collect_moments(model, ["1"], BATCHES, 40).values()
    (wanted,) = fastcov.collect_moments(MODEL, ["1"], BATCHES, 40).values()
    assert torch.equal(moment.sum, wanted.sum)


def test_a_sum_that_was_made_under_inference_mode_is_added_to_outside():
    with torch.inference_mode():
        C, moment = torch.zeros(6, 6), fastcov.SecondMoment(6)
        taken = fastcov.SecondMoment.from_lower(torch.zeros(6, 6), 0)
    for kernel in (None, "reference"):
        fastcov.rank_k_update(C, X, kernel=kernel)
    wanted = torch.zeros(6, 6)
    for kernel in (None, "reference"):
        fastcov.rank_k_update(wanted, X, kernel=kernel)
    assert torch.equal(C, wanted)
    assert torch.equal(moment.update(X).sum, MOMENT.sum)
    assert torch.equal(taken.update(X).sum, MOMENT.sum)
