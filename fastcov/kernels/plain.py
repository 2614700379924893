"""The rank-k update in plain torch: the reference, which runs everywhere, and row panels for 16-bit keys on CUDA.

*reference* is what other kernels are checked against. The triangle is halved recursively: its lower-left square is one
matrix product straight into C, its two smaller triangles are done the same way, and only the smallest ones compute a
full square and keep half of it. Products are full ones: `fastcov.ops` switches TF32 and autocast off around a kernel.

*panels* is cuBLAS, which has no symmetric update for 16-bit keys, one row panel of C at a time: with 8 panels 9/16 of a
full product. It is what a kernel has to beat, and what runs where none can.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

_LEAF = 256  # width of the triangles computed as squares
_CHUNK_BYTES = 64 << 20  # what converting or gathering rows may take at a time
# Rows of one product. A library may add them up one after the other, and a float32 sum of ones
# stops at 2^24; products of no more rows than these are added to C.
_ROWS = 4096
_PANELS = 8
# Tensor cores round towards zero as they add, so a sum over many rows is biased. cuBLAS offers no
# second accumulator; a product over no more rows than these is added to C in float32.
_PANEL_ROWS = 2048


def reference(C: Tensor, X: Tensor, mask: Tensor | None, alpha: float) -> None:
    """Lower triangle of C (d, d) += alpha * X^T X over the kept rows of X (n, d), in place."""
    for chunk in _chunks(C, X, mask):
        _triangle(C, chunk, alpha, 0, C.shape[0])


def _chunks(C: Tensor, X: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
    """The kept rows in the dtype of C and in a layout that products read without copying."""
    n, d = X.shape
    rows = None if mask is None else mask.nonzero().squeeze(1)  # (m,)
    # A product reads rows in place when they are contiguous or an even stride apart; in any other
    # layout each of the many products of the recursion would make its own copy.
    if rows is None and X.dtype == C.dtype and X.stride(1) == 1 and X.stride(0) >= d:
        for start in range(0, n, _ROWS):
            yield X[start : start + _ROWS]
        return
    m = n if rows is None else rows.shape[0]
    step = max(1, min(_ROWS, _CHUNK_BYTES // max(1, d * C.element_size())))
    for start in range(0, m, step):
        part = slice(start, min(start + step, m))
        chunk = X[part] if rows is None else X[rows[part]]
        yield chunk.to(C.dtype).contiguous()


def _triangle(C: Tensor, X: Tensor, alpha: float, low: int, high: int) -> None:
    """Update the triangle of C over the columns low to high."""
    width = high - low
    if width <= _LEAF:
        columns = X[:, low:high]
        _add_below(C[low:high, low:high], columns.mT @ columns, alpha)
        return
    middle = low + -(-width // 2 // _LEAF) * _LEAF  # whole leaves, so that products stay aligned
    C[middle:high, low:middle].addmm_(X[:, middle:high].mT, X[:, low:middle], alpha=alpha)
    _triangle(C, X, alpha, low, middle)
    _triangle(C, X, alpha, middle, high)


def _add_below(block: Tensor, square: Tensor, alpha: float) -> None:
    """Add to the lower triangle of a block (w, w)."""
    below = torch.ones(block.shape, dtype=torch.bool, device=block.device).tril_()
    # where() and not a masked sum: what is above the diagonal may be NaN and must stay as it is.
    block.copy_(torch.where(below, torch.add(block, square, alpha=alpha), block))


@functools.cache
def _panels_missing() -> str | None:
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 8):
        return f"torch 2.8 or newer is needed and this is {torch.__version__}"
    return None


def panels_why_not(C: Tensor | None = None, X: Tensor | None = None) -> str | None:
    """Why panels cannot run on this machine, or not with a sum C (d, d) and keys X (n, d); None if it can."""
    reason = _panels_missing()
    if reason is not None or C is None or X is None:
        return reason
    if C.device.type != "cuda":
        return f"it runs on CUDA devices and the sum is on {C.device}"
    if X.dtype not in (torch.float16, torch.bfloat16) or C.dtype != torch.float32:
        return f"it takes float16 or bfloat16 keys and a float32 sum, not {X.dtype} and {C.dtype}"
    return None


def panels(C: Tensor, X: Tensor, mask: Tensor | None, alpha: float) -> None:
    """Lower triangle of C (d, d) += alpha * X^T X over the kept rows of X (n, d), in place."""
    rows = None if mask is None else mask.nonzero().squeeze(1)  # (m,)
    m, d = X.shape[0] if rows is None else rows.shape[0], X.shape[1]
    width = max(128, -(-d // (_PANELS * 128)) * 128)  # whole tiles of cuBLAS
    for start in range(0, m, _PANEL_ROWS):
        part = slice(start, min(start + _PANEL_ROWS, m))
        keys = X[part] if rows is None else X[rows[part]]
        for low in range(0, d, width):
            high = min(low + width, d)
            columns = keys[:, low:high].mT  # (w, n)
            if low:
                C[low:high, :low].add_(_product(columns, keys[:, :low]), alpha=alpha)
            _add_below(C[low:high, low:high], _product(columns, keys[:, low:high]), alpha)


def _product(left: Tensor, right: Tensor) -> Tensor:
    product: Tensor = torch.mm(left, right, out_dtype=torch.float32)
    return product
