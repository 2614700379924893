"""The rank-k update as a PyTorch operator, and the choice of the kernel that runs it.

The operator ``fastcov::rank_k_update`` is a schema and a fake. Of the kernels of a device type the first that can take
the arguments runs; the choice is made once for tensors of the same devices, dtypes, width and strides. None is replaced
in silence: one asked for by name that cannot run raises, and `kernels` says why. On a GPU those that were measured
there come first, in the order of their times (`fastcov.kernels.gpu`), and a kernel that is compiled for the device
shows a right result before it is chosen.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastcov.errors import BadInput, KernelUnavailable
from fastcov.hooks import isolated, key_rows, matrix, shares_entries
from fastcov.kernels import cpu, cuda, gpu, plain, triton

log = logging.getLogger(__name__)

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class WhyNot(Protocol):
    """Why a kernel cannot run on this machine, or cannot take these tensors; None if it can."""

    def __call__(self, C: Tensor | None = None, X: Tensor | None = None, /) -> str | None: ...  # noqa: D102


@dataclass(frozen=True)
class Kernel:
    """One implementation of the update."""

    name: str  # what callers ask for
    update: gpu.Update  # (C (d, d), X (n, d), mask (n,) bool or None, alpha), C changes in place
    why_not: WhyNot
    not_preferred: Callable[[], str | None] = lambda: None  # why it is not chosen on this machine though it can run
    checked: bool = False  # whether it must pass a check on the device before it is chosen
    native: bool = False  # whether it reads memory itself, so that no setting of torch has a say in the sum


#: All kernels, best first.
KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        *(Kernel(one.name, one.update, one.why_not, one.not_preferred, native=True) for one in cpu.FAST),
        Kernel("triton", triton.update, triton.why_not, checked=True),
        Kernel("panels", plain.panels, plain.panels_why_not),
        Kernel("cuda", cuda.update, cuda.why_not, checked=True),
        Kernel("reference", plain.reference, lambda C=None, X=None: None),
        Kernel(cpu.PORTABLE.name, cpu.PORTABLE.update, cpu.PORTABLE.why_not, native=True),
    )
}
#: By the type of the device, those that are chosen without being named, best first; elsewhere the reference.
ORDER = {"cpu": (*(one.name for one in cpu.FAST), "reference"), "cuda": ("triton", "panels", "cuda", "reference")}
_chosen: dict[tuple[Any, ...], Kernel] = {}  # by all that the choice depends on
_MANY = 4096  # choices to remember


def kernels() -> dict[str, str | None]:
    """All kernels by name, best first: None where it can run here, else the reason why not."""
    return {name: kernel.why_not() for name, kernel in KERNELS.items()}


def not_preferred() -> dict[str, str]:
    """Kernels that can run here and are chosen only by name, with the reason."""
    reasons = {name: kernel.not_preferred() for name, kernel in KERNELS.items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def chosen(C: Tensor, X: Tensor) -> str:
    """The name of the kernel that an update of C (d, d) by keys X (..., d) would take.

    Raises:
        KernelUnavailable: None takes them.
    """
    return _choice(C, X.reshape(-1, X.shape[-1])[:1], None).name


def rank_k_update(
    C: Tensor, X: Tensor, *, mask: Tensor | None = None, alpha: float = 1.0, kernel: str | None = None
) -> None:
    """Add ``alpha * X^T X`` to the lower triangle of C, in place.

    Nothing above the diagonal of C is changed. Sums are never taken in less than float32: keys of 16 bits are converted
    exactly, and float64 keys are rounded to the dtype of C. No gradient is recorded.

    Args:
        C: The sum, shape (d, d), float32 or float64, with any strides that leave each entry a place of its own.
        X: Keys as rows, shape (..., d), float32, float64, float16 or bfloat16, with any strides, or a NumPy array. They
            may lie in C's own memory: they are then read before C changes.
        mask: Rows to keep, shape (...), non-zero means kept.
        alpha: A factor for what is added, finite. Where the sum without it would overflow or underflow and with it does
            not, a power of two of it goes into the keys first.
        kernel: The name of a kernel, see `kernels`; by default the best that can run.

    Raises:
        BadInput: A shape, dtype or device that does not fit, a C whose entries share memory, or an alpha that is not
            finite.
        KernelUnavailable: The kernel asked for cannot run here or on these tensors.
    """
    C, X = _sum(C), matrix(X, "Keys", meta=True)
    check_keys(C, X)
    alpha = float(alpha)
    if not math.isfinite(alpha):
        raise BadInput(f"alpha must be a finite number but is {alpha}; 1 is usual.")
    for piece, kept in key_rows(X, mask):  # (n, d), (n,): views, so nothing is copied
        if kernel is not None:
            _choice(C, piece, kernel)  # or an error: on the device meta the operator itself would not see
        torch.ops.fastcov.rank_k_update(C, piece, None if kept is None else kept.to(X.device), alpha, kernel)


def check_keys(C: Tensor, X: Tensor) -> None:
    """Refuse keys (..., d) of a width, dtype or device that does not go with a sum (d, d), as BadInput."""
    if X.dim() == 0 or X.shape[-1] != C.shape[0]:
        raise BadInput(
            f"Keys of shape {tuple(X.shape)} do not fit a sum of width {C.shape[0]}; "
            "their last dimension must be that width."
        )
    if X.dtype not in _FLOATS:
        raise BadInput(f"Keys must be float32, float64, float16 or bfloat16 but are {X.dtype}; convert them.")
    if X.device != C.device:
        raise BadInput(f"The keys are on {X.device} and the sum is on {C.device}; move one to the other.")


def _sum(C: Tensor) -> Tensor:
    """C without its gradient, if it can be added to."""
    if not isinstance(C, Tensor) or C.layout is not torch.strided:
        what = str(C.layout) if isinstance(C, Tensor) else type(C).__name__
        raise BadInput(
            f"C must be a dense torch tensor, which changes in place, but is a {what}; pass one, "
            "or update a SecondMoment."
        )
    if C.dim() != 2 or C.shape[0] != C.shape[1]:
        raise BadInput(f"C must be a square matrix but has shape {tuple(C.shape)}; pass (d, d).")
    if C.dtype not in (torch.float32, torch.float64):
        raise BadInput(f"C must be float32 or float64 but is {C.dtype}; convert the sum.")
    if shares_entries(C):
        raise BadInput(
            f"Entries of C {tuple(C.shape)} share memory, as its strides {C.stride()} say, so "
            "nothing can be added to one of them alone; pass C.clone()."
        )
    return C.detach() if C.requires_grad else C


def _choice(C: Tensor, X: Tensor, name: str | None) -> Kernel:
    """The kernel of this name, or the best one; found out once for tensors of one kind."""
    key = (name, C.device, X.device, C.dtype, X.dtype, C.shape[0], C.stride(), X.stride(), X.shape[0] >> 31)
    found = _chosen.get(key)
    if found is None:
        found, final = _best(C, X) if name is None else (_named(name, C, X), True)
        if final:
            if len(_chosen) >= _MANY:
                _chosen.clear()
            _chosen[key] = found
    return found


def _named(name: str, C: Tensor, X: Tensor) -> Kernel:
    if name not in KERNELS:
        raise KernelUnavailable(f"There is no kernel {name!r}; there are {', '.join(KERNELS)}.")
    if (reason := KERNELS[name].why_not(C, X)) is not None:
        raise KernelUnavailable(f"The kernel {name!r} cannot run: {reason}; name another or none.")
    return KERNELS[name]


def _best(C: Tensor, X: Tensor) -> tuple[Kernel, bool]:
    """The first kernel in the order that takes them, and whether it was checked as far as it must be."""
    order = ORDER.get(C.device.type, ("reference",))
    if C.device.type == "cuda":
        measured = gpu.order(C.device, X.dtype, C.shape[0])
        order = (*(name for name in measured if name in order), *(name for name in order if name not in measured))
    for name in order:
        kernel = KERNELS[name]
        if kernel.why_not(C, X) is not None or kernel.not_preferred() is not None:
            continue
        if not kernel.checked:
            return kernel, True
        if not gpu.failure(name, kernel.update, C.device, X.dtype, C.shape[0]):
            return kernel, gpu.done(name, C.device, X.dtype, C.shape[0])
    raise KernelUnavailable(
        f"No kernel takes keys {X.dtype} and a sum {C.dtype} on {C.device}; see fastcov.ops.kernels."
    )


def _run(C: Tensor, X: Tensor, mask: Tensor | None = None, alpha: float = 1.0, kernel: str | None = None) -> None:
    found = _choice(C, X, kernel)
    if kernel is None and C.is_cpu and not found.native and cpu.native_missing():
        _say_once()
    if X.untyped_storage().data_ptr() == C.untyped_storage().data_ptr():
        X = X.clone()
    if alpha not in (0.0, 1.0, -1.0):  # which make no sum larger or smaller
        X, alpha = _balanced(C, X, alpha)
    if found.native:
        found.update(C, X, mask, alpha)
    else:
        # A sum that was made under inference mode can be added to there alone.
        with isolated(), torch.inference_mode() if C.is_inference() else nullcontext():
            found.update(C, X, mask, alpha)


@functools.cache
def _say_once() -> None:
    """Say that the native kernels are missing: pip shows nothing of what setup.py said."""
    log.warning(
        "fastcov sums keys through torch here, more slowly: %s. `python -m fastcov` says which kernels run.",
        cpu.native_missing(),
    )


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


# Not torch.library.custom_op: its first call imports torch._dynamo, which takes more than a second.
# The registration lives as long as this object. Its class is untyped, hence Any.
_library: Any = torch.library.Library
_LIBRARY = _library("fastcov", "DEF")
_LIBRARY.define("rank_k_update(Tensor(a!) C, Tensor X, Tensor? mask=None, float alpha=1.0, str? kernel=None) -> ()")
_LIBRARY.impl("rank_k_update", _run, "CompositeExplicitAutograd")
torch.library.register_fake("fastcov::rank_k_update", lambda *given, **named: None, lib=_LIBRARY)  # no outputs
