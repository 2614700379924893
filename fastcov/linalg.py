"""Factor once, solve many: a Cholesky factor with the jitter that it took on record, and its update by new columns."""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcov.errors import BadInput, NonFinite, NotPositiveDefinite
from fastcov.hooks import isolated, matrix, shares_entries, square
from fastcov.moments import SecondMoment, check_intensity, mirror, shrunk
from fastcov.ops import rank_k_update

logger = logging.getLogger(__name__)

_LOOKED_AT = 1 << 16  # entries searched for NaN at a time
JITTERS = (0.0, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4)


@isolated()
def factorize(A: Tensor, *, jitters: Sequence[float] = JITTERS, in_place: bool = False) -> CholeskyFactor:
    """The Cholesky factor of a symmetric matrix, with jitter only where it cannot do without.

    The jitters are tried in turn, each times the mean of the diagonal; one that was needed is logged as a warning and
    is on record in the factor, with an estimate of the rank. A matrix that is singular up to rounding counts as failed
    too. It takes 0.3 of a matrix with `in_place`, else 1.3, jitter or not (for d from 1,024 on); on a CUDA device with
    room for it a whole one more, for one call of the library in place of blocks.

    Args:
        A: The matrix (d, d), float32 or float64, a tensor or a NumPy array. Only its lower triangle is read.
        jitters: What to add to the diagonal, relative to its mean, in the order of trial.
        in_place: Use A itself where it can be written over, both triangles; after an error the lower one is as it was.

    Raises:
        NonFinite: The lower triangle holds NaN or infinity.
        NotPositiveDefinite: No jitter was enough, or the diagonal's mean is not above 0.
        BadInput: A is no dense square matrix of numbers, or neither float32 nor float64.
        ValueError: A jitter is negative or not finite.
    """
    given: object = A
    if isinstance(given, SecondMoment):
        raise BadInput(
            "A SecondMoment is factorised with a weight and a ridge; pass fastcov.regularised(moment, weight, ridge)."
        )
    # One matrix holds it all: L grows in the lower triangle, while the upper one and the diagonal,
    # which is set aside, keep what another attempt needs.
    work = square(A, "The matrix to factorise")
    if work.dtype not in (torch.float32, torch.float64):
        raise BadInput(f"The matrix must be float32 or float64 but is {work.dtype}; convert it.")
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
        if cholesky_(work) and not _is_noise(CholeskyFactor(work, float(jitter)), shifted):
            rank = None if pivots is None else sum(pivot > 10 * jitter for pivot in pivots)
            if jitter:
                logger.warning(
                    "a matrix of width %d needed a jitter of %g times its mean diagonal (%g)%s",
                    work.shape[0],
                    jitter,
                    mean,
                    "" if rank is None else f"; its rank is about {rank}",
                )
            return CholeskyFactor(work, float(jitter), rank)
        _restore(work, diagonal)
        if pivots is None:  # the first failure, of which NaN may be the cause
            pivots = _checked_pivots(work, diagonal)
    rank = len(_checked_pivots(work, diagonal) if pivots is None else pivots)
    if mean > 0:
        message = (
            f"The matrix of width {len(work)} and of a rank of about {rank} is not positive definite, not "
            f"even with {max(tried, default=0.0):g} times its mean diagonal added (tried "
            f"{', '.join(f'{jitter:g}' for jitter in tried) or 'none'}); collect more keys or pass a ridge."
        )
    else:
        message = (
            f"The matrix of width {len(work)} has a diagonal of mean {mean:g}, and no jitter relative to that makes it "
            "positive definite; collect keys that are not all zero, or pass a ridge."
        )
    raise NotPositiveDefinite(message, tried=tuple(tried), d=len(work), rank=rank)


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
    """``A = weight * C + ridge * I``, the part of equation (2) that does not depend on the edits: a new matrix.

    With a relative ridge r and a shrinkage a, and m the mean of C's diagonal, it is ``weight * ((1 - a) C + a m I) +
    (ridge + r * weight * m) I``. Shrinking keeps the mean of the diagonal, so neither changes what the other one means.

    Args:
        second_moment: C, the mean of ``k k^T``, shape (d_k, d_k), of which the lower triangle is enough for
            `factorize`; or the moment, read without a copy, of which only the lower triangle of the result means
            anything.
        weight: How much the preserved keys count; a finite number above 0.
        ridge: What is added to the diagonal; 0 or a finite number above.
        dtype: The dtype of the result, float32 or float64.
        relative_ridge: What is added to the diagonal, over the mean of the diagonal of ``weight * C``; 0 or above.
        shrinkage: How far C is moved towards a multiple of the identity, from 0 to 1; see `fastcov.oas`.

    Raises:
        BadInput: C is no dense square matrix of numbers, or a moment without a key, or the dtype is another.
        ValueError: The weight, a ridge or the shrinkage is out of its range.
    """
    count = 1
    if isinstance(second_moment, SecondMoment):
        count = second_moment.count
        if count == 0:
            raise BadInput(f"This moment of width {second_moment.d} has seen no key and has no mean; update it first.")
        second_moment = second_moment.lower
    second_moment = square(second_moment, "A second moment")
    if dtype not in (torch.float32, torch.float64):
        raise BadInput(f"The result must be float32 or float64 but is to be {dtype}; pass one.")
    if not math.isfinite(weight) or weight <= 0:
        raise ValueError(f"The weight must be finite and above 0 but is {weight!r}; 15000 is usual.")
    for name, value in (("ridge", ridge), ("relative_ridge", relative_ridge)):
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"The {name} must be finite and not below 0 but is {value!r}; 0 is usual.")
    check_intensity(shrinkage)
    A = second_moment.to(dtype, copy=True).mul_(weight / count)
    added = ridge
    if relative_ridge or shrinkage:  # else nothing is read, and nothing is waited for on a GPU
        mean = float(A.diagonal().mean())
        shrunk(A, shrinkage, in_place=True)
        added += relative_ridge * mean
    A.diagonal().add_(added)
    return A


