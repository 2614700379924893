"""AlphaEdit: an update that is confined to the null space of a second moment (arXiv 2410.02355).

With the projector ``P = U U^T`` and ``M = K K^T + K_p K_p^T``, the published form

    Delta^T = (P M + l2 I)^-1 P K R^T

has d_k unknowns to a row. Its solution lies in the space of U: multiplying out gives ``Delta^T = U Y R^T`` with r
unknowns, and the matrix of Y is symmetric,

    (K_u K_u^T + P_u P_u^T + l2 I) Y = K_u,     K_u = U^T K,  P_u = U^T K_p.

It is ridge regression on the keys ``J = [K_u, P_u]``, which shall lead to ``[R, 0]``, so Y is also the first B columns
of ``J (J^T J + l2 I)^-1``: a system as large as the number of keys. The smaller of the two is solved. The second one
still means something at l2 = 0, as the limit: every key of the edit led to its residual exactly, every earlier key left
where it is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastcov.closed_form import LowRank, checked_edits, finite_change
from fastcov.errors import BadInput, NoNullSpace, NotPositiveDefinite, WrongWidth
from fastcov.inputs import matrix
from fastcov.linalg import factorize
from fastcov.mode import isolated
from fastcov.null_space import NullSpace

#: What of a key's length lies in the null space and is no more than the rounding of float32.
NOTHING = 1e-7


@isolated()
def alphaedit(null_space: NullSpace, K: Tensor, R: Tensor, l2: float, preserved: Tensor | None = None) -> LowRank:
    """AlphaEdit: ``Delta^T = (P (K K^T + K_p K_p^T) + l2 I)^-1 P K R^T``.

    ``Delta k = 0`` for every key k that has no part in the null space.

    Args:
        null_space: Of the second moment, width d_k; see `fastcov.null_space`.
        K: Edit keys, shape (d_k, B); equal keys are fine where l2 is above 0.
        R: Residuals, shape (d, B).
        l2: How much the size of the change counts; released with 10. With 0 the keys are led to their residuals
            exactly, and earlier keys are not moved at all.
        preserved: Keys K_p of earlier edits, shape (d_k, m), m may be 0; None are none.

    Returns:
        left = R (d, B) and right (d_k, B), which lies in the null space.

    Raises:
        NoNullSpace: The null space has no direction, or a key has no part in it.
        WrongWidth: K or the earlier keys are not d_k wide, or R has not B columns.
        NonFiniteKeys: K, or an earlier key, holds NaN or infinity.
        NonFiniteMatrix: R holds NaN or infinity, or the update overflows.
        BadInput: K, R or earlier keys are no dense matrix of numbers, or there is no null space.
        NotPositiveDefinite: l2 is 0, or too small for float64, and the keys' parts in the null space depend on one
            another.
        ValueError: l2 is negative or not finite.
    """
    if not math.isfinite(l2) or l2 < 0:
        raise ValueError(f"l2 must be finite and not below 0 but is {l2!r}; 10 is usual.")
    if not isinstance(null_space, NullSpace):
        raise BadInput(
            f"An update is confined to a NullSpace, not to a {type(null_space).__name__}; pass "
            "fastcov.null_space(moment)."
        )
    U = null_space.basis  # (d_k, r)
    if null_space.rank == 0:
        raise NoNullSpace(
            f"No eigenvalue of the second moment of width {U.shape[0]} is below the threshold "
            f"{null_space.threshold:g} (the smallest is {float(null_space.eigenvalues[0]):g}), so "
            "there is no null space to edit in; raise threshold, or pass relative, a multiple of "
            "the mean of the diagonal."
        )
    K, R = checked_edits(K, R, U.shape[0], U)
    K_u = U.mT @ K  # (r, B)
    _check_parts(K, K_u, null_space)
    J = K_u
    earlier = None if preserved is None else matrix(preserved, "Keys of earlier edits")
    if earlier is not None and earlier.numel():
        J = torch.cat([K_u, U.mT @ _checked_earlier(earlier, U)], 1)  # (r, B + m)
    Y = _solved(J, K_u, l2)  # (r, B)
    return finite_change(R.contiguous(), U @ Y)


def _solved(J: Tensor, K_u: Tensor, l2: float) -> Tensor:
    """``(J J^T + l2 I)^-1 K_u`` for the keys J (r, B + m), of which K_u (r, B) come first."""
    (r, n), B = J.shape, K_u.shape[1]
    wide = n > r and l2 > 0  # more keys than directions: they depend on one another
    S = J @ J.mT if wide else J.mT @ J
    S.diagonal().add_(l2)
    try:
        factor = factorize(S, jitters=(0.0,), in_place=True)
    except NotPositiveDefinite as error:
        raise NotPositiveDefinite(
            f"The {n} keys, those of earlier edits among them, are not independent in the {r} "
            f"directions of the null space with l2={l2:g}, so they cannot all be led where they "
            "shall; pass l2=10, remove duplicate requests, or raise the threshold.",
            tried=error.tried,
            d=S.shape[0],
            rank=error.rank,
        ) from error
    if wide:
        return factor.solve(K_u)
    first = torch.eye(n, B, dtype=J.dtype, device=J.device)
    return J @ factor.solve(first)


def _check_parts(K: Tensor, K_u: Tensor, null_space: NullSpace) -> None:
    """Refuse keys that an edit in the null space cannot lead anywhere."""
    length = torch.linalg.vector_norm(K, dim=0)  # (B,)
    lost = torch.linalg.vector_norm(K_u, dim=0) <= NOTHING * length
    if bool(lost.any()):
        columns = tuple(int(i) for i in lost.nonzero()[:, 0])
        what = "is zero" if float(length[columns[0]]) == 0 else "lies outside the null space"
        raise NoNullSpace(
            f"{len(columns)} of {K.shape[1]} edit keys have no part in the null space of "
            f"{null_space.rank} directions (threshold {null_space.threshold:g}), the first in "
            f"column {columns[0]}, which {what}; raise threshold or relative, or leave out that "
            "request.",
            columns=columns,
        )


def _checked_earlier(preserved: Tensor, U: Tensor) -> Tensor:
    if preserved.dim() != 2 or preserved.shape[0] != U.shape[0]:
        raise WrongWidth(
            f"Keys of earlier edits of shape {tuple(preserved.shape)} do not fit a null space of "
            f"width {U.shape[0]}; they must be columns, ({U.shape[0]}, m)."
        )
    return checked_edits(preserved, preserved[:1], U.shape[0], U)[0]
