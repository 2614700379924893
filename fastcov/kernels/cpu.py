"""The rank-k update on a CPU, in C++ (csrc/cpu): one kernel for each instruction set.

Rows are read where they lie, through a list of offsets: what a mask leaves out is neither copied nor looked at. Keys
are converted while they are packed into panels, products are summed in the dtype of C, and only tiles that reach the
lower triangle are computed. Threads are those of torch: ``torch.set_num_threads`` is obeyed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcov.kernels import native

# The codes of csrc/cpu/rank_k.h.
_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}

#: Names of the variants, the fastest first. ``portable`` is slow, and there for tests alone.
VARIANTS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "portable")

# Pairs of bfloat16 are taken only where they are multiplied this much faster than float32. Zen 5
# was measured at twice the rate, a Xeon with AMX at half of it: nothing lies near.
_PAIRS_PAY = 1.2
_RATE_SECONDS = 3e-4


@dataclass(frozen=True)
class CpuKernel:
    """One variant of the native kernel.

    Attributes:
        name: One of `VARIANTS`.
    """

    name: str

    def missing(self) -> str | None:
        """Why this variant cannot run on this machine, or None."""
        return _missing(self.name)

    def refuses(self, C: Tensor, X: Tensor) -> str | None:
        """Why this variant cannot take a sum C (d, d) and keys X (n, d), or None."""
        if C.device.type != "cpu":
            return f"it runs on the CPU and the sum is on {C.device}"
        if self.name == "avx512_bf16" and (X.dtype != torch.bfloat16 or C.dtype != torch.float32):
            return f"it takes bfloat16 keys and a float32 sum, not {X.dtype} and {C.dtype}"
        if self.name == "amx_bf16" and C.dtype != torch.float32:
            return f"it takes a float32 sum, not {C.dtype}"
        return None

    def passed_over(self) -> str | None:
        """Why this variant is not chosen on this machine though it can run, or None."""
        if self.name != "avx512_bf16" or _missing(self.name) is not None:
            return None
        ratio = _rate_of_pairs()
        if ratio >= _PAIRS_PAY:
            return None
        return f"pairs of bfloat16 are multiplied at {ratio:.1f} times the rate of float32 here"

    def rank_k_update(self, C: Tensor, X: Tensor, mask: Tensor | None, rows: Tensor | None, alpha: float) -> None:
        """Lower triangle of C (d, d) += alpha * X^T X over the kept rows of X (n, d), in place."""
        offsets = _offsets(X, mask, rows)  # (m,)
        module = native.native()
        assert module is not None
        module.cpu_rank_k(
            variant=self.name,
            x=X.data_ptr(),
            x_dtype=_CODES[X.dtype],
            x_column_stride=X.stride(1),
            offsets=offsets.data_ptr(),
            rows=offsets.shape[0],
            d=X.shape[1],
            c=C.data_ptr(),
            c_dtype=_CODES[C.dtype],
            c_row_stride=C.stride(0),
            c_column_stride=C.stride(1),
            alpha=alpha,
            threads=torch.get_num_threads(),
        )


def fma_peak(
    kernel: str, threads: int | None = None, dtype: torch.dtype = torch.float32, seconds: float = 0.1
) -> float:
    """The rate of multiply-adds on registers alone: what no kernel of this kind can exceed.

    Args:
        kernel: A variant that can run here, see `VARIANTS`.
        threads: How many at once; by default those of torch.
        dtype: float32 or float64; bfloat16 for ``avx512_bf16`` gives that of its pairs. For ``amx_bf16`` that of the
            keys: of products of bfloat16, float16 takes four and float32 six.
        seconds: How long to measure.

    Returns:
        GFLOP/s, a multiply-add counted as two.

    Raises:
        ValueError: The variant cannot run here.
    """
    reason = _missing(kernel)
    if reason is not None:
        raise ValueError(f"The peak of {kernel!r} cannot be measured: {reason}; name another.")
    module = native.native()
    assert module is not None
    rate: float = module.cpu_peak(
        variant=kernel, dtype=_CODES[dtype], threads=threads or torch.get_num_threads(), seconds=seconds
    )
    return rate


def workspace_bytes() -> int:
    """What is kept between updates for packed keys, at most 96 MB or 256 rows."""
    module = native.native()
    return 0 if module is None else int(module.cpu_workspace())


def release_workspace() -> None:
    """Give back what `workspace_bytes` counts; the next update takes it anew."""
    module = native.native()
    if module is not None:
        module.cpu_release_workspace()


def best_variant() -> str | None:
    """The fastest variant that can run here, None where the native module is missing."""
    can = (name for name in VARIANTS if _missing(name) is None)
    return next((name for name in can if CpuKernel(name).passed_over() is None), None)


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
    module = native.native()
    if module is None:
        return native.missing()
    supported = dict(module.cpu_variants())
    if name not in supported:
        return "this build of the native module does not have it"
    if supported[name]:
        return None
    if name == "amx_bf16":
        return "this processor lacks its instructions, or the system does not allow them"
    return "this processor lacks its instructions"


def _offsets(X: Tensor, mask: Tensor | None, rows: Tensor | None) -> Tensor:
    """Where the kept rows of X (n, d) begin, in elements from the first; int64 (m,)."""
    if rows is None:
        if mask is None:
            rows = torch.arange(X.shape[0], dtype=torch.int64, device=X.device)
        else:
            rows = mask.nonzero().squeeze(1)
    return (rows * X.stride(0)).contiguous()