def _restore(work: Tensor, diagonal: Tensor) -> None:
    """Put the matrix back into the lower triangle, from the upper one and its diagonal (d,)."""
    mirror(work.mT)
    work.diagonal().copy_(diagonal)


def _checked_pivots(work: Tensor, diagonal: Tensor) -> list[float]:
    """The pivots of a matrix of finite numbers, which is afterwards as it was."""
    if bad := non_finite(work, lower=True):
        entries, where = bad
        raise NonFinite(
            f"The lower triangle of the matrix of width {len(work)} holds {entries} entries of NaN or infinity, the "
            f"first in row {where[0]}, column {where[1]}; collect the keys again, or in float64.",
            entries=entries,
            where=where,
        )
    pivots = pivots_(work, diagonal)
    _restore(work, diagonal)
    return pivots


def _is_noise(factor: CholeskyFactor, diagonal: Tensor) -> bool:
    """Whether the smallest eigenvalue of the matrix, scaled to a unit diagonal, is rounding error."""
    # A matrix of too few keys often passes by luck, with a last pivot that is noise, and so is then every
    # solve. A few steps of inverse iteration with the factor itself; each costs two solves of one column.
    # Matrices of d - 1 keys come out below half a unit of rounding, those of d + 1 keys above 90.
    scale = diagonal.sqrt()  # (d,): the scaled matrix is A over the scale of its row and column
    x = torch.randn(factor.d, generator=torch.Generator().manual_seed(0)).to(scale)  # (d,)
    growth = x.norm()
    for _ in range(3):
        x = scale * factor.solve(scale * (x / growth))
        growth = x.norm()
    # Written so that an overflow, infinity or NaN, counts as noise.
    return not bool(growth * (4 * torch.finfo(x.dtype).eps) < 1)


_SMALLEST, _LARGEST = 32, 64  # coordinates eliminated at a time
_WAITING = 0.1  # of the largest pivot: what a pivot of the same block must be


