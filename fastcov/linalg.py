"""Factor once, solve many: a Cholesky factor with the jitter that it took on record."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastcov.cholesky import cholesky_, mirror
from fastcov.errors import BadInput, EmptyCorpus, NonFiniteMatrix, NotPositiveDefinite
from fastcov.factor import CholeskyFactor, RefinedFactor
from fastcov.inputs import shares_entries, square
from fastcov.mode import isolated
from fastcov.moments import SecondMoment
from fastcov.rank import pivots_
from fastcov.refinement import TOLERANCE, place_of_float64
from fastcov.shrinkage import check_intensity, shrunk

__all__ = ["JITTERS", "CholeskyFactor", "RefinedFactor", "factorize", "regularised"]

logger = logging.getLogger(__name__)

JITTERS = (0.0, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4)
_CHECKED = 64  # rows whose entries are looked at together


@isolated()
def factorize(
    A: Tensor,
    *,
    jitters: Sequence[float] = JITTERS,
    in_place: bool = False,
    refine: bool = False,
    tolerance: float = TOLERANCE,
) -> CholeskyFactor:
    """The Cholesky factor of a symmetric matrix, with jitter only where it cannot do without.

    The jitters are tried in turn, each times the mean of the diagonal; one that was needed is logged as a warning and
    is on record in the factor, with an estimate of the rank. A factorisation also counts as failed where the matrix is
    singular up to rounding: one of too few keys often passes by luck, with a last pivot that is noise, and so is then
    every solve. The test scales the diagonal to one first, so that coordinates of small scale are not at fault.

    One matrix holds it all: L grows in the lower triangle, while the upper one and the diagonal, which is set aside,
    keep what another attempt needs. Besides it there are four panels of at most d / 16 columns: with `in_place` 0.3 of
    a matrix, else 1.3, jitter or not (for d from 1,024 on).

    Args:
        A: The matrix (d, d), float32 or float64, a tensor or a NumPy array. Only its lower triangle is read.
        jitters: What to add to the diagonal, relative to its mean, in the order of trial.
        in_place: Use A itself where it can be written over: the factor then lies in A's lower triangle, and what was
            there in the upper one. After an error the lower triangle is as it was. By default A is copied.
        refine: For a float32 matrix: `solve` then answers in float64, refined on the matrix itself until the residual
            is within the tolerance. It takes half the memory of float64, and several solves in place of one. The factor
            is a `RefinedFactor`.
        tolerance: Of `refine`: the norm of the residual over that of the right side.

    Raises:
        NonFiniteMatrix: The lower triangle holds NaN or infinity.
        NotPositiveDefinite: No jitter was enough, or the diagonal's mean is not above 0.
        WrongWidth: A is not a square matrix.
        BadInput: A is no dense matrix of numbers, or neither float32 nor float64, or float64 and to be refined.
        ValueError: A jitter is negative or not finite.
    """
    work = _checked_matrix(A, refine)
    for jitter in jitters:
        if not math.isfinite(jitter) or jitter < 0:
            raise ValueError(f"A jitter must be finite and not below 0 but is {jitter!r}.")
    if not in_place or work.is_inference() or shares_entries(work):
        work = work.clone(memory_format=torch.contiguous_format)
    diagonal = work.diagonal().clone()  # (d,)
    mean = float(diagonal.cpu().double().mean())  # through the CPU: not every device has float64
    mirror(work)
    tried: list[float] = []
    pivots: list[float] | None = None
    for jitter in jitters if mean > 0 else ():
        tried.append(float(jitter))
        shifted = diagonal + jitter * mean if jitter else diagonal
        work.diagonal().copy_(shifted)
        factor = CholeskyFactor(work, float(jitter))
        if cholesky_(work) and not _is_noise(factor, shifted):
            rank = None if pivots is None else sum(pivot > 10 * jitter for pivot in pivots)
            if jitter:
                _warn(work.shape[0], jitter, mean, rank)
            if not refine:
                return CholeskyFactor(work, float(jitter), rank)
            exact = diagonal.to(place_of_float64(work.device)).double() + jitter * mean
            return RefinedFactor(work, float(jitter), rank, diagonal=exact, tolerance=tolerance)
        _restore(work, diagonal)
        if pivots is None:  # the first failure, of which NaN may be the cause
            _check_finite(work)
            pivots = pivots_(work, diagonal)
            _restore(work, diagonal)
    if pivots is None:
        _check_finite(work)
        pivots = pivots_(work, diagonal)
        _restore(work, diagonal)
    raise _failed(work.shape[0], mean, tuple(tried), len(pivots))


@isolated()
def regularised(
    second_moment: Tensor | SecondMoment,
    weight: float,
    ridge: float,
    dtype: torch.dtype = torch.float64,
    *,
    relative_ridge: float = 0.0,
    shrinkage: float = 0.0,
) -> Tensor:
    """``A = weight * C + ridge * I``, the part of equation (2) that does not depend on the edits.

    With a relative ridge r and a shrinkage a, and m the mean of C's diagonal, it is ``weight * ((1 - a) C + a m I) +
    (ridge + r * weight * m) I``. Shrinking keeps the mean of the diagonal, so neither changes what the other one means.

    Args:
        second_moment: C, the mean of ``k k^T``, shape (d_k, d_k), of which the lower triangle is enough for
            `factorize`; or the moment, whose sum is then read where it lies: neither a mean nor the other triangle is
            made, and no copy but the result. A NumPy array is taken too.
        weight: How much the preserved keys count; a finite number above 0.
        ridge: What is added to the diagonal; 0 or a finite number above.
        dtype: Of the result.
        relative_ridge: What is added to the diagonal, over the mean of the diagonal of ``weight * C``; 0 or a finite
            number above.
        shrinkage: How far C is moved towards a multiple of the identity, from 0 to 1; see `fastcov.oas` and
            `fastcov.ledoit_wolf`.

    Returns:
        A new matrix (d_k, d_k), to be factorised. Of a moment only the lower triangle of it means anything.

    Raises:
        WrongWidth: C is not square.
        BadInput: C is no dense matrix of numbers, or the result would be of another dtype.
        EmptyCorpus: The moment has seen no key.
        ValueError: The weight, a ridge or the shrinkage is out of its range.
    """
    count = 1
    if isinstance(second_moment, SecondMoment):
        count = second_moment.count
        if count == 0:
            raise EmptyCorpus(
                f"This moment of width {second_moment.d} has seen no key and has no mean; update it first."
            )
        second_moment = second_moment.lower
    second_moment = square(second_moment, "A second moment")
    if dtype not in (torch.float32, torch.float64):
        raise BadInput(f"The result must be float32 or float64 but is to be {dtype}; pass one.")
    if not math.isfinite(weight) or weight <= 0:
        raise ValueError(f"The weight must be finite and above 0 but is {weight!r}; 15000 is usual.")
    if not math.isfinite(ridge) or ridge < 0:
        raise ValueError(f"The ridge must be finite and not below 0 but is {ridge!r}; 0 is usual.")
    if not math.isfinite(relative_ridge) or relative_ridge < 0:
        raise ValueError(f"The relative_ridge must be finite and not below 0 but is {relative_ridge!r}; 0 is usual.")
    check_intensity(shrinkage)
    A = second_moment.to(dtype, copy=True).mul_(weight / count)
    added = ridge
    if relative_ridge or shrinkage:  # else nothing is read, and nothing is waited for on a GPU
        mean = float(A.diagonal().mean())
        shrunk(A, shrinkage, in_place=True)
        added += relative_ridge * mean
    A.diagonal().add_(added)
    return A


def _checked_matrix(A: object, refine: bool) -> Tensor:
    if isinstance(A, SecondMoment):
        raise BadInput(
            "A SecondMoment is factorised with a weight and a ridge; pass fastcov.regularised(moment, weight, ridge)."
        )
    A = square(A, "The matrix to factorise")
    if A.dtype not in (torch.float32, torch.float64):
        raise BadInput(f"The matrix must be float32 or float64 but is {A.dtype}; convert it.")
    if refine and A.dtype != torch.float32:
        raise BadInput(
            f"Only a float32 factor is refined but the matrix is {A.dtype}; "
            "leave out refine, or convert the matrix to float32."
        )
    return A


def _restore(work: Tensor, diagonal: Tensor) -> None:
    """Put the matrix back into the lower triangle, from the upper one and its diagonal (d,)."""
    mirror(work.mT)
    work.diagonal().copy_(diagonal)


def _check_finite(A: Tensor) -> None:
    """Refuse NaN and infinity in the lower triangle."""
    entries, where = 0, None
    for start in range(0, A.shape[0], _CHECKED):
        bad = ~A[start : start + _CHECKED].tril(start).isfinite()  # (b, d)
        entries += int(bad.sum())
        if where is None and entries:
            row, column = bad.nonzero()[0].tolist()
            where = (start + row, column)
    if where is not None:
        raise NonFiniteMatrix(
            f"The lower triangle of the matrix of width {A.shape[0]} holds {entries} entries of "
            f"NaN or infinity, the first in row {where[0]}, column {where[1]}; collect the keys "
            "again, or in float64.",
            entries=entries,
            where=where,
        )


def _is_noise(factor: CholeskyFactor, diagonal: Tensor) -> bool:
    """Whether the smallest eigenvalue of the matrix, scaled to a unit diagonal, is rounding error.

    A few steps of inverse iteration with the factor itself; each costs two solves of one column. Matrices of d - 1 keys
    come out below half a unit of rounding, those of d + 1 keys above 90.
    """
    scale = diagonal.sqrt()  # (d,): the scaled matrix is A over the scale of its row and column
    x = torch.randn(factor.d, generator=torch.Generator().manual_seed(0)).to(scale)  # (d,)
    growth = x.norm()
    for _ in range(3):
        x = scale * factor.solve(scale * (x / growth))
        growth = x.norm()
    # Written so that an overflow, infinity or NaN, counts as noise.
    return not bool(growth * (4 * torch.finfo(x.dtype).eps) < 1)


def _warn(d: int, jitter: float, mean: float, rank: int | None) -> None:
    logger.warning(
        "a matrix of width %d needed a jitter of %g times its mean diagonal (%g)%s",
        d,
        jitter,
        mean,
        "" if rank is None else f"; its rank is about {rank}",
    )


def _failed(d: int, mean: float, tried: tuple[float, ...], rank: int) -> NotPositiveDefinite:
    if mean > 0:
        return NotPositiveDefinite(
            f"The matrix of width {d} and of a rank of about {rank} is not positive definite, not "
            f"even with {max(tried, default=0.0):g} times its mean diagonal added (tried "
            f"{', '.join(f'{jitter:g}' for jitter in tried) or 'none'}); "
            "collect more keys or pass a ridge.",
            tried=tried,
            d=d,
            rank=rank,
        )
    return NotPositiveDefinite(
        f"The matrix of width {d} has a diagonal of mean {mean:g}, and no jitter relative to "
        "that makes it positive definite; collect keys that are not all zero, or pass a ridge.",
        tried=tried,
        d=d,
        rank=rank,
    )
