"""How many independent directions a matrix has, estimated by elimination with pivots."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcov.ops import rank_k_update

_BLOCK = 64  # coordinates eliminated at a time


def pivots_(A: Tensor, diagonal: Tensor) -> list[float]:
    """The pivots of a positive semidefinite matrix, scaled to a unit diagonal; A is used up.

    A Cholesky elimination that takes, block by block, the coordinates of which most is left, and
    skips those of which no more is left than rounding. For a semidefinite matrix the number of
    pivots estimates its rank: dead coordinates, copies of others and whatever exceeds the number
    of keys do not count. For an indefinite one it is the number of coordinates that could be
    eliminated before nothing positive was left. It takes about the arithmetic of three
    factorisations, less for a low rank.

    Args:
        A: The matrix (d, d), float32 or float64. Only its lower triangle is read, and changed.
        diagonal: Its diagonal (d,), not a view of A.

    Returns:
        The pivots that were accepted, roughly from large to small, each between 0 and 1: the share
        of a coordinate's mean square that those before it do not explain.
    """
    d = A.shape[0]
    tolerance = 10 * d**0.5 * torch.finfo(A.dtype).eps
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
        chosen = left.topk(min(candidates, _BLOCK)).indices  # (b,)
        untried[chosen] = False
        # Row i of the symmetric matrix: left of the diagonal as it is, from there on the column.
        rows = torch.where(columns <= chosen[:, None], A[chosen], A[:, chosen].mT)  # (b, d)
        scales = scale[chosen]
        square = (rows[:, chosen] / scales / scales[:, None]).cpu().double()  # (b, b)
        order, factor = _eliminate(square, tolerance)
        found += factor.diagonal().square().tolist()
        order = order.to(A.device)
        rows = rows[order]  # (r, d)
        factor = factor.to(A) * scales[order][:, None]
        half = torch.linalg.solve_triangular(factor, rows, upper=False)
        del rows
        rank_k_update(A, half, alpha=-1.0, kernel=kernel)


def _eliminate(square: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Cholesky of a small matrix (b, b), largest pivot first, down to the tolerance.

    Returns:
        The r coordinates in the order of elimination, and the factor (r, r) of that order; what
        stands above its diagonal means nothing. At least one, the largest, is always taken.
    """
    square = square.clone()
    remaining = square.diagonal()
    order: list[int] = []
    columns: list[Tensor] = []
    while len(order) < len(square):
        pivot = int(remaining.argmax())
        if order and not float(remaining[pivot]) > tolerance:
            break
        column = square[:, pivot] / remaining[pivot].sqrt()  # (b,)
        square.addr_(column, column, alpha=-1)
        remaining[pivot] = -1.0  # taken
        order.append(pivot)
        columns.append(column)
    taken = torch.tensor(order)
    return taken, torch.stack(columns, 1)[taken]
