"""The closed-form updates of ROME, EMMET, MEMIT and AlphaEdit as low-rank factors.

Pure functions of a factor of A, the edit keys K (d_k, B) and the residuals R (d, B), what the edited projection shall
add at those keys. A comes from `fastcov.regularised` and does not depend on the edits: it is factored once, and a batch
costs triangular solves and a system of its own size. K and R, tensors or NumPy arrays, are read in the dtype and on the
device in which the factor answers; float64 is recommended. An update is left (d, B) and right (d_k, B).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcov.errors import BadInput, NonFinite, NoNullSpace, NotPositiveDefinite
from fastcov.hooks import isolated, matrix, square
from fastcov.linalg import CholeskyFactor, as_columns, factorize, moved, non_finite, place_of_float64
from fastcov.moments import SecondMoment


@dataclass(frozen=True)
class LowRank:
    """A change of a weight W (d, d_k) as ``left @ right^T``, of shapes (d, B) and (d_k, B)."""

    left: Tensor
    right: Tensor

    @isolated()
    def dense(self) -> Tensor:
        """The change itself, shape (d, d_k)."""
        return self.left @ self.right.mT


@isolated()
def memit(factor: CholeskyFactor, K: Tensor, R: Tensor) -> LowRank:
    """MEMIT: ``Delta = R K^T (A + K K^T)^-1``, equation (2) of arXiv 2506.04226; equal keys are fine.

    By Woodbury ``(A + K K^T)^-1 K = X (I + K^T X)^-1`` with ``X = A^-1 K``. With ``H = L^-1 K`` the small matrix is ``I
    + H^T H``: symmetric, positive definite and (B, B). Of more keys than d_k, ``A + K K^T`` is the smaller matrix, and
    solved with as it stands.

    Raises:
        BadInput: K is no dense matrix (d_k, B) of numbers, R none with B columns, or there is no factor.
        NonFinite: K or R holds NaN or infinity, or the update overflows.
    """
    K, R = _checked(factor, K, R)
    if K.shape[1] > factor.d:
        return finite_change(R.contiguous(), _joint_solve(factor, K, 1.0))
    X, S = factor.solve_and_gram(K)  # (d_k, B), (B, B)
    S.diagonal().add_(1.0)
    left = factorize(S, in_place=True).solve(R.mT).mT  # (d, B)
    return finite_change(left.contiguous(), X)


@isolated()
def emmet(factor: CholeskyFactor, K: Tensor, R: Tensor, lambda_e: float = 0.0) -> LowRank:
    """EMMET: ``Delta = R (K^T A^-1 K + lambda_e I)^-1 K^T A^-1``, memorisation as a constraint.

    With lambda_e = 0 every key is mapped to its residual exactly, ``Delta K = R``, which keys that depend on one
    another make impossible; above 0 the constraint is relaxed.

    Raises:
        BadInput: K is no dense matrix (d_k, B) of numbers, R none with B columns, or there is no factor.
        NonFinite: K or R holds NaN or infinity, or the update overflows.
        NotPositiveDefinite: lambda_e is 0 (or too small) and the keys are not independent.
        ValueError: lambda_e is negative or not finite.
    """
    K, R = _checked(factor, K, R)
    if not math.isfinite(lambda_e) or lambda_e < 0:
        raise ValueError(f"lambda_e must be finite and not below 0 but is {lambda_e!r}; 0.1 is usual.")
    if lambda_e and K.shape[1] > factor.d:
        return finite_change(R.contiguous(), _joint_solve(factor, K, lambda_e))
    X, S = factor.solve_and_gram(K)  # (d_k, B), (B, B)
    S.diagonal().add_(lambda_e)
    small = _independent(
        S,
        f"The {K.shape[1]} edit keys of width {K.shape[0]} are not independent with lambda_e={lambda_e:g}, so they "
        "cannot be mapped exactly; remove duplicate requests, use smaller batches, or pass lambda_e=0.1.",
    )
    left = small.solve(R.mT).mT  # (d, B)
    return finite_change(left.contiguous(), X)


@isolated()
def rome(factor: CholeskyFactor, k: Tensor, r: Tensor, *, denominator_key: Tensor | None = None) -> LowRank:
    """ROME: ``Delta = r (A^-1 k)^T / (k^T A^-1 k)``, one edit; the scale of A cancels.

    The key k is (d_k,) or (d_k, 1), the residual r (d,) or (d, 1). With `denominator_key` q, shaped as k, the
    denominator is ``q^T A^-1 k``. By default q is k itself, which is r-ROME and makes ``Delta k = r``; ROME as released
    takes the bare prompt's key as q and the mean over contexts as k.

    Raises:
        BadInput: A key or r is no column of numbers of its width, there is more than one edit, or there is no factor.
        NonFinite: A key or r holds NaN or infinity, or the update overflows.
        NotPositiveDefinite: The denominator is not above 0 (a key of zeros, or two keys that have nothing in common).
    """
    k, r = as_columns(matrix(k, "An edit key")), as_columns(matrix(r, "A residual"))
    if k.dim() == 2 and k.shape[1] != 1:
        raise BadInput(f"ROME makes one edit but got {k.shape[1]} keys; use emmet or memit.")
    k, r = _checked(factor, k, r)
    x = factor.solve(k)  # (d_k, 1)
    q = k
    if denominator_key is not None:
        q, _ = _checked(factor, as_columns(matrix(denominator_key, "The denominator's key")), r)
    denominator = float((q.mT @ x).item())
    if not math.isfinite(denominator) or denominator <= 0:
        raise NotPositiveDefinite(
            f"The denominator k^T A^-1 k of ROME is {denominator:g} and must be above 0; "
            "check that the edit key is not zero and that both keys belong to one request.",
            d=factor.d,
        )
    return finite_change(r / denominator, x)


def _independent(S: Tensor, otherwise: str) -> CholeskyFactor:
    """The factor of a small matrix S of edit keys, used up, without jitter; NotPositiveDefinite says `otherwise`."""
    try:
        return factorize(S, jitters=(0.0,), in_place=True)
    except NotPositiveDefinite as error:
        raise NotPositiveDefinite(otherwise, tried=error.tried, d=error.d, rank=error.rank) from error


def _joint_solve(factor: CholeskyFactor, K: Tensor, share: float) -> Tensor:
    """``(share * A + K K^T)^-1 K`` (d_k, B)."""
    # What a jitter holds up alone in A, K fills. Here that is seen; the gram of the keys has an
    # eigenvalue of the inverse jitter there, and loses as many digits.
    root = factor.L
    return factorize(torch.addmm(K @ K.mT, root, root.mT, alpha=share), in_place=True).solve(K)


def _checked(factor: CholeskyFactor, K: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    """K (d_k, B) and R (d, B) in the factor's dtype, if they fit it and one another."""
    if not isinstance(factor, CholeskyFactor):
        raise BadInput(
            f"An update is solved with a factor, not with a {type(factor).__name__}; pass "
            "fastcov.factorize(fastcov.regularised(moment, weight, ridge))."
        )
    return checked_edits(K, R, factor.d, factor)


