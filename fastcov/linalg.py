"""Factor once, solve many: a Cholesky factor with the jitter that it took on record."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcov.errors import NonFiniteMatrix, NotPositiveDefinite, WrongWidth

logger = logging.getLogger(__name__)

JITTERS = (0.0, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4)


@dataclass(frozen=True)
class CholeskyFactor:
    """The factor of a positive definite matrix, ``L L^T = A + jitter * mean(diag A) * I``.

    Attributes:
        L: The lower factor, shape (d, d), zero above its diagonal.
        jitter: What was added to the diagonal, relative to the mean of the diagonal of A.
    """

    L: Tensor
    jitter: float

    @property
    def d(self) -> int:
        """The width of the matrix."""
        return self.L.shape[0]

    def half_solve(self, B: Tensor) -> Tensor:
        """``L^-1 B``: whitened columns, for B of shape (d, m) or (d,)."""
        return self._triangular(B, transposed=False)

    def back_solve(self, B: Tensor) -> Tensor:
        """``L^-T B``, which makes a `half_solve` whole, for B of shape (d, m) or (d,)."""
        return self._triangular(B, transposed=True)

    def solve(self, B: Tensor) -> Tensor:
        """``A^-1 B`` for B of shape (d, m) or (d,), in B's shape.

        Raises:
            WrongWidth: B has not d rows.
        """
        return self.back_solve(self.half_solve(B))

    def logdet(self) -> Tensor:
        """The logarithm of the determinant of A with its jitter, a scalar tensor."""
        return 2 * self.L.diagonal().log().sum()

    def _triangular(self, B: Tensor, *, transposed: bool) -> Tensor:
        if B.dim() not in (1, 2) or B.shape[0] != self.d:
            raise WrongWidth(
                f"A right side of shape {tuple(B.shape)} does not fit a factor of width {self.d}; "
                f"it must be ({self.d}, m) or ({self.d},)."
            )
        columns = B if B.dim() == 2 else B.unsqueeze(1)  # (d, m)
        factor = self.L.mT if transposed else self.L
        solved: Tensor = torch.linalg.solve_triangular(factor, columns, upper=transposed)
        return solved.reshape(B.shape)


def factorize(
    A: Tensor, *, jitters: Sequence[float] = JITTERS, in_place: bool = False
) -> CholeskyFactor:
    """The Cholesky factor of a symmetric matrix, with jitter only where it cannot do without.

    The jitters are tried in turn, each times the mean of the diagonal; one that was needed is
    logged as a warning and is on record in the factor. A factorisation also counts as failed where
    the matrix is singular up to rounding: one of too few keys often passes by luck, with a last
    pivot that is noise, and so is then every solve. The test scales the diagonal to one first, so
    that coordinates of small scale are not at fault.

    Args:
        A: The matrix (d, d), float32 or float64. Only its lower triangle is read.
        jitters: What to add to the diagonal, relative to its mean, in the order of trial.
        in_place: Leave the jitter on A's diagonal, which spares a copy of A where one is needed.

    Raises:
        NonFiniteMatrix: The lower triangle holds NaN or infinity.
        NotPositiveDefinite: No jitter was enough, or the diagonal's mean is not above 0.
        WrongWidth: A is not a square matrix.
        ValueError: A dtype other than float32 and float64.
    """
    if A.dim() != 2 or A.shape[0] != A.shape[1] or A.shape[0] == 0:
        raise WrongWidth(
            f"Only a square matrix can be factorised but this one is {tuple(A.shape)}; pass (d, d)."
        )
    if A.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"The matrix must be float32 or float64 but is {A.dtype}; convert it.")
    d = A.shape[0]
    _check_finite(A)
    diagonal = A.diagonal().clone()  # (d,)
    mean = float(diagonal.mean(dtype=torch.float64))
    if mean <= 0:
        raise NotPositiveDefinite(
            f"The matrix of width {d} has a diagonal of mean {mean:g}, and no jitter relative to "
            "that makes it positive definite; collect keys that are not all zero, or pass a ridge.",
            d=d,
        )
    work = A
    for jitter in jitters:
        if jitter != 0:
            if work is A and not in_place:
                work = A.clone()
            work.diagonal().copy_(diagonal + jitter * mean)
        L, info = torch.linalg.cholesky_ex(work)
        factor = CholeskyFactor(L=L, jitter=float(jitter))
        if int(info) == 0 and not _is_noise(factor, work.diagonal()):
            if jitter != 0:
                logger.warning(
                    "a matrix of width %d needed a jitter of %g times its mean diagonal (%g)",
                    d,
                    jitter,
                    mean,
                )
            return factor
    tried = tuple(float(jitter) for jitter in jitters)
    raise NotPositiveDefinite(
        f"The matrix of width {d} is not positive definite, not even with "
        f"{max(tried, default=0.0):g} times its mean diagonal added (tried "
        f"{', '.join(f'{jitter:g}' for jitter in tried) or 'none'}); "
        "collect more keys or pass a ridge.",
        tried=tried,
        d=d,
    )


def regularised(
    second_moment: Tensor, weight: float, ridge: float, dtype: torch.dtype = torch.float64
) -> Tensor:
    """``A = weight * C + ridge * I``, the part of equation (2) that does not depend on the edits.

    Args:
        second_moment: C, the mean of ``k k^T``, shape (d_k, d_k).
        weight: How much the preserved keys count; a finite number above 0.
        ridge: What is added to the diagonal; 0 or a finite number above.
        dtype: Of the result.

    Returns:
        A new matrix (d_k, d_k), to be factorised.

    Raises:
        WrongWidth: C is not square.
        ValueError: The weight or the ridge is out of its range.
    """
    if second_moment.dim() != 2 or second_moment.shape[0] != second_moment.shape[1]:
        raise WrongWidth(
            f"A second moment must be square but is {tuple(second_moment.shape)}; pass (d, d)."
        )
    if not math.isfinite(weight) or weight <= 0:
        raise ValueError(
            f"The weight must be finite and above 0 but is {weight!r}; 15000 is usual."
        )
    if not math.isfinite(ridge) or ridge < 0:
        raise ValueError(f"The ridge must be finite and not below 0 but is {ridge!r}; 0 is usual.")
    A = second_moment.to(dtype, copy=True).mul_(weight)
    A.diagonal().add_(ridge)
    return A


def _check_finite(A: Tensor) -> None:
    """Refuse NaN and infinity in the lower triangle; the upper one may hold anything."""
    d = A.shape[0]
    step = max(1, (1 << 22) // d)  # a block of rows at a time, not a second matrix
    for start in range(0, d, step):
        block = A[start : start + step].tril(start)  # zeros above the diagonal
        bad = int((~block.isfinite()).sum())
        if bad:
            raise NonFiniteMatrix(
                f"The matrix of width {d} holds {bad} entries of NaN or infinity in its rows "
                f"{start} to {start + block.shape[0] - 1}; collect the keys again, or in float64."
            )


def _is_noise(factor: CholeskyFactor, diagonal: Tensor) -> bool:
    """Whether the smallest eigenvalue of the matrix, scaled to a unit diagonal, is rounding error.

    A few steps of inverse iteration with the factor itself; each costs two solves of one column.
    Matrices of d - 1 keys come out below half a unit of rounding, those of d + 1 keys above 90.
    """
    scale = diagonal.sqrt()  # (d,): the scaled matrix is A over the scale of its row and column
    x = torch.randn(factor.d, generator=torch.Generator().manual_seed(0)).to(scale)  # (d,)
    growth = x.norm()
    for _ in range(3):
        x = scale * factor.solve(scale * (x / growth))
        growth = x.norm()
    # Written so that an overflow, infinity or NaN, counts as noise.
    return not bool(growth * (4 * torch.finfo(x.dtype).eps) < 1)
