"""Factor once, solve many: a Cholesky factor with the jitter that it took on record."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fastcov.errors import BadInput, EmptyCorpus, NonFiniteMatrix, NotPositiveDefinite, QuarticUnknown
from fastcov.factor import TOLERANCE, CholeskyFactor, RefinedFactor, cholesky_, mirror, place_of_float64
from fastcov.hooks import isolated
from fastcov.inputs import shares_entries, square
from fastcov.moments import SecondMoment, check_moment
from fastcov.ops import rank_k_update

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


_BLOCK = 256  # rows whose squares are summed at a time


@isolated()
def ledoit_wolf(moment: SecondMoment) -> float:
    """The intensity of Ledoit and Wolf, for independent keys of any distribution.

    ``a = min(1, (q / n - tr S^2) / (n (tr S^2 - (tr S)^2 / d)))`` with q the sum of ``||k||^4``: how far single keys
    lie from S, over how far S lies from the identity. ("A well-conditioned estimator for large-dimensional covariance
    matrices", Journal of Multivariate Analysis 88, 2004, section 3.)

    Args:
        moment: Of n keys of width d, collected with the sum of ``||k||^4``.

    Returns:
        From 0, the moment as it is, to 1, a multiple of the identity.

    Raises:
        EmptyCorpus: The moment has seen no key.
        NonFiniteMatrix: The sum holds NaN or infinity.
        BadInput: It is no moment.
        QuarticUnknown: The moment does not know the sum of ``||k||^4``.
    """
    n, trace, squares = _traces(moment)
    if moment.quartic is None:
        raise QuarticUnknown(
            f"This moment of width {moment.d} does not know the sum of ||k||^4 that Ledoit-Wolf "
            "needs, because an older version stored it or it was taken over without; "
            'precompute again, or give shrinkage="oas".'
        )
    if not float(moment.quartic) < float("inf"):
        raise NonFiniteMatrix(
            f"The sum of ||k||^4 of this moment of width {moment.d} holds NaN or infinity; collect "
            "the keys again, or in float64."
        )
    spread = squares - trace * trace / moment.d
    error = max(float(moment.quartic) / n - squares, 0.0) / n
    if moment.d == 1 or spread <= 0.0:  # a multiple of the identity already
        return 0.0
    return min(error / spread, 1.0)


@isolated()
def oas(moment: SecondMoment) -> float:
    """The oracle approximating shrinkage, for Gaussian keys.

    ``a = min(1, (tr S^2 + (tr S)^2) / ((n + 1) (tr S^2 - (tr S)^2 / d)))``, the fixed point that "Shrinkage algorithms
    for MMSE covariance estimation" (Chen, Wiesel, Eldar and Hero, IEEE Transactions on Signal Processing 58, 2010)
    gives in equation (23), without its terms in ``2 / d``, which scikit-learn leaves out as well.

    Args:
        moment: Of n keys of width d.

    Returns:
        From 0, the moment as it is, to 1, a multiple of the identity.

    Raises:
        EmptyCorpus: The moment has seen no key.
        NonFiniteMatrix: The sum holds NaN or infinity.
        BadInput: It is no moment.
    """
    n, trace, squares = _traces(moment)
    if moment.d == 1:
        return 0.0
    spread = (n + 1) * (squares - trace * trace / moment.d)
    total = squares + trace * trace
    return total / spread if spread > total else 1.0


def no_shrinkage(moment: SecondMoment) -> float:
    """Zero: the moment as it is."""
    return 0.0


#: The ways to find an intensity, by the name that settings give.
SHRINKAGES: Mapping[str, Callable[[SecondMoment], float]] = {
    "none": no_shrinkage,
    "ledoit-wolf": ledoit_wolf,
    "oas": oas,
}


@isolated()
def shrunk(C: Tensor | SecondMoment, intensity: float, *, in_place: bool = False) -> Tensor:
    """``(1 - a) C + a mean(diag C) I``.

    Entry by entry, so that of a matrix with one triangle filled the result has the same triangle.

    Args:
        C: A second moment (d, d), or the moment whose mean is taken.
        intensity: a, from 0 to 1.
        in_place: Write over C, a tensor, to spare a copy.

    Returns:
        The shrunk matrix (d, d), C itself where it was made in place.

    Raises:
        WrongWidth: C is not square.
        BadInput: C is no dense matrix of numbers, or cannot be written over.
        EmptyCorpus: The moment has seen no key.
        ValueError: The intensity is not from 0 to 1.
    """
    check_intensity(intensity)
    found = C.second_moment if isinstance(C, SecondMoment) else square(C, "A second moment")
    if in_place and (not isinstance(C, Tensor) or C.is_inference() or shares_entries(C)):
        raise BadInput(
            f"This {type(C).__name__} cannot be written over: only a tensor can that was not made "
            "under inference mode and whose entries each have a place; leave out in_place."
        )
    C = found if in_place else found.clone(memory_format=torch.contiguous_format)
    if intensity:
        mean = C.diagonal().mean()
        C.mul_(1 - intensity).diagonal().add_(intensity * mean)
    return C


def check_intensity(intensity: float) -> None:
    """Refuse an intensity that is not from 0 to 1.

    Raises:
        ValueError: It is not, or is NaN.
    """
    if not isinstance(intensity, (int, float)) or not 0 <= intensity <= 1:
        raise ValueError(
            f"The intensity of a shrinkage must be from 0 to 1 but is {intensity!r}; "
            "give what fastcov.oas or fastcov.ledoit_wolf says."
        )


def _traces(moment: SecondMoment) -> tuple[int, float, float]:
    """n, tr S and tr S^2, from the lower triangle."""
    check_moment(moment, "An estimate of shrinkage")
    n = moment.count
    if n == 0:
        raise EmptyCorpus(
            f"This moment of width {moment.d} has seen no key, and there is nothing to shrink; update it first."
        )
    lower = moment.lower
    diagonal = lower.diagonal().cpu().double()  # through the CPU: not every device has float64
    below = sum(_below(lower, start) for start in range(0, moment.d, _BLOCK))
    trace = float(diagonal.sum()) / n
    squares = (2 * below + float(diagonal.square().sum())) / n / n
    if not squares < float("inf"):
        raise NonFiniteMatrix(
            f"The sum of width {moment.d} holds NaN or infinity, or its squares overflow; "
            "collect the keys again, or in float64."
        )
    return n, trace, squares


def _below(lower: Tensor, start: int) -> float:
    """The sum of squares under the diagonal, of one block of rows."""
    stop = min(start + _BLOCK, lower.shape[0])
    left, corner = lower[start:stop, :start], lower[start:stop, start:stop].tril(-1)
    wide = torch.float64 if lower.device.type != "mps" else torch.float32
    # Their norms are taken, and not their squares, which float32 need not hold.
    return sum(float(torch.linalg.vector_norm(part, dtype=wide)) ** 2 for part in (left, corner))
