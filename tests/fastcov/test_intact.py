"""What an exception leaves of hooks, replaced forwards and modes: what was there before."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastcov.hooks import evaluation_mode


class Boom(BaseException):
    pass


def test_new_hooks_go_and_former_ones_stay() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    called: list[str] = []
    model[0].register_forward_hook(lambda *_: called.append("former"))
    with pytest.raises(Boom), evaluation_mode(model):
        model[0].register_forward_hook(lambda *_: called.append("new"))
        model[1].register_forward_pre_hook(lambda *_, **__: called.append("pre"), with_kwargs=True)
        model[1].register_forward_hook(lambda *_: called.append("always"), always_call=True)
        model.register_full_backward_hook(lambda *_: called.append("back"))
        raise Boom
    model(torch.ones(1, 2)).sum().backward()
    assert called == ["former"]
    for module in model.modules():
        assert not module._forward_pre_hooks_with_kwargs and not module._forward_hooks_always_called


def test_forwards_modes_and_gradients_are_as_before() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.Linear(2, 2))
    model[1].eval()
    model[2].weight.requires_grad_(False)
    own = model[2].forward
    model[2].forward = own  # as accelerate sets one on the instance
    with pytest.raises(Boom), evaluation_mode(model):
        model[0].forward = model[2].forward = lambda x: x
        model.eval()
        model[1].train()
        model.requires_grad_(False)
        raise Boom
    assert "forward" not in model[0].__dict__ and model[2].__dict__["forward"] is own
    assert [module.training for module in model.modules()] == [True, True, False, True]
    asks = [parameter.requires_grad for parameter in model.parameters()]
    assert asks == [True, True, False, True]


def test_where_nothing_is_raised_hooks_stay() -> None:
    model = nn.Linear(2, 2)
    with evaluation_mode(model):
        handle = model.register_forward_hook(lambda *_: None)
        model.eval()
    assert list(model._forward_hooks) == [handle.id] and model.training  # only the mode is as it was


def test_evaluation_mode_takes_hooks_along_when_it_is_interrupted() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(Boom), evaluation_mode(model):
        assert not model.training and not model[0].training
        model[0].register_forward_hook(lambda *_: None)
        raise Boom
    assert model.training and model[0].training and not model[0]._forward_hooks
