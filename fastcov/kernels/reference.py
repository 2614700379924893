"""The rank-k update in plain torch: runs everywhere, and is what other kernels are checked against.

The triangle is halved recursively: its lower-left square is one matrix product straight into C, its two smaller
triangles are done the same way. Only the smallest triangles, `_LEAF` wide, compute a full square and keep half of it,
so the arithmetic is close to half of a full product and the memory is one leaf.

Products are full ones: `fastcov.ops` switches TF32 and autocast off around a kernel.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_LEAF = 256  # width of the triangles computed as squares
_CHUNK_BYTES = 64 << 20  # what converting or gathering rows may take at a time
# Rows of one product. A library may add them up one after the other, and a float32 sum of ones
# stops at 2^24; products of no more rows than these are added to C.
_ROWS = 4096


def missing() -> str | None:
    """Why it cannot run on this machine: it always can."""
    return None


def refuses(C: Tensor, X: Tensor) -> str | None:
    """Why it cannot take a sum C (d, d) and keys X (n, d): it takes all."""
    return None


def rank_k_update(C: Tensor, X: Tensor, mask: Tensor | None, rows: Tensor | None, alpha: float) -> None:
    """Lower triangle of C (d, d) += alpha * X^T X over the kept rows of X (n, d), in place."""
    for chunk in _chunks(C, X, mask, rows):
        _triangle(C, chunk, alpha, 0, C.shape[0])


def _chunks(C: Tensor, X: Tensor, mask: Tensor | None, rows: Tensor | None) -> Iterator[Tensor]:
    """The kept rows in the dtype of C and in a layout that products read without copying."""
    n, d = X.shape
    if rows is None and mask is not None:
        rows = mask.nonzero().squeeze(1)  # (m,)
    # A product reads rows in place when they are contiguous or an even stride apart; in any other
    # layout each of the many products of the recursion would make its own copy.
    direct = X.dtype == C.dtype and X.stride(1) == 1 and X.stride(0) >= d
    if rows is None and direct:
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
        block = C[low:high, low:high]
        columns = X[:, low:high]
        square = columns.mT @ columns
        below = torch.ones(width, width, dtype=torch.bool, device=C.device).tril_()
        # where() and not a masked sum: what is above the diagonal may be NaN and must stay as it
        # is.
        block.copy_(torch.where(below, torch.add(block, square, alpha=alpha), block))
        return
    middle = low + -(-width // 2 // _LEAF) * _LEAF  # whole leaves, so that products stay aligned
    C[middle:high, low:middle].addmm_(X[:, middle:high].mT, X[:, low:middle], alpha=alpha)
    _triangle(C, X, alpha, low, middle)
    _triangle(C, X, alpha, middle, high)
