"""The rank-k update as a PyTorch operator, and the choice of the kernel that runs it.

The operator ``fastcov::rank_k_update`` is a schema and a fake; kernels register themselves with
what they need. The fastest one that can take the arguments runs. None is replaced in silence: one
asked for by name that cannot run raises, and `kernels` says why. On a GPU the order is the measured
one where there is a measurement (`fastcov.kernels.table`), and a kernel that is compiled for the
device shows a right result there before it is chosen (`fastcov.kernels.selfcheck`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastcov.errors import KernelUnavailable, WrongWidth
from fastcov.kernels import cpu, cuda, panels, reference, selfcheck, table, triton
from fastcov.keys import key_rows

# (C (d, d), X (n, d), mask (n,) bool or None, rows (m,) int64 or None, alpha): C changes in place.
Run = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, float], None]
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Kernel:
    """One implementation of the update.

    Attributes:
        name: What callers ask for.
        run: The update itself.
        missing: Why the kernel cannot run on this machine, or None if it can.
        refuses: Why the kernel cannot take these C and X, or None if it can.
        rank: Of the kernels that can run, the one of the highest rank is taken; one below 0 only by
            name.
        checked: Whether it must pass a check on the device before it is chosen.
        passed_over: Why the kernel is not chosen on this machine though it can run, or None.
    """

    name: str
    run: Run
    missing: Callable[[], str | None]
    refuses: Callable[[Tensor, Tensor], str | None]
    rank: int = 0
    checked: bool = False
    passed_over: Callable[[], str | None] = lambda: None


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

    Nothing above the diagonal of C is changed. Sums are never taken in less than float32: keys of
    16 bits are converted exactly, and float64 keys are rounded to the dtype of C.

    Args:
        C: The sum, shape (d, d), float32 or float64, with any strides.
        X: Keys as rows, shape (..., d), float32, float64, float16 or bfloat16, with any strides.
        mask: Rows to keep, shape (...), non-zero means kept.
        rows: Rows to keep, as int64 indices (m,) into the rows of X flattened in row-major order; a
            row named twice counts twice. Give a mask or rows, not both.
        alpha: A factor for what is added.
        kernel: The name of a kernel, see `kernels`; by default the best that can run.

    Raises:
        WrongWidth: C is not square, X is not as wide as C, or the mask does not fit X.
        ValueError: A dtype or device that does not fit, both mask and rows, or indices out of
            range.
        KernelUnavailable: The kernel asked for cannot run here or on these tensors.
    """
    if C.dim() != 2 or C.shape[0] != C.shape[1]:
        raise WrongWidth(f"C must be a square matrix but has shape {tuple(C.shape)}; pass (d, d).")
    if X.dim() == 0 or X.shape[-1] != C.shape[0]:
        raise WrongWidth(
            f"Keys of shape {tuple(X.shape)} do not fit a sum of width {C.shape[0]}; "
            "their last dimension must be that width."
        )
    if C.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"C must be float32 or float64 but is {C.dtype}; convert the sum.")
    if X.dtype not in _FLOATS:
        raise ValueError(
            f"Keys must be float32, float64, float16 or bfloat16 but are {X.dtype}; convert them."
        )
    if X.device != C.device:
        raise ValueError(
            f"The keys are on {X.device} and the sum is on {C.device}; move one to the other."
        )
    if mask is not None and rows is not None:
        raise ValueError("Both a mask and rows were given; pass one of them.")
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
        torch.ops.fastcov.rank_k_update(C, piece.detach(), kept, rows, float(alpha), kernel)


def _checked(rows: Tensor, X: Tensor) -> Tensor:
    if rows.dim() != 1 or rows.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"rows must be a list of indices, int64 (m,), but is {rows.dtype} "
            f"{tuple(rows.shape)}; pass mask for a mask."
        )
    # Only where it costs no wait for a device; an indexing kernel asserts there by itself.
    if rows.device.type == "cpu" and rows.numel():
        low, high = int(rows.min()), int(rows.max())
        if low < 0 or high >= X.shape[0]:
            raise ValueError(
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
        if kernel.checked and selfcheck.failure(
            kernel.name, kernel.run, C.device, X.dtype, C.shape[0]
        ):
            continue
        return kernel
    raise KernelUnavailable(
        f"No kernel takes keys {X.dtype} and a sum {C.dtype} on {C.device}; "
        "see fastcov.ops.kernels."
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
    chosen.run(C, X, mask, rows, alpha)


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
            _variant,
            _cpu.rank_k_update,
            _cpu.missing,
            _cpu.refuses,
            _rank,
            passed_over=_cpu.passed_over,
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