def checked_edits(K: Tensor, R: Tensor, d: int, like: CholeskyFactor | Tensor) -> tuple[Tensor, Tensor]:
    """Keys K (d_k, B) and residuals R (d, B), in dtype and device as `like`; BadInput or NonFinite for others."""
    K, R = matrix(K, "Edit keys"), matrix(R, "Residuals")
    if K.dim() != 2 or K.shape[0] != d or K.shape[1] == 0:
        whose = "null space" if isinstance(like, Tensor) else "factor"
        raise BadInput(
            f"Edit keys of shape {tuple(K.shape)} do not fit a {whose} of width {d}; "
            f"they must be columns, ({d}, B) with B at least 1."
        )
    if R.dim() != 2 or R.shape[1] != K.shape[1]:
        raise BadInput(
            f"Residuals of shape {tuple(R.shape)} do not fit {K.shape[1]} edit keys; "
            f"they must be columns, (d, {K.shape[1]})."
        )
    for name, what in (("edit key", K), ("residual", R)):
        if bad := non_finite(what.mT):  # a request is a row there
            entries, (first, row) = bad
            lost = int((~what.isfinite()).any(0).sum())
            raise NonFinite(
                f"{lost} of {what.shape[1]} {name}s hold NaN or infinity, the "
                f"first in column {first}; check that request, or run the model in float32.",
                entries=entries,
                where=(row, first),
            )
    return moved(K, like), moved(R, like)


