"""The kernels of a CPU, in C++ (csrc/cpu): the rank-k update, one for each instruction set; which multiplies few rows.

Rows are read where they lie, through a list of offsets: what a mask leaves out is neither copied nor looked at. Keys
are converted while they are packed into panels, products are summed in the dtype of C, and only tiles that reach the
lower triangle are computed. Threads are those of torch: ``torch.set_num_threads`` is obeyed.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any, NamedTuple

# torch first: the native module then shares the OpenMP runtime that torch has loaded, and with it torch's threads.
import torch
from torch import Tensor

# The codes of csrc/cpu/rank_k.h.
_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
# Pairs of bfloat16 are taken only where they are multiplied this much faster than float32. Zen 5
# was measured at twice the rate, a Xeon with AMX at half of it: nothing lies near.
_PAIRS_PAY = 1.2
_RATE_SECONDS = 3e-4


@functools.cache
def native() -> Any:
    """The module ``fastcov._native``, or None where it is not there or does not load (`native_missing`)."""
    return None if native_missing() else importlib.import_module("fastcov._native")


@functools.cache
def native_missing() -> str | None:
    """Why there is no native module, as a clause; None where there is one."""
    try:
        importlib.import_module("fastcov._native")
    except ModuleNotFoundError:
        return "the native module is not installed (there was no C++ compiler, or FASTCOV_SKIP_NATIVE was set)"
    except ImportError as error:
        return f"the native module does not load ({error})"
    return None


@dataclass(frozen=True)
class CpuKernel:
    """The native kernel for the instruction set of this name."""

    name: str

    def why_not(self, C: Tensor | None = None, X: Tensor | None = None) -> str | None:
        """Why it cannot run on this machine, or not with a sum C (d, d) and keys X (n, d); None if it can."""
        reason = _missing(self.name)
        if reason is not None or C is None or X is None:
            return reason
        if C.device.type != "cpu":
            return f"it runs on the CPU and the sum is on {C.device}"
        if self.name == "avx512_bf16" and (X.dtype != torch.bfloat16 or C.dtype != torch.float32):
            return f"it takes bfloat16 keys and a float32 sum, not {X.dtype} and {C.dtype}"
        if self.name == "amx_bf16" and C.dtype != torch.float32:
            return f"it takes a float32 sum, not {C.dtype}"
        return None

    def not_preferred(self) -> str | None:
        """Why it is not chosen on this machine though it can run, or None."""
        if self.name != "avx512_bf16" or _missing(self.name) is not None:
            return None
        ratio = _rate_of_pairs()
        if ratio >= _PAIRS_PAY:
            return None
        return f"pairs of bfloat16 are multiplied at {ratio:.1f} times the rate of float32 here"

    def update(self, C: Tensor, X: Tensor, mask: Tensor | None, alpha: float) -> None:
        """Lower triangle of C (d, d) += alpha * X^T X over the kept rows of X (n, d), in place."""
        offsets = _offsets(X, mask)  # (m,)
        native().cpu_rank_k(
            variant=self.name, x=X.data_ptr(), x_dtype=_CODES[X.dtype], x_column_stride=X.stride(1),
            offsets=offsets.data_ptr(), rows=offsets.shape[0], d=X.shape[1],
            c=C.data_ptr(), c_dtype=_CODES[C.dtype], c_row_stride=C.stride(0), c_column_stride=C.stride(1),
            alpha=alpha, threads=torch.get_num_threads(),
        )  # fmt: skip


#: The fastest first; two of them multiply bfloat16 as it is.
FAST = tuple(CpuKernel(name) for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2"))
PORTABLE = CpuKernel("portable")  # slow, and there for tests alone


def why_no_bfloat() -> str | None:
    """Why products of bfloat16 are not faster here than those of float32, as a clause; None where they are."""
    reasons = [kernel.why_not() or kernel.not_preferred() for kernel in FAST[:2]]
    return None if None in reasons else reasons[-1]


def fma_peak(
    kernel: str, threads: int | None = None, dtype: torch.dtype = torch.float32, seconds: float = 0.1
) -> float:
    """The rate of multiply-adds on registers alone, in GFLOP/s: what no kernel of this kind can exceed.

    The dtype is float32 or float64; bfloat16 for ``avx512_bf16`` gives the rate of its pairs. For ``amx_bf16`` it is
    that of the keys: of products of bfloat16, float16 takes four and float32 six. `threads` are by default torch's.

    Raises:
        ValueError: The kernel of this name cannot run here.
    """
    reason = _missing(kernel)
    if reason is not None:
        raise ValueError(f"The peak of {kernel!r} cannot be measured: {reason}; name another.")
    threads = threads or torch.get_num_threads()
    return float(native().cpu_peak(variant=kernel, dtype=_CODES[dtype], threads=threads, seconds=seconds))


@functools.cache
def _rate_of_pairs() -> float:
    """How fast pairs of bfloat16 are multiplied, in times the rate of float32; measured once."""
    pairs, floats = 0.0, 0.0
    for _ in range(4):  # by turns, and the best of each: what else runs only slows a loop down
        pairs = max(pairs, fma_peak("avx512_bf16", 1, torch.bfloat16, _RATE_SECONDS))
        floats = max(floats, fma_peak("avx512f", 1, torch.float32, _RATE_SECONDS))
    return pairs / floats


@functools.cache
def _missing(name: str) -> str | None:
    if (reason := native_missing()) is not None:
        return reason
    supported = dict(native().cpu_variants())
    if name not in supported:
        return "this build of the native module does not have it"
    if supported[name]:
        return None
    allowed = ", or the system does not allow them" if name == "amx_bf16" else ""
    return f"this processor lacks its instructions{allowed}"


def _offsets(X: Tensor, mask: Tensor | None) -> Tensor:
    """Where the kept rows of X (n, d) begin, in elements from the first; int64 (m,)."""
    n, stride = X.shape[0], X.stride(0)
    if mask is not None:
        return (mask.nonzero().squeeze(1) * stride).contiguous()
    if stride == 0:  # one row, expanded
        return torch.zeros(n, dtype=torch.int64, device=X.device)
    return torch.arange(0, n * stride, stride, dtype=torch.int64, device=X.device)


class SkinnyKernel(NamedTuple):
    """A kernel for products of few rows, and by how many rows of x it is the faster way to x W^T and to x W."""

    name: str
    along: range  # x W^T, a layer forwards
    across: range  # x W, the same backwards


@functools.cache
def skinny_kernel() -> SkinnyKernel | None:
    """The fastest kernel of this machine for products of few rows; None where there is none."""
    module = native()
    for name, most in [] if module is None else module.cpu_skinny_most():
        if name != "portable":
            # MKL knows Intel's processors better than others: what is left out it multiplies as fast or faster there
            # (measured: docs/results/performance.md).
            along, across = (range(3, most + 1), range(2, 17)) if module.cpu_is_intel() else (range(1, most + 1),) * 2
            return SkinnyKernel(name, along, across)
    return None
