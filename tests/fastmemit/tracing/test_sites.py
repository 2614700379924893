"""The modules whose outputs are restored."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastmemit.models import find_adapter
from fastmemit.tracing import replaced_output, restored_module
from tiny_models import ARCHITECTURES, tiny_model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_block_adds_up_from_the_modules(architecture: str) -> None:
    """Without attention, MLP and their norms nothing but the stream passes through a block."""
    model = tiny_model(architecture)
    adapter = find_adapter(model)
    seen: list[torch.Tensor] = []
    block = adapter.block(1)
    ids = torch.tensor([[4, 5, 6]])

    def zero(_module: nn.Module, _args: object, out: object) -> object:
        if isinstance(out, tuple):
            return (torch.zeros_like(out[0]), *out[1:])
        return torch.zeros_like(out)  # type: ignore[call-overload]  # a hook is given a tensor

    for kind in ("mlp", "attention"):
        restored_module(adapter, kind, 1).register_forward_hook(zero)  # type: ignore[arg-type]  # a Kind's words as a str
    block.register_forward_pre_hook(
        lambda _m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    block.register_forward_hook(lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(ids)
    assert torch.equal(seen[0], seen[1])
    assert restored_module(adapter, "hidden", 1) is block


@pytest.mark.parametrize("shape", [(2, 3, 4), (6, 4)])
@pytest.mark.parametrize("as_tuple", [False, True])
def test_the_first_token_is_replaced(shape: tuple[int, ...], as_tuple: bool) -> None:
    class Whole(nn.Module):
        def forward(self, x: torch.Tensor) -> object:
            return (x, "more") if as_tuple else x

    module, x, value = Whole(), torch.randn(2, 3, 4), torch.randn(2, 4)
    with replaced_output(module, (2, 3), value):
        out = module(x.reshape(shape))
    if as_tuple:
        assert out[1] == "more"
        out = out[0]
    assert out.shape == shape
    expected = x.clone()
    expected[:, 0] = value
    assert torch.equal(out.reshape(2, 3, 4), expected)
    again = module(x.reshape(shape))
    assert torch.equal((again[0] if as_tuple else again).reshape(2, 3, 4), x)
