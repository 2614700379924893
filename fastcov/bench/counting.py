"""Floating-point operations of what torch runs, counted as it runs."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_Mode: Any = TorchDispatchMode  # untyped


class CountFlops(_Mode):  # type: ignore[misc]
    """Counts the products of a model's forward pass inside of the context.

    Attention counts where torch knows its cost. The operators of this package do not count: what
    they do is known from the shapes.

    Attributes:
        total: Operations so far, a multiply-add being two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator, and add what it costs."""
        kwargs = kwargs or {}
        counter = flop_registry.get(func._overloadpacket)
        if counter is None and func.namespace == "aten":
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if counter is not None:
            self.total += int(counter(*args, **kwargs, out_val=out))
        return out