def finite_change(left: Tensor, right: Tensor) -> LowRank:
    """A change of left (d, B) and right (d_k, B), or NonFinite where one of them overflows its dtype."""
    for name, factor in (("left", left), ("right", right)):
        if bad := non_finite(factor):
            entries, (row, column) = bad
            raise NonFinite(
                f"The {name} factor of the update overflows {factor.dtype} in {entries} of its {factor.numel()} "
                f"entries, the first in row {row}, column {column}; the matrix solved with, the keys or the residuals "
                "are too small or too large: check the weight and the ridge.",
                entries=entries,
                where=(row, column),
            )
    return LowRank(left=left, right=right)


THRESHOLD = 0.02


@dataclass(frozen=True)
class NullSpace:
    """An orthonormal basis of the directions whose eigenvalue lies below a threshold."""

    basis: Tensor  # U, shape (d_k, r), float64; r may be 0
    eigenvalues: Tensor  # all of C's, ascending, shape (d_k,), float64
    threshold: float  # in the units of C: eigenvalues below it count as zero

    @property
    def rank(self) -> int:
        """r, the number of directions."""
        return self.basis.shape[1]

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.basis.device

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return sum(t.numel() * t.element_size() for t in (self.basis, self.eigenvalues))

    @isolated()
    def projector(self) -> Tensor:
        """``P = U U^T``, shape (d_k, d_k), float64."""
        return self.basis @ self.basis.mT


@isolated()
def null_space(
    second_moment: Tensor | SecondMoment, *, threshold: float = THRESHOLD, relative: float | None = None
) -> NullSpace:
    """The eigenvectors of C whose eigenvalue is below a threshold (AlphaEdit, arXiv 2410.02355).

    C (d_k, d_k) is the mean of ``k k^T``, of which the lower triangle is read, or the moment whose mean is taken. With
    `relative` the threshold is that multiple of the mean of C's diagonal.

    Raises:
        BadInput: C is no dense square matrix of numbers, or a moment without a key.
        NonFinite: C holds NaN or infinity.
        ValueError: The threshold is not a finite number above 0.
    """
    if isinstance(second_moment, SecondMoment):
        second_moment = second_moment.second_moment
    second_moment = square(second_moment, "A second moment")
    name, value = ("threshold", threshold) if relative is None else ("relative", relative)
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} must be a finite number above 0 but is {value!r}; 0.02 is usual.")
    C = second_moment.to(place_of_float64(second_moment.device)).double()
    if bad := non_finite(C):
        entries, (row, column) = bad
        raise NonFinite(
            f"The second moment holds {entries} entries that are NaN or infinite, the first "
            f"in row {row}, column {column}; collect it again from a model in float32.",
            entries=entries,
            where=(row, column),
        )
    limit = threshold if relative is None else relative * float(C.diagonal().mean())
    eigenvalues, vectors = torch.linalg.eigh(C)
    kept = int((eigenvalues < limit).sum())  # ascending, so these are the first
    return NullSpace(vectors[:, :kept].contiguous(), eigenvalues, limit)


@isolated()
def ridge(K: Tensor, R: Tensor, l2: float) -> LowRank:
    """Ridge regression of steps R (d, B) on keys K (d_k, B): ``Delta = R K^T (K K^T + l2 I)^-1``, l2 above 0.

    MEMIT's equation with a multiple of the identity in the place of A, which is not made: of B keys and d_k directions
    the fewer are solved for.

    Raises:
        BadInput: K is no dense matrix (d_k, B) of numbers, or R none with B columns.
        NonFinite: K or R holds NaN or infinity, or the update overflows.
        NotPositiveDefinite: l2 is too small for the keys.
    """
    K = matrix(K, "Edit keys")
    K, R = checked_edits(K, R, K.shape[0], K)
    return finite_change(R.contiguous(), _solved(K, K, l2))


