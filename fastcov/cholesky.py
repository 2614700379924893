"""Cholesky in place: one triangle, block after block, with nothing of the matrix's size besides.

`torch.linalg.cholesky_ex` makes a new matrix of the same size, and several attempts with more and more jitter would
make several. Here the lower triangle is overwritten. What is needed to try again lies in the same matrix: `mirror`
copies the lower triangle over the upper one first, so that the upper triangle and the diagonal, d numbers kept by the
caller, still are A while the lower one becomes L.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcov.ops import rank_k_update

# Columns of a block. Fewer than the least leave too little to each matrix product; an accelerator
# waits for every block, so there are fewer of them, and nothing is packed there.
_WIDTHS = {"cpu": (64, 256, 16)}  # the least, the most, blocks of a matrix in between
_WIDTHS_ELSEWHERE = (128, 1024, 12)
_MIRRORED = 64  # rows mirrored at a time, few enough for the cache


def cholesky_(A: Tensor) -> bool:
    """Overwrite the lower triangle of A (d, d) with its Cholesky factor.

    Right-looking: the factor of a diagonal block, the panel below it by a triangular solve, then the triangle that is
    left by a symmetric rank-k update of half the arithmetic of a product. Workspace is one panel, d times the width of
    a block, or two where it is copied, and two more in which the native kernel packs it and which that kernel keeps for
    its next call.

    Args:
        A: Float32 or float64, with any strides. Nothing above the diagonal is read or changed.

    Returns:
        Whether every pivot was above 0. If not, the lower triangle holds nothing of use.
    """
    d = A.shape[0]
    width = block_width(d, A.device)
    # The kernels of accelerators may split float32 into parts of fewer bits. Here every step
    # builds on the one before, so the products are plain ones.
    kernel = None if A.device.type == "cpu" else "reference"
    for start in range(0, d, width):
        stop = min(start + width, d)
        corner = A[start:stop, start:stop]
        L, info = torch.linalg.cholesky_ex(corner)
        if int(info) != 0:
            return False
        corner.copy_(corner.triu(1).add_(L))
        if stop < d:
            below = A[stop:, start:stop]  # (m, width)
            panel = torch.linalg.solve_triangular(L, below.mT, upper=False)  # (width, m)
            below.copy_(panel.mT)
            rank_k_update(A[stop:, stop:], panel, alpha=-1.0, kernel=kernel)
    return True


def block_width(d: int, device: torch.device) -> int:
    """How many columns `cholesky_` takes at a time for a matrix of width d."""
    least, most, blocks = _WIDTHS.get(device.type, _WIDTHS_ELSEWHERE)
    return max(least, min(most, d // blocks // 32 * 32))


def mirror(A: Tensor) -> Tensor:
    """Write the lower triangle of A (d, d) over its upper one, in place, and return A.

    ``mirror(A.mT)`` writes the upper triangle of A over its lower one.
    """
    d = A.shape[0]
    for start in range(0, d, _MIRRORED):
        stop = min(start + _MIRRORED, d)
        corner = A[start:stop, start:stop]
        corner.copy_(corner.tril() + corner.tril(-1).mT)
        # Through a contiguous copy: reading columns a power of two apart misses the cache.
        A[start:stop, stop:] = A[stop:, start:stop].contiguous().mT
    return A
