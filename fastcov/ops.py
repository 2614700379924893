"""The rank-k update as a PyTorch operator, and the choice of the kernel that runs it.

The operator ``fastcov::rank_k_update`` is a schema and a fake; kernels register themselves with
what they need. The fastest one that can take the arguments runs. None is replaced in silence: one asked for by name
that cannot run raises, and `kernels` says why. On a GPU the order is the measured one where there is a measurement
(`fastcov.kernels.table`), and a kernel that is compiled for the device shows a right result there before it is chosen
(`fastcov.kernels.selfcheck`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastcov.errors import BadInput, KernelUnavailable, WrongWidth
from fastcov.hooks import isolated, key_rows
from fastcov.inputs import matrix, shares_entries
from fastcov.kernels import cpu, cuda, panels, reference, selfcheck, table, triton

# (C (d, d), X (n, d), mask (n,) bool or None, rows (m,) int64 or None, alpha): C changes in place.
Run = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, float], None]
_EXACT = (0.0, 1.0, -1.0)  # values of alpha that make no sum larger or smaller
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Kernel:
    """One implementation of the update.

    Attributes:
        name: What callers ask for.
        run: The update itself.
        missing: Why the kernel cannot run on this machine, or None if it can.
        refuses: Why the kernel cannot take these C and X, or None if it can.
        rank: Of the kernels that can run, the one of the highest rank is taken; one below 0 only by name.
        checked: Whether it must pass a check on the device before it is chosen.
        passed_over: Why the kernel is not chosen on this machine though it can run, or None.
        native: Whether it reads memory itself, so that no setting of torch has a say in the sum.
    """

    name: str
    run: Run
    missing: Callable[[], str | None]
    refuses: Callable[[Tensor, Tensor], str | None]
    rank: int = 0
    checked: bool = False
    passed_over: Callable[[], str | None] = lambda: None
    native: bool = False


_KERNELS: dict[str, Kernel] = {}


def register(kernel: Kernel) -> None:
    """Offer a kernel; one of the same name is replaced."""
    _KERNELS[kernel.name] = kernel


def kernels() -> dict[str, str | None]:
    """All kernels by name, best first: None where it can run here, else the reason why not."""
    return {kernel.name: kernel.missing() for kernel in _ranked()}


def chosen(C: Tensor, X: Tensor) -> str:
    """The name of the kernel that an update of C (d, d) by keys X (..., d) would take.

    Raises:
        KernelUnavailable: None takes them.
    """
    return _chosen(C, X.reshape(-1, X.shape[-1])[:1]).name


def passed_over() -> dict[str, str]:
    """Kernels that can run here and are chosen only by name, with the reason."""
    reasons = {kernel.name: kernel.passed_over() for kernel in _ranked()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _ranked() -> list[Kernel]:
    return sorted(_KERNELS.values(), key=lambda kernel: -kernel.rank)


def rank_k_update(
    C: Tensor,
    X: Tensor,
    *,
    mask: Tensor | None = None,
    rows: Tensor | None = None,
    alpha: float = 1.0,
    kernel: str | None = None,
) -> None:
    """Add ``alpha * X^T X`` to the lower triangle of C, in place.

    Nothing above the diagonal of C is changed. Sums are never taken in less than float32: keys of 16 bits are converted
    exactly, and float64 keys are rounded to the dtype of C. No gradient is recorded.

    Args:
        C: The sum, shape (d, d), float32 or float64, with any strides that leave each entry a place of its own.
        X: Keys as rows, shape (..., d), float32, float64, float16 or bfloat16, with any strides, or a NumPy array. They
            may lie in C's own memory: they are then read before C changes.
        mask: Rows to keep, shape (...), non-zero means kept.
        rows: Rows to keep, as int64 indices (m,) into the rows of X flattened in row-major order; a row named twice
            counts twice. Give a mask or rows, not both.
        alpha: A factor for what is added, finite. Where the sum without it would overflow or underflow and with it does
            not, a power of two of it goes into the keys first.
        kernel: The name of a kernel, see `kernels`; by default the best that can run.

    Raises:
        WrongWidth: C is not square, X is not as wide as C, or the mask does not fit X.
        BadInput: A dtype or device that does not fit, a C whose entries share memory, keys that are no dense tensor,
            both mask and rows, indices out of range, or an alpha that is not finite.
        KernelUnavailable: The kernel asked for cannot run here or on these tensors.
    """
    C, X = _sum(C), matrix(X, "Keys", meta=True)
    if X.dim() == 0 or X.shape[-1] != C.shape[0]:
        raise WrongWidth(
            f"Keys of shape {tuple(X.shape)} do not fit a sum of width {C.shape[0]}; "
            "their last dimension must be that width."
        )
    if X.dtype not in _FLOATS:
        raise BadInput(f"Keys must be float32, float64, float16 or bfloat16 but are {X.dtype}; convert them.")
    if X.device != C.device:
        raise BadInput(f"The keys are on {X.device} and the sum is on {C.device}; move one to the other.")
    alpha = float(alpha)
    if not math.isfinite(alpha):
        raise BadInput(f"alpha must be a finite number but is {alpha}; 1 is usual.")
    if mask is not None and rows is not None:
        raise BadInput("Both a mask and rows were given; pass one of them.")
    if rows is not None:
        X = X.reshape(-1, X.shape[-1])  # (n, d): indices count in row-major order
        rows = _checked(rows, X)
        pieces: list[tuple[Tensor, Tensor | None]] = [(X, None)]
    else:
        pieces = list(key_rows(X, mask))  # (n, d), (n,): views, so nothing is copied
    for piece, kept in pieces:
        if kernel is not None:
            _named(kernel, C, piece)
        kept = None if kept is None else kept.to(X.device)
        torch.ops.fastcov.rank_k_update(C, piece, kept, rows, alpha, kernel)


def _sum(C: Tensor) -> Tensor:
    """C without its gradient, if it can be added to."""
    if not isinstance(C, Tensor) or C.layout is not torch.strided:
        what = str(C.layout) if isinstance(C, Tensor) else type(C).__name__
        raise BadInput(
            f"C must be a dense torch tensor, which changes in place, but is a {what}; pass one, "
            "or update a SecondMoment."
        )
    if C.dim() != 2 or C.shape[0] != C.shape[1]:
        raise WrongWidth(f"C must be a square matrix but has shape {tuple(C.shape)}; pass (d, d).")
    if C.dtype not in (torch.float32, torch.float64):
        raise BadInput(f"C must be float32 or float64 but is {C.dtype}; convert the sum.")
    if shares_entries(C):
        raise BadInput(
            f"Entries of C {tuple(C.shape)} share memory, as its strides {C.stride()} say, so "
            "nothing can be added to one of them alone; pass C.clone()."
        )
    return C.detach() if C.requires_grad else C


def _checked(rows: Tensor, X: Tensor) -> Tensor:
    if not isinstance(rows, Tensor):
        raise BadInput(
            f"rows must be an int64 tensor (m,) but is a {type(rows).__name__}; convert it with torch.as_tensor."
        )
    if rows.dim() != 1 or rows.dtype not in (torch.int64, torch.int32):
        raise BadInput(
            f"rows must be a list of indices, int64 (m,), but is {rows.dtype} "
            f"{tuple(rows.shape)}; pass mask for a mask."
        )
    # Only where it costs no wait for a device; an indexing kernel asserts there by itself.
    if rows.device.type == "cpu" and rows.numel():
        low, high = int(rows.min()), int(rows.max())
        if low < 0 or high >= X.shape[0]:
            raise BadInput(
                f"rows go from {low} to {high} but there are {X.shape[0]} rows of keys; "
                f"pass indices from 0 to {X.shape[0] - 1}."
            )
    return rows.to(device=X.device, dtype=torch.int64)


def _named(name: str, C: Tensor, X: Tensor) -> Kernel:
    if name not in _KERNELS:
        raise KernelUnavailable(f"There is no kernel {name!r}; there are {', '.join(_KERNELS)}.")
    kernel = _KERNELS[name]
    reason = kernel.missing() or kernel.refuses(C, X)
    if reason is not None:
        raise KernelUnavailable(f"The kernel {name!r} cannot run: {reason}; name another or none.")
    return kernel


def _chosen(C: Tensor, X: Tensor) -> Kernel:
    ranked = [kernel for kernel in _ranked() if kernel.rank >= 0]
    if C.device.type == "cuda":
        # Kernels that were measured on this device come first, in the order of their times.
        order = table.order(C.device, X.dtype, C.shape[0])
        measured = {name: place for place, name in enumerate(order)}
        ranked.sort(key=lambda kernel: measured.get(kernel.name, len(measured)))
    for kernel in ranked:
        if kernel.missing() is not None or kernel.refuses(C, X) is not None:
            continue
        if kernel.name == "triton" and triton.interpreting():
            continue  # it could, and would take hours
        if kernel.passed_over() is not None:
            continue
        if kernel.checked and selfcheck.failure(kernel.name, kernel.run, C.device, X.dtype, C.shape[0]):
            continue
        return kernel
    raise KernelUnavailable(
        f"No kernel takes keys {X.dtype} and a sum {C.dtype} on {C.device}; see fastcov.ops.kernels."
    )


def _run(
    C: Tensor,
    X: Tensor,
    mask: Tensor | None = None,
    rows: Tensor | None = None,
    alpha: float = 1.0,
    kernel: str | None = None,
) -> None:
    chosen = _chosen(C, X) if kernel is None else _named(kernel, C, X)
    if X.untyped_storage().data_ptr() == C.untyped_storage().data_ptr():
        X = X.clone()
    if alpha not in _EXACT:
        X, alpha = _balanced(C, X, alpha)
    if chosen.native:
        chosen.run(C, X, mask, rows, alpha)
    else:
        # A sum that was made under inference mode can be added to there alone.
        inference = torch.inference_mode() if C.is_inference() else nullcontext()
        with isolated(), inference:
            chosen.run(C, X, mask, rows, alpha)


def _balanced(C: Tensor, X: Tensor, alpha: float) -> tuple[Tensor, float]:
    """Keys and alpha, with powers of two moved from one to the other where X^T X alone is too much.

    An alpha from 1 to below 4 is left: a sum that overflows before it is multiplied by that would do so afterwards.
    """
    info = torch.finfo(C.dtype)
    if X.numel() == 0 or torch.finfo(X.dtype).max < info.max**0.5:
        return X, alpha
    largest = float(X.abs().amax())
    # Written so that NaN and infinity, which may stand in rows that are not kept, change nothing.
    safe = info.tiny / info.eps <= largest * largest and largest * largest * len(X) < info.max
    if safe or not 0 < largest < math.inf:
        return X, alpha
    half = (math.frexp(alpha)[1] - 1) // 2
    return X * 2.0**half, math.ldexp(alpha, -2 * half)


def _fake(
    C: Tensor,
    X: Tensor,
    mask: Tensor | None = None,
    rows: Tensor | None = None,
    alpha: float = 1.0,
    kernel: str | None = None,
) -> None:
    """Nothing to say about outputs: the operator has none."""


# Not torch.library.custom_op: its first call imports torch._dynamo, which takes more than a second.
# The registration lives as long as this object. Its class is untyped, hence Any.
_library: Any = torch.library.Library
_LIBRARY = _library("fastcov", "DEF")
_LIBRARY.define(
    "rank_k_update(Tensor(a!) C, Tensor X, Tensor? mask=None, Tensor? rows=None, "
    "float alpha=1.0, str? kernel=None) -> ()"
)
_LIBRARY.impl("rank_k_update", _run, "CompositeExplicitAutograd")
torch.library.register_fake("fastcov::rank_k_update", _fake, lib=_LIBRARY)
for _rank, _variant in zip((50, 40, 30, 20, -1), cpu.VARIANTS, strict=True):
    _cpu = cpu.CpuKernel(_variant)
    register(
        Kernel(
            _variant, _cpu.rank_k_update, _cpu.missing, _cpu.refuses, _rank, passed_over=_cpu.passed_over, native=True
        )
    )
for _rank, _module in ((12, triton), (8, panels), (4, cuda), (0, reference)):
    register(
        Kernel(
            name=_module.__name__.rpartition(".")[2],
            run=_module.rank_k_update,
            missing=_module.missing,
            refuses=_module.refuses,
            rank=_rank,
            checked=_module in (triton, cuda),
        )
    )
