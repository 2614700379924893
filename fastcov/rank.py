"""How many independent directions a matrix has, estimated by elimination with pivots."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcov.ops import rank_k_update

_SMALLEST, _LARGEST = 32, 64  # coordinates eliminated at a time
_WAITING = 0.1  # of the largest pivot: what a pivot of the same block must be


def pivots_(A: Tensor, diagonal: Tensor) -> list[float]:
    """The pivots of a positive semidefinite matrix, scaled to a unit diagonal; A is used up.

    A Cholesky elimination that takes, block by block, the coordinates of which most is left, and skips those of which
    no more is left than rounding. For a semidefinite matrix the number of pivots estimates its rank: dead coordinates,
    copies of others and whatever exceeds the number of keys do not count. For an indefinite one it is the number of
    coordinates that could be eliminated before nothing positive was left. It takes about the arithmetic of three
    factorisations, less for a low rank.

    Args:
        A: The matrix (d, d), float32 or float64. Only its lower triangle is read, and changed.
        diagonal: Its diagonal (d,), not a view of A.

    Returns:
        The pivots that were accepted, roughly from large to small, each between 0 and 1: the share of a coordinate's
        mean square that those before it do not explain.
    """
    d = A.shape[0]
    block = max(_SMALLEST, min(_LARGEST, d // 24))  # five panels of it are a fifth of the matrix
    # In float64 well above rounding, which is some 1e-14, and below every jitter.
    tolerance = max(1e-12, 10 * d**0.5 * torch.finfo(A.dtype).eps)
    columns = torch.arange(d, device=A.device)
    untried = diagonal > 0  # (d,)
    scale = diagonal.clamp(min=0).sqrt()  # (d,)
    kernel = None if A.device.type == "cpu" else "reference"
    found: list[float] = []
    while True:
        left = torch.where(untried, A.diagonal() / diagonal, 0).nan_to_num(0, posinf=0)  # (d,)
        candidates = int((left > tolerance).sum())
        if candidates == 0:
            return found
        chosen = left.topk(min(candidates, block)).indices  # (b,)
        # Row i of the symmetric matrix: left of the diagonal as it is, from there on the column.
        rows = A[chosen]  # (b, d)
        torch.where(columns <= chosen[:, None], rows, A[:, chosen].mT, out=rows)
        scales = scale[chosen]
        square = (rows[:, chosen] / scales / scales[:, None]).cpu().double()  # (b, b)
        order, factor = _eliminate(square)
        found += factor.diagonal().square().tolist()
        order = order.to(A.device)
        untried[chosen[order]] = False
        rows = rows[order]  # (r, d)
        factor = factor.to(A.dtype).to(A.device) * scales[order][:, None]
        half = torch.linalg.solve_triangular(factor, rows, upper=False)
        del rows
        rank_k_update(A, half, alpha=-1.0, kernel=kernel)


def _eliminate(square: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky of a small matrix (b, b), largest pivot first, while pivots are large.

    What falls behind the first pivot waits for another block. A coordinate of which little is left may only be taken
    when no better one is left anywhere: it would magnify the rounding of all others, until they look independent.

    Returns:
        The r coordinates in the order of elimination, and the factor (r, r) of that order; what stands above its
        diagonal means nothing.
    """
    square = square.clone()
    remaining = square.diagonal()
    least = _WAITING * float(remaining.max())
    order: list[int] = []
    columns: list[Tensor] = []
    while len(order) < len(square):
        pivot = int(remaining.argmax())
        if float(remaining[pivot]) < least:
            break
        column = square[:, pivot] / remaining[pivot].sqrt()  # (b,)
        square.addr_(column, column, alpha=-1)
        remaining[pivot] = -1.0  # taken
        order.append(pivot)
        columns.append(column)
    taken = torch.tensor(order)
    return taken, torch.stack(columns, 1)[taken]
