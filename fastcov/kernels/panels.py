"""The rank-k update of 16-bit keys on a CUDA device by cuBLAS, one row panel of C at a time.

Plain torch. cuBLAS has no symmetric update for 16-bit keys, but it multiplies them into float32: with 8 panels 9/16 of
a full product are computed. It is what a kernel has to beat, and what runs where none can.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_PANELS = 8
# Tensor cores round towards zero as they add, so a sum over many rows is biased. cuBLAS offers no
# second accumulator; a product over no more rows than these is added to C in float32.
_ROWS = 2048


@functools.cache
def missing() -> str | None:
    """Why it cannot run on this machine, or None."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    if (major, minor) < (2, 8):
        return f"torch 2.8 or newer is needed and this is {torch.__version__}"
    return None


def refuses(C: Tensor, X: Tensor) -> str | None:
    """Why it cannot take a sum C (d, d) and keys X (n, d), or None."""
    if C.device.type != "cuda":
        return f"it runs on CUDA devices and the sum is on {C.device}"
    if X.dtype not in (torch.float16, torch.bfloat16) or C.dtype != torch.float32:
        return f"it takes float16 or bfloat16 keys and a float32 sum, not {X.dtype} and {C.dtype}"
    return None


def rank_k_update(C: Tensor, X: Tensor, mask: Tensor | None, rows: Tensor | None, alpha: float) -> None:
    """Lower triangle of C (d, d) += alpha * X^T X over the kept rows of X (n, d), in place."""
    if rows is None and mask is not None:
        rows = mask.nonzero().squeeze(1)  # (m,)
    m = X.shape[0] if rows is None else rows.shape[0]
    for start in range(0, m, _ROWS):
        part = slice(start, min(start + _ROWS, m))
        _update(C, X[part] if rows is None else X[rows[part]], alpha)


def _update(C: Tensor, X: Tensor, alpha: float) -> None:
    d = X.shape[1]
    width = max(128, -(-d // (_PANELS * 128)) * 128)  # whole tiles of cuBLAS
    for low in range(0, d, width):
        high = min(low + width, d)
        columns = X[:, low:high].mT  # (w, n)
        if low:
            C[low:high, :low].add_(_product(columns, X[:, :low]), alpha=alpha)
        block = C[low:high, low:high]
        square = _product(columns, X[:, low:high])  # (w, w)
        below = torch.ones(high - low, high - low, dtype=torch.bool, device=C.device).tril_()
        # where() and not a masked sum: what is above the diagonal may be NaN and stays as it is.
        block.copy_(torch.where(below, torch.add(block, square, alpha=alpha), block))


def _product(left: Tensor, right: Tensor) -> Tensor:
    product: Tensor = torch.mm(left, right, out_dtype=torch.float32)
    return product
