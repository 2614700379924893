"""Solves in float64 with a factor in float32: refinement until the residual is small, or an error.

A float32 factor takes half the memory of a float64 one and far less time where float64 is slow, and its solves are
right to a few digits. Here they precondition conjugate gradients on the matrix itself in float64, which a handful of
steps take to the accuracy asked for, and which still converge where plain iterative refinement, whose error shrinks by
cond(A) * 6e-8 a step, would not.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastcov.errors import ResidualTooLarge

TOLERANCE = 1e-12  # of the residual, relative to the right side
_STEPS = 60
_BLOCK = 128  # rows of the matrix that are converted at a time


def place_of_float64(device: torch.device) -> torch.device:
    """Where float64 numbers for a matrix on this device live: Apple's GPUs have none."""
    return torch.device("cpu") if device.type == "mps" else device


def upper_product(A: Tensor, diagonal: Tensor, X: Tensor) -> Tensor:
    """``S X`` in float64 for the symmetric S with A's strict upper triangle and this diagonal.

    Args:
        A: Shape (d, d), any floating dtype. Nothing on or below its diagonal is read as data.
        diagonal: Shape (d,), float64, on X's device.
        X: Shape (d, m), float64.
    """
    Y = diagonal[:, None] * X  # (d, m)
    d = A.shape[0]
    for start in range(0, d, _BLOCK):
        stop = min(start + _BLOCK, d)
        # Converted by `to` in two steps, since a device without float64 cannot in one.
        rows = A[start:stop, start:].to(X.device).to(X.dtype)
        corner = rows[:, : stop - start].triu(1)
        Y[start:stop] += corner @ X[start:stop] + corner.mT @ X[start:stop]
        beside = rows[:, stop - start :]  # (b, d - stop)
        Y[start:stop].addmm_(beside, X[stop:])
        Y[stop:].addmm_(beside.mT, X[start:stop])
    return Y


def refined_solve(
    product: Callable[[Tensor], Tensor],
    approximate: Callable[[Tensor], Tensor],
    B: Tensor,
    diagonal: Tensor,
    tolerance: float = TOLERANCE,
) -> Tensor:
    """Solve ``A X = B`` in float64, all columns at once, with a checked residual.

    Args:
        product: ``X -> A X`` in float64, for A symmetric positive definite.
        approximate: ``R -> A^-1 R`` to a few digits, float64 in and out.
        B: Shape (d, m), float64, finite.
        diagonal: Of A, shape (d,), float64: it bounds the rounding of a product.
        tolerance: The residual's norm over the right side's at which a column is solved.

    Returns:
        X, shape (d, m). The residual ``B - A X``, computed afresh, is within the tolerance in every column, or within
        the rounding of ``A X`` in float64 if that is more: no solve in float64 leaves less.

    Raises:
        ResidualTooLarge: It was not after 60 steps, or the steps broke down.
    """
    largest = _nonzero(B.abs().amax(dim=0))  # (m,): squares of what is divided by it stay finite
    B = B / largest
    norms = B.norm(dim=0)  # (m,)
    # An entry of A is at most the root of its two diagonal ones, so that of the product of A and x
    # entry i is rounded by about eps * sqrt(a_ii) * |sqrt(diag A) * x|.
    scale = diagonal.sqrt()[:, None]  # (d, 1)
    rounding = 4 * torch.finfo(B.dtype).eps * diagonal.sum().sqrt()

    def goal(X: Tensor) -> Tensor:
        bound: Tensor = tolerance * norms + rounding * (scale * X).norm(dim=0)  # (m,)
        return bound

    X, R = torch.zeros_like(B), B
    former = before = direction = None
    for step in range(_STEPS):
        size = R.norm(dim=0)
        # The recursion for R drifts, so that only a residual computed afresh ends the work.
        if step and bool((size <= goal(X) / 2).all()):
            R = B - product(X)
            size = R.norm(dim=0)
            if bool((size <= goal(X)).all()):
                return X * largest
            direction = None
        if not bool(size.isfinite().all()):
            break
        unit = _nonzero(size)  # what float32 gets is neither tiny nor huge
        Z = approximate(R / unit) * unit
        if direction is None or former is None or before is None:
            direction = Z
        else:
            # Rounding makes the approximation slightly unsymmetric; a term along the former
            # residual keeps the directions conjugate all the same.
            direction = Z + ((R - former) * Z).sum(0) / before * direction
        former, before = R, _nonzero((R * Z).sum(0))
        image = product(direction)
        curvature = (direction * image).sum(0)
        stride = torch.where(curvature > 0, (direction * R).sum(0) / curvature, 0)
        X = X + stride * direction
        R = R - stride * image
    residual = ((B - product(X)).norm(dim=0) / _nonzero(norms)).nan_to_num(math.inf)  # (m,)
    worst = int(residual.argmax())
    raise ResidualTooLarge(
        f"A refined solve of width {B.shape[0]} left a relative residual of "
        f"{float(residual[worst]):.3g} in column {worst}, above the {tolerance:g} asked for; "
        "factorise the matrix in float64, or pass a ridge.",
        residual=float(residual[worst]),
        tolerance=tolerance,
    )


def _nonzero(x: Tensor) -> Tensor:
    """What may be divided by: x, and 1 where x is 0."""
    return torch.where(x != 0, x, 1)
