"""Products of few rows with a model's matrices, on a CPU: what a short text costs.

Such a product reads a whole matrix from memory for a handful of rows. A library packs the matrix first, as it must for
many rows, and here that takes most of the time. `SkinnyProducts` puts kernels of our own (csrc/cpu/skinny.h) in its
place, forwards and backwards, for as long as it is entered (measured: docs/results/performance.md).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastcov.kernels.cpu import native

_SMALLEST = 1 << 16  # numbers of a matrix, below which a call costs more than it saves
_PLAIN = (Tensor, nn.Parameter)


def skinny_products(model: nn.Module) -> AbstractContextManager[object]:
    """`SkinnyProducts`, or nothing where no parameter of the model could use it."""
    usable = _kernel() is not None and any(_fits(p) for p in model.parameters())
    return SkinnyProducts() if usable else nullcontext()


class SkinnyProducts(TorchFunctionMode):
    """Inside, ``linear`` and ``addmm`` of few rows of float32 on a CPU are computed by our kernels.

    Matrices that ask for a gradient are left to torch, and so is whatever the kernels do not take. Results differ from
    torch's by rounding. Of the running thread alone.
    """

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Called by torch for each of its functions."""
        if not kwargs:
            if func is nn.functional.linear and len(args) in (2, 3):
                x, weight, bias = (*args, None)[:3]
                if _takes(x, weight, weight.shape[-1], bias):
                    y = _multiplied(x.reshape(-1, x.shape[-1]), weight, False).reshape(*x.shape[:-1], -1)
                    return y if bias is None else y + bias
            elif func is torch.addmm and len(args) == 3:
                bias, x, weight = args
                if x.dim() == 2 and bias.dim() == 1 and _takes(x, weight, weight.shape[0], bias):
                    return _multiplied(x, weight, True) + bias
        return func(*args, **(kwargs or {}))


class _Product(torch.autograd.Function):
    """x (m, k) with W: x W^T, or x W where `across`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, across: bool) -> Tensor:
        ctx.weight, ctx.across = weight, across
        return product(x, weight, across=across)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return product(gradient, ctx.weight, across=not ctx.across), None, None


_multiplied: Callable[[Tensor, Tensor, bool], Tensor] = _Product.apply


def product(x: Tensor, weight: Tensor, *, across: bool = False) -> Tensor:
    """``x W^T`` (m, n) of x (m, k) and W (n, k), or ``x W`` (m, k) of x (m, n) where `across`; float32, on the CPU.

    x has at least one row and at most those that the kernel takes; W's columns lie side by side.

    Raises:
        RuntimeError: x has more rows than the kernel takes.
    """
    kernel, module = _kernel(), native()
    assert kernel is not None and module is not None
    x = x.contiguous()
    n, k = weight.shape
    y = torch.empty(len(x), k if across else n)
    module.cpu_skinny(
        variant=kernel[0], x=x.data_ptr(), x_stride=x.stride(0), m=len(x), w=weight.data_ptr(),
        w_stride=weight.stride(0), n=n, k=k, y=y.data_ptr(), across=across, threads=torch.get_num_threads(),
    )  # fmt: skip
    return y


@functools.cache
def _kernel() -> tuple[str, int] | None:
    """The fastest kernel of this machine and how many rows it takes; None where there is none."""
    module = native()
    found = [] if module is None else module.cpu_skinny_most()
    return next(((name, most) for name, most in found if name != "portable"), None)


def _takes(x: Any, weight: Any, width: int, bias: Any) -> bool:
    """Whether the kernel takes the product of x (..., width) with this matrix, and a bias behind it."""
    kernel = _kernel()
    return (
        kernel is not None
        and type(x) in _PLAIN
        and (bias is None or (type(bias) in _PLAIN and bias.dtype is torch.float32))
        and x.dim() > 0
        and x.shape[-1] == width
        and 0 < x.numel() <= kernel[1] * width
        and x.dtype is torch.float32
        and x.device.type == "cpu"
        and _fits(weight)
        and not (torch.is_grad_enabled() and weight.requires_grad)
        and not torch.is_autocast_enabled("cpu")
    )


def _fits(weight: Any) -> bool:
    return (
        type(weight) in _PLAIN
        and weight.dim() == 2
        and weight.dtype is torch.float32
        and weight.device.type == "cpu"
        and weight.numel() >= _SMALLEST
        and weight.stride(1) == 1
        and weight.stride(0) >= weight.shape[1]
    )
