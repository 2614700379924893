"""Where a state is put back: the module whose output it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from fastmemit.errors import UnknownArchitecture
from fastmemit.models import ModelAdapter, hidden_of, with_hidden
from fastmemit.models.structure import linear_shape
from fastmemit.tracing.settings import Kind


def restored_module(adapter: ModelAdapter, kind: Kind, layer: int) -> nn.Module:
    """The module whose output is a layer's hidden state, MLP output or attention output.

    The MLP's output is that of the edited projection, its last linear map.

    Raises:
        BadLayer: The model has no such layer.
        UnknownArchitecture: The block's attention cannot be told.
    """
    if kind == "hidden":
        return adapter.block(layer)
    return adapter.projection(layer) if kind == "mlp" else _attention(adapter.block(layer))


def _attention(block: nn.Module) -> nn.Module:
    """The part of a block that is named after attention and has linear maps, as norms do not."""
    found = {
        name: part
        for name, part in block.named_children()
        if any(word in f"{name} {type(part).__name__}".lower() for word in ("attn", "attention"))
        and any(linear_shape(inner) is not None for inner in part.modules())
    }
    if len(found) != 1:
        parts = ", ".join(found or dict(block.named_children()))
        raise UnknownArchitecture(
            f"The attention of {type(block).__name__} is not clear (found {parts}); trace the "
            "other kinds with --kinds mlp,hidden."
        )
    return next(iter(found.values()))


@contextmanager
def replaced_output(
    module: nn.Module,
    shape: tuple[int, int],
    value: Tensor,  # (rows, d)
) -> Iterator[None]:
    """Put `value` in place of the module's output at the first token inside the block.

    Args:
        module: The module.
        shape: (rows, tokens) of the batch; some blocks (OPT) flatten these before their MLP.
        value: What to put there.
    """

    def put(_module: nn.Module, _args: object, out: object) -> object:
        hidden = hidden_of(out)
        changed = hidden.reshape(*shape, -1).clone()
        changed[:, 0] = value.to(changed)
        return with_hidden(out, changed.reshape(hidden.shape))

    handle = module.register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()
