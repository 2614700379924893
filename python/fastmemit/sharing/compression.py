"""A delta of lower rank: QR of both factors and the singular values of what lies between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcov.hooks import isolated
from fastmemit.delta import Delta
from fastmemit.errors import BadConfig

#: Below this part of the largest, a singular value is less than the rounding of float32 factors.
ROUNDING = 2.0**-24


@isolated()
def compressed(delta: Delta, *, rank: int | None = None, tolerance: float = ROUNDING) -> Delta:
    """The same change with as few columns as it needs.

    ``left = Q_l R_l`` and ``right = Q_r R_r``; the singular values of ``R_l R_r^T``, at most as many as the weight's
    smaller side, are those of the change (Golub and Van Loan, section 5.4). All in float64, rounded to float32 at the
    end.

    Args:
        delta: Whose factors have more columns than they need.
        rank: Keep at most so many columns of each weight, with loss: the best change of that rank.
        tolerance: Drop singular values up to this part of the largest.

    Returns:
        The delta; weights that need all of their columns keep the very same factors.  What was
        done is in its provenance under ``compression``: for each weight that changed, ``from`` and ``to`` columns and
        ``relative_error``, the Frobenius norm of what was dropped over that of the change.

    Raises:
        BadConfig: The rank is below 1, or the tolerance not from 0 to below 1.
    """
    if rank is not None and rank < 1:
        raise BadConfig(f"The rank must be 1 or more but is {rank}.")
    if not 0 <= tolerance < 1:
        raise BadConfig(f"The tolerance must be from 0 to below 1 but is {tolerance}.")
    factors, done = {}, {}
    for name, (left, right) in delta.factors.items():
        factors[name] = (left, right)
        found = _reduced(left, right, rank, tolerance)
        if found is not None:
            new_left, new_right, error = found
            factors[name] = (new_left, new_right)
            done[name] = {"from": left.shape[1], "to": new_left.shape[1], "relative_error": error}
    if not done:
        return delta
    provenance: dict[str, Any] = {**delta.provenance, "compression": done}
    return Delta(factors, provenance)


def _reduced(
    left: Tensor,  # (rows, B)
    right: Tensor,  # (columns, B)
    rank: int | None,
    tolerance: float,
) -> tuple[Tensor, Tensor, float] | None:
    """Both factors with fewer columns and the relative error, or None if all stay."""
    if not bool(torch.isfinite(left).all() and torch.isfinite(right).all()):
        return None  # it has no singular values; whatever it does to a weight stays visible
    q_left, r_left = torch.linalg.qr(left.double())  # (rows, p), (p, B)
    q_right, r_right = torch.linalg.qr(right.double())  # (columns, q), (q, B)
    u, values, vt = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    needed = int((values > tolerance * values.max()).sum()) if values.numel() else 0
    kept = max(1, needed if rank is None else min(needed, rank))
    if kept >= left.shape[1]:
        return None
    root = values[:kept].sqrt()
    whole = float(torch.linalg.vector_norm(values))
    dropped = float(torch.linalg.vector_norm(values[kept:]))
    error = dropped / whole if whole > 0 else 0.0
    new_left = (q_left @ (u[:, :kept] * root)).float()
    new_right = (q_right @ (vt[:kept].T * root)).float()
    return new_left.contiguous(), new_right.contiguous(), error