#: What of a key's length lies in the null space and is no more than the rounding of float32.
NOTHING = 1e-7


@isolated()
def alphaedit(null_space: NullSpace, K: Tensor, R: Tensor, l2: float, preserved: Tensor | None = None) -> LowRank:
    """AlphaEdit: ``Delta^T = (P (K K^T + K_p K_p^T) + l2 I)^-1 P K R^T``, with right in the null space.

    Args:
        null_space: That of the second moment, width d_k; see `null_space`.
        K: Edit keys, shape (d_k, B); equal keys are fine where l2 is above 0.
        R: Residuals, shape (d, B).
        l2: How much the size of the change counts; released with 10. With 0 the keys are led to their residuals
            exactly, and earlier keys are not moved at all.
        preserved: Keys K_p of earlier edits, shape (d_k, m), m may be 0; None are none.

    Raises:
        NoNullSpace: The null space has no direction, or a key has no part in it.
        BadInput: K or earlier keys are no dense matrix of numbers that is d_k wide, R has not B columns, or there is no
            null space.
        NonFinite: K, R or an earlier key holds NaN or infinity, or the update overflows.
        NotPositiveDefinite: l2 is 0, or too small for float64, and the keys' parts are not independent.
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
            f"No eigenvalue of the second moment of width {U.shape[0]} is below the threshold {null_space.threshold:g} "
            f"(the smallest is {float(null_space.eigenvalues[0]):g}), so there is no null space to edit in; raise "
            "threshold, or pass relative, a multiple of the mean of the diagonal."
        )
    K, R = checked_edits(K, R, U.shape[0], U)
    K_u = U.mT @ K  # (r, B)
    length = torch.linalg.vector_norm(K, dim=0)  # (B,)
    lost = torch.linalg.vector_norm(K_u, dim=0) <= NOTHING * length
    if bool(lost.any()):
        columns = tuple(int(i) for i in lost.nonzero()[:, 0])
        what = "is zero" if float(length[columns[0]]) == 0 else "lies outside the null space"
        raise NoNullSpace(
            f"{len(columns)} of {K.shape[1]} edit keys have no part in the null space of {null_space.rank} directions "
            f"(threshold {null_space.threshold:g}), the first in column {columns[0]}, which {what}; raise threshold or "
            "relative, or leave out that request.",
            columns=columns,
        )
    J = K_u
    earlier = None if preserved is None else matrix(preserved, "Keys of earlier edits")
    if earlier is not None and earlier.numel():
        if earlier.dim() != 2 or earlier.shape[0] != U.shape[0]:
            raise BadInput(
                f"Keys of earlier edits of shape {tuple(earlier.shape)} do not fit a null space of "
                f"width {U.shape[0]}; they must be columns, ({U.shape[0]}, m)."
            )
        J = torch.cat([K_u, U.mT @ checked_edits(earlier, earlier[:1], U.shape[0], U)[0]], 1)  # (r, B + m)
    return finite_change(R.contiguous(), U @ _solved(J, K_u, l2))


def _solved(J: Tensor, K_u: Tensor, l2: float) -> Tensor:
    """``(J J^T + l2 I)^-1 K_u`` (r, B) for the keys J (r, B + m), of which K_u (r, B) come first."""
    (r, n), B = J.shape, K_u.shape[1]
    wide = n > r and l2 > 0  # more keys than directions: they depend on one another
    S = J @ J.mT if wide else J.mT @ J
    S.diagonal().add_(l2)
    factor = _independent(
        S,
        f"The {n} keys, those of earlier edits among them, are not independent in the {r} directions of the null space "
        f"with l2={l2:g}, so they cannot all be led where they shall; pass l2=10, remove duplicate requests, or raise "
        "the threshold.",
    )
    if wide:
        return factor.solve(K_u)
    return J @ factor.solve(torch.eye(n, B, dtype=J.dtype, device=J.device))