def pivots_(A: Tensor, diagonal: Tensor) -> list[float]:
    """The pivots of a positive semidefinite matrix, scaled to a unit diagonal; A is used up.

    Of A (d, d), float32 or float64, only the lower triangle is read, and changed; its diagonal (d,) is no view of it.
    The pivots come roughly from large to small, each between 0 and 1: the share of a coordinate's mean square that
    those before it do not explain. How many there are estimates the rank of a semidefinite matrix: dead coordinates,
    copies of others and whatever exceeds the number of keys do not count. Of an indefinite one it is the number of
    coordinates that could be eliminated before nothing positive was left.
    """
    # A Cholesky elimination that takes, block by block, the coordinates of which most is left, and skips
    # those of which no more is left than rounding. About the arithmetic of three factorisations.
    d = A.shape[0]
    size = max(_SMALLEST, min(_LARGEST, d // 24))  # five panels of it are a fifth of the matrix
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
        chosen = left.topk(min(candidates, size)).indices  # (b,)
        # Row i of the symmetric matrix: left of the diagonal as it is, from there on the column.
        rows = A[chosen]  # (b, d)
        torch.where(columns <= chosen[:, None], rows, A[:, chosen].mT, out=rows)
        scales = scale[chosen]
        block = (rows[:, chosen] / scales / scales[:, None]).cpu().double()  # (b, b)
        order, factor = _eliminate(block)
        found += factor.diagonal().square().tolist()
        order = order.to(A.device)
        untried[chosen[order]] = False
        rows = rows[order]  # (r, d)
        factor = factor.to(A.dtype).to(A.device) * scales[order][:, None]
        half = torch.linalg.solve_triangular(factor, rows, upper=False)
        del rows
        rank_k_update(A, half, alpha=-1.0, kernel=kernel)


def _eliminate(block: Tensor) -> tuple[Tensor, Tensor]:
    """A small matrix (b, b): r coordinates, largest pivot first, and their Cholesky factor (r, r), lower triangle."""
    left = block.clone()
    remaining = left.diagonal()
    least = _WAITING * float(remaining.max())
    order: list[int] = []
    columns: list[Tensor] = []
    while len(order) < len(left):
        pivot = int(remaining.argmax())
        # What falls behind waits for another block. A coordinate of which little is left may only be
        # taken when no better one is left anywhere: it would magnify the rounding of all others.
        if float(remaining[pivot]) < least:
            break
        column = left[:, pivot] / remaining[pivot].sqrt()  # (b,)
        left.addr_(column, column, alpha=-1)
        remaining[pivot] = -1.0  # taken
        order.append(pivot)
        columns.append(column)
    taken = torch.tensor(order)
    return taken, torch.stack(columns, 1)[taken]


def cholesky_(A: Tensor) -> bool:
    """Overwrite the lower triangle of A (d, d) with its Cholesky factor; whether every pivot was above 0.

    A is float32 or float64, with any strides; nothing above its diagonal is read or changed. Without a factor the lower
    triangle holds nothing of use.
    """
    # Right-looking: the factor of a diagonal block, the panel below it by a triangular solve, then the
    # triangle that is left by a symmetric rank-k update of half the arithmetic of a product. Workspace
    # is one panel, or two where it is copied, and two more in which the native kernel packs it.
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
        corner.triu_(1).add_(L)
        if stop < d:
            below = A[stop:, start:stop]  # (m, width)
            panel = torch.linalg.solve_triangular(L, below.mT, upper=False)  # (width, m)
            below.copy_(panel.mT)
            rank_k_update(A[stop:, stop:], panel, alpha=-1.0, kernel=kernel)
    return True


def block_width(d: int, device: torch.device) -> int:
    """How many columns `cholesky_` takes at a time for a float64 matrix of width d, or a smaller one."""
    # An accelerator waits for every block, so all of it is one where there is room: the library's copy,
    # and half as much to work in.
    if device.type == "cuda" and 1.5 * 8 * d * d <= free_memory(device):
        return d
    # Fewer than the least leave too little to each matrix product. On an accelerator there are fewer
    # blocks, and nothing is packed there.
    least, most, blocks = (64, 256, 16) if device.type == "cpu" else (128, 1024, 12)
    return max(least, min(most, d // blocks // 32 * 32))


def moved(x: Tensor, like: CholeskyFactor | Tensor) -> Tensor:
    """A tensor in the dtype and on the device of another, or in which a factor answers."""
    if like.dtype == torch.float64:
        return x.to(like.device).to(like.dtype)  # one of the devices may not have float64
    return x.to(like.dtype).to(like.device)


def non_finite(A: Tensor, *, lower: bool = False) -> tuple[int, tuple[int, int]] | None:
    """How many entries of a matrix, or of its lower triangle, hold NaN or infinity, and row and column of the first."""
    entries, first = 0, None
    rows = max(64, _LOOKED_AT // max(1, A.shape[1]))
    for start in range(0, A.shape[0], rows):
        bad = ~A[start : start + rows].isfinite()
        if bool((bad.tril_(start) if lower else bad).any()):
            entries += int(bad.sum())
            row, column = bad.nonzero()[0].tolist()
            first = first or (start + row, column)
    return None if first is None else (entries, first)


def place_of_float64(device: torch.device) -> torch.device:
    """Where float64 numbers for a matrix on this device live: Apple's GPUs have none."""
    return torch.device("cpu") if device.type == "mps" else device


@dataclass(frozen=True)
class CholeskyFactor:
    """The factor of a positive definite matrix, ``L L^T = A + jitter * mean(diag A) * I``; L is lower triangular.

    Right sides B (d, m) or (d,) may be of any real floating dtype, with any strides and on any device, or NumPy arrays;
    they are read in the dtype and on the device of the answer. What is no such matrix with d rows is `BadInput`.
    """

    lower: Tensor  # (d, d); above the diagonal stands no part of L, `factorize` leaves A there
    jitter: float  # what was added to the diagonal, relative to the mean of the diagonal of A
    rank: int | None = None  # where a jitter was needed, about how many directions of A stand out above it

    @property
    @isolated()
    def L(self) -> Tensor:
        """L with zeros above its diagonal, shape (d, d): a copy."""
        return self.lower.tril()

    @property
    def d(self) -> int:
        """The width of the matrix."""
        return self.lower.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which `solve` answers."""
        return self.lower.dtype

    @property
    def device(self) -> torch.device:
        """The device on which `solve` answers."""
        return self.lower.device

    @property
    def nbytes(self) -> int:
        """What the factor takes."""
        return self.lower.numel() * self.lower.element_size()

    @isolated()
    def half_solve(self, B: Tensor) -> Tensor:
        """``L^-1 B``: whitened columns."""
        return self._triangular(B, transposed=False)

    @isolated()
    def back_solve(self, B: Tensor) -> Tensor:
        """``L^-T B``, which makes a `half_solve` whole."""
        return self._triangular(B, transposed=True)

    @isolated()
    def solve(self, B: Tensor) -> Tensor:
        """``A^-1 B``, in B's shape; A with its jitter."""
        return self.back_solve(self.half_solve(B))

    @isolated()
    def solve_and_gram(self, K: Tensor) -> tuple[Tensor, Tensor]:
        """``X = A^-1 K`` (d, B) and the symmetric ``K^T A^-1 K`` (B, B), for K of shape (d, B)."""
        H = self.half_solve(K)  # (d, B)
        return self.back_solve(H), H.mT @ H

    @isolated()
    def logdet(self) -> Tensor:
        """The logarithm of the determinant of A with its jitter, a scalar tensor."""
        return 2 * self.lower.diagonal().log().sum()

    def _triangular(self, B: Tensor, *, transposed: bool) -> Tensor:
        B = moved(self._right_side(B), self.lower)
        factor = self.lower.mT if transposed else self.lower
        # Reads no entry on the other side of the diagonal. Blocks with inverted diagonals, all of
        # matrix products, were measured on a CPU and are no faster than this.
        solved: Tensor = torch.linalg.solve_triangular(factor, as_columns(B), upper=transposed)  # (d, m)
        return solved.reshape(B.shape)

    def _right_side(self, B: Tensor) -> Tensor:
        B = matrix(B, "A right side")
        if B.dim() not in (1, 2) or B.shape[0] != self.d:
            raise BadInput(
                f"A right side of shape {tuple(B.shape)} does not fit a factor of width {self.d}; "
                f"it must be ({self.d}, m) or ({self.d},)."
            )
        return B


@dataclass(frozen=True)
class UpdatedFactor(CholeskyFactor):
    """``M M^T = A + P P^T`` for a factor ``L L^T = A`` and columns P (d, m).

    With the whitened columns ``H = L^-1 P`` and the Cholesky factor C of ``I + H^T H`` (m, m),

        M = L (I + H (I + C)^-1 H^T),   M^-1 = (I - H (I + C^T)^-1 C^-1 H^T) L^-1,

    which multiplying out shows (Ambikasaran, O'Neil and Singh 2014, arXiv 1405.0223). M is a square root and no
    triangle; the gram ``K^T A^-1 K`` is had from half a solve, without the difference of two large numbers in
    Woodbury's formula. `whitened` is H (d, m), `small` has C in its lower triangle; `lower`, `jitter` and `rank` are
    those of A's factor.
    """

    whitened: Tensor = field(kw_only=True)
    small: Tensor = field(kw_only=True)

    @property
    @isolated()
    def L(self) -> Tensor:
        """M, shape (d, d): a square root of the matrix, not triangular."""
        H, C = self.whitened, self.small
        inner = torch.linalg.solve_triangular(C + _eye(C), H.mT, upper=False)  # (I + C)^-1 H^T
        lower = super().L
        root: Tensor = lower + (lower @ H) @ inner
        return root

    @property
    def nbytes(self) -> int:
        """What the factor takes, the factor of A included."""
        return super().nbytes + sum(part.numel() * part.element_size() for part in (self.whitened, self.small))

    @isolated()
    def half_solve(self, B: Tensor) -> Tensor:
        """``M^-1 B``: whitened columns."""
        G = super().half_solve(B)
        H, C = self.whitened, self.small
        inner = torch.linalg.solve_triangular(C, H.mT @ as_columns(G), upper=False)
        inner = torch.linalg.solve_triangular((C + _eye(C)).mT, inner, upper=True)
        half: Tensor = G - (H @ inner).reshape(G.shape)
        return half

    @isolated()
    def back_solve(self, B: Tensor) -> Tensor:
        """``M^-T B``, which makes a `half_solve` whole."""
        B = moved(self._right_side(B), self.lower)
        H, C = self.whitened, self.small
        inner = torch.linalg.solve_triangular(C + _eye(C), H.mT @ as_columns(B), upper=False)
        inner = torch.linalg.solve_triangular(C.mT, inner, upper=True)
        return super().back_solve(B - (H @ inner).reshape(B.shape))

    @isolated()
    def logdet(self) -> Tensor:
        """The logarithm of the determinant of ``A + P P^T``, a scalar tensor."""
        return super().logdet() + 2 * self.small.diagonal().log().sum()


@isolated()
def updated(factor: CholeskyFactor, P: Tensor) -> UpdatedFactor:
    """The factor of ``A + P P^T``, for columns P (d, m), m at least 1, in any dtype and on any device.

    One that was updated before is updated again, which costs products with the new columns only.

    Raises:
        BadInput: P is no dense matrix (d, m) of numbers.
        NonFinite: P holds NaN or infinity, or the squares of its whitened columns overflow.
    """
    P = matrix(P, "The columns of an update")
    if P.dim() != 2 or P.shape[0] != factor.d or P.shape[1] == 0:
        raise BadInput(
            f"Columns of shape {tuple(P.shape)} do not fit a factor of width {factor.d}; "
            f"they must be ({factor.d}, m) with m at least 1."
        )
    P = moved(P, factor)
    if not bool(P.isfinite().all()):
        raise NonFinite(
            f"The columns {tuple(P.shape)} of an update hold NaN or infinity in {P.dtype}; leave "
            "out those keys, or run the model in float32."
        )
    G = CholeskyFactor.half_solve(factor, P)  # (d, m)
    if not isinstance(factor, UpdatedFactor):
        small = _root_of_one_plus_gram(G)
        return UpdatedFactor(factor.lower, factor.jitter, factor.rank, whitened=G, small=small)
    # The factor of [[C C^T, H^T G], [G^T H, I + G^T G]], of which C is there. The last corner is
    # I + G^T G less what C's columns explain: the gram of what is left of P after a half solve.
    H, C = factor.whitened, factor.small
    beside = torch.linalg.solve_triangular(C, H.mT @ G, upper=False)  # (m, new)
    last = _root_of_one_plus_gram(factor.half_solve(P))
    old, new = C.shape[0], last.shape[0]
    small = C.new_zeros(old + new, old + new)
    small[:old, :old], small[old:, :old], small[old:, old:] = C, beside.mT, last
    return UpdatedFactor(factor.lower, factor.jitter, factor.rank, whitened=torch.cat([H, G], 1), small=small)


class FactorCache(OrderedDict[tuple[int, Hashable], Any]):
    """Factors (or null spaces) by layer and what they are made with, as many as their devices have room for.

    Edits walk through the same layers again and again, where dropping what was used longest ago would drop what is
    needed next. So what other settings need goes first, the least recently used before others; then, of the same
    settings, the most recently used, whose turn comes last. Whoever uses one moves it to the end.
    """

    #: Bytes held at most, of which one factor is always held; None takes what a device has free, less a quarter of it
    #: and what making another factor needs.
    capacity: int | None = None

    def make_room(
        self, layers: Sequence[int], kind: Hashable, place: torch.device, d: int, matrices: int
    ) -> torch.device:
        """Drop what there is no room for beside one more of width d on a device, made with these settings (`kind`).

        An edit with them walks through `layers`; while it is made there are so many matrices (d, d) of float64.

        Returns:
            Where to make it: that device or, where it is no CPU and has not the room for even one, the CPU. What is
            solved there has the digits of float64 as well, which a factor of half the size in float32 would not have.
        """
        size, there = 8 * d * d, [key for key in self if self[key].device == place]
        needed = [key for key in there if key[1] == kind and key[0] in layers]
        for key in [*(key for key in there if key not in needed), *reversed(needed)]:
            held = sum(self[key].nbytes for key in there if key in self)
            if self.capacity is not None and held + size <= self.capacity:
                return place
            if self.capacity is None and held + matrices * size <= 0.75 * (free_memory(place) + held):
                return place
            del self[key]
        if place.type == "cpu" or self.capacity is not None or matrices * size <= (free := free_memory(place)):
            return place
        logger.warning(
            "%s has %.2f GB free, and a factor of width %d takes %.2f GB while it is made; it is made on the CPU, "
            "where solving takes longer; for more room, load the model in fewer bytes or on more devices",
            *(place, free / 1e9, d, matrices * size / 1e9),
        )
        return self.make_room(layers, kind, torch.device("cpu"), d, matrices)


def free_memory(device: torch.device) -> float:
    """The bytes that may still be taken on a device; infinity where nothing says how many.

    On a CUDA device what torch has reserved and does not use counts as free. On a CPU it is what Linux calls
    available, or what is left of the limit of the process' group (a container's) where that is less.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused)
    if device.type != "cpu":
        return math.inf
    found = math.inf
    with suppress(OSError, StopIteration, ValueError):
        line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
        found = float(line.split()[1]) * 1024
    with suppress(OSError, ValueError):  # "max" where there is no limit
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        found = min(found, float(limit - used))
    return found


def _root_of_one_plus_gram(G: Tensor) -> Tensor:
    """The Cholesky factor of ``I + G^T G`` (m, m), which is positive definite for every G."""
    gram = G.mT @ G
    gram.diagonal().add_(1.0)
    if not bool(gram.isfinite().all()):
        raise NonFinite(
            f"The gram of {gram.shape[0]} whitened columns overflows {gram.dtype}; the columns "
            "are too large against the matrix: check the weight and the ridge."
        )
    root: Tensor = torch.linalg.cholesky(gram)
    return root


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[0], dtype=like.dtype, device=like.device)


def as_columns(x: Tensor) -> Tensor:
    """A matrix as it is, a vector (d,) as one column (d, 1)."""
    return x.unsqueeze(1) if x.dim() == 1 else x
