"""The factor of a positive definite matrix: made once by `fastcov.factorize`, solved with often."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastcov.errors import BadInput, NonFiniteKeys, NonFiniteMatrix, ResidualTooLarge, WrongWidth
from fastcov.hooks import isolated
from fastcov.inputs import matrix
from fastcov.ops import rank_k_update

# Columns of a block. Fewer than the least leave too little to each matrix product; an accelerator
# waits for every block, so there are fewer of them, and nothing is packed there.
_WIDTHS = {"cpu": (64, 256, 16)}  # the least, the most, blocks of a matrix in between
_WIDTHS_ELSEWHERE = (128, 1024, 12)
_MIRRORED = 64  # rows mirrored at a time, few enough for the cache


TOLERANCE = 1e-12  # of the residual, relative to the right side


def cholesky_(A: Tensor) -> bool:
    """Overwrite the lower triangle of A (d, d) with its Cholesky factor.

    Right-looking: the factor of a diagonal block, the panel below it by a triangular solve, then the triangle that is
    left by a symmetric rank-k update of half the arithmetic of a product. Workspace is one panel, d times the width of
    a block, or two where it is copied, and two more in which the native kernel packs it and which that kernel keeps for
    its next call.

    Args:
        A: Float32 or float64, with any strides. Nothing above the diagonal is read or changed.

    Returns:
        Whether every pivot was above 0. If not, the lower triangle holds nothing of use.
    """
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
        corner.copy_(corner.triu(1).add_(L))
        if stop < d:
            below = A[stop:, start:stop]  # (m, width)
            panel = torch.linalg.solve_triangular(L, below.mT, upper=False)  # (width, m)
            below.copy_(panel.mT)
            rank_k_update(A[stop:, stop:], panel, alpha=-1.0, kernel=kernel)
    return True


def block_width(d: int, device: torch.device) -> int:
    """How many columns `cholesky_` takes at a time for a matrix of width d."""
    least, most, blocks = _WIDTHS.get(device.type, _WIDTHS_ELSEWHERE)
    return max(least, min(most, d // blocks // 32 * 32))


def mirror(A: Tensor) -> Tensor:
    """Write the lower triangle of A (d, d) over its upper one, in place, and return A.

    ``mirror(A.mT)`` writes the upper triangle of A over its lower one.
    """
    d = A.shape[0]
    for start in range(0, d, _MIRRORED):
        stop = min(start + _MIRRORED, d)
        corner = A[start:stop, start:stop]
        corner.copy_(corner.tril() + corner.tril(-1).mT)
        # Through a contiguous copy: reading columns a power of two apart misses the cache.
        A[start:stop, stop:] = A[stop:, start:stop].contiguous().mT
    return A


def moved(x: Tensor, like: CholeskyFactor | Tensor) -> Tensor:
    """A tensor in the dtype and on the device of another, or in which a factor answers."""
    if like.dtype == torch.float64:
        return x.to(like.device).to(like.dtype)  # one of the devices may not have float64
    return x.to(like.dtype).to(like.device)


@dataclass(frozen=True)
class CholeskyFactor:
    """The factor of a positive definite matrix, ``L L^T = A + jitter * mean(diag A) * I``.

    Right sides may be tensors of any real floating dtype, with any strides and on any device, or NumPy arrays; they are
    read in the dtype and on the device of the answer.

    Attributes:
        lower: Shape (d, d), with L in its lower triangle. What stands above the diagonal is no part of L and is never
            read as such: `fastcov.factorize` leaves A there.
        jitter: What was added to the diagonal, relative to the mean of the diagonal of A.
        rank: Where a jitter was needed, about how many directions of A stand out above it.
    """

    lower: Tensor
    jitter: float
    rank: int | None = None

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
        """``L^-1 B``: whitened columns, for B of shape (d, m) or (d,)."""
        return self._triangular(B, transposed=False)

    @isolated()
    def back_solve(self, B: Tensor) -> Tensor:
        """``L^-T B``, which makes a `half_solve` whole, for B of shape (d, m) or (d,)."""
        return self._triangular(B, transposed=True)

    @isolated()
    def solve(self, B: Tensor) -> Tensor:
        """``A^-1 B`` for B of shape (d, m) or (d,), in B's shape; A with its jitter.

        Raises:
            WrongWidth: B has not d rows.
            BadInput: B is no dense matrix of numbers.
        """
        return self.back_solve(self.half_solve(B))

    @isolated()
    def solve_and_gram(self, K: Tensor) -> tuple[Tensor, Tensor]:
        """``X = A^-1 K`` (d, B) and the symmetric ``K^T A^-1 K`` (B, B), for K of shape (d, B).

        Raises:
            WrongWidth: K has not d rows.
            BadInput: K is no dense matrix of numbers.
        """
        H = self.half_solve(K)  # (d, B)
        return self.back_solve(H), H.mT @ H

    @isolated()
    def logdet(self) -> Tensor:
        """The logarithm of the determinant of A with its jitter, a scalar tensor."""
        return 2 * self.lower.diagonal().log().sum()

    def _triangular(self, B: Tensor, *, transposed: bool) -> Tensor:
        B = moved(self._right_side(B), self.lower)
        columns = B if B.dim() == 2 else B.unsqueeze(1)  # (d, m)
        factor = self.lower.mT if transposed else self.lower
        # Reads no entry on the other side of the diagonal. Blocks with inverted diagonals, all of
        # matrix products, were measured on a CPU and are no faster than this.
        solved: Tensor = torch.linalg.solve_triangular(factor, columns, upper=transposed)
        return solved.reshape(B.shape)

    def _right_side(self, B: Tensor) -> Tensor:
        B = matrix(B, "A right side")
        if B.dim() not in (1, 2) or B.shape[0] != self.d:
            raise WrongWidth(
                f"A right side of shape {tuple(B.shape)} does not fit a factor of width {self.d}; "
                f"it must be ({self.d}, m) or ({self.d},)."
            )
        return B


@dataclass(frozen=True)
class RefinedFactor(CholeskyFactor):
    """A float32 factor whose `solve` is refined in float64 until its residual is small.

    The matrix itself is needed for that. It lies where `fastcov.factorize` left it, above the diagonal of `lower`, so
    that the whole takes one float32 matrix. `half_solve`, `back_solve` and `logdet` are those of the float32 factor,
    unrefined.

    Attributes:
        diagonal: Of A with its jitter, shape (d,), float64.
        tolerance: How large ``B - A X`` may be relative to B, in every column, where the rounding of ``A X`` in float64
            is not more than that.
    """

    diagonal: Tensor = field(kw_only=True)
    tolerance: float = field(default=TOLERANCE, kw_only=True)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which `solve` answers, float64."""
        return torch.float64

    @property
    def device(self) -> torch.device:
        """The device on which `solve` answers: the factor's, or the CPU if that has no float64."""
        return place_of_float64(self.lower.device)

    @isolated()
    def solve(self, B: Tensor) -> Tensor:
        """``A^-1 B`` in float64 for B of shape (d, m) or (d,), in B's shape; A with its jitter.

        Raises:
            WrongWidth: B has not d rows.
            BadInput: B is no dense matrix of numbers.
            ResidualTooLarge: The residual could not be brought below the tolerance.
        """
        B = moved(self._right_side(B), self)
        columns = B.reshape(self.d, -1)  # (d, m)
        solved = refined_solve(
            lambda X: upper_product(self.lower, self.diagonal, X),
            self._approximate,
            columns,
            self.diagonal,
            self.tolerance,
        )
        return solved.reshape(B.shape)

    @isolated()
    def solve_and_gram(self, K: Tensor) -> tuple[Tensor, Tensor]:
        """``X = A^-1 K`` (d, B) and the symmetric ``K^T A^-1 K`` (B, B), refined, in float64.

        Raises:
            WrongWidth: K has not d rows.
            BadInput: K is no dense matrix of numbers.
            ResidualTooLarge: The residual could not be brought below the tolerance.
        """
        X = self.solve(K)
        S = moved(self._right_side(K), self).mT @ X
        return X, (S + S.mT) / 2

    def _approximate(self, R: Tensor) -> Tensor:
        """``A^-1 R`` to a few digits, float64 in and out."""
        single = R.to(self.lower.dtype).to(self.lower.device)
        return super().solve(single).to(R.device).to(R.dtype)


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


@dataclass(frozen=True)
class UpdatedFactor(CholeskyFactor):
    """``M M^T = A + P P^T`` for a factor ``L L^T = A`` and columns P (d, m).

    With the whitened columns ``H = L^-1 P`` and the Cholesky factor C of ``I + H^T H`` (m, m),

        M = L (I + H (I + C)^-1 H^T),   M^-1 = (I - H (I + C^T)^-1 C^-1 H^T) L^-1,

    which multiplying out shows: ``M M^T = L (I + H H^T) L^T``. (The symmetric factorisation of a low-rank update as in
    Ambikasaran, O'Neil and Singh 2014, arXiv 1405.0223.) M is a square root and no triangle; whatever needs one half of
    a solve, as the gram ``K^T A^-1 K``, gets it without a difference of two large numbers, which Woodbury's formula
    would be.

    `lower`, `jitter` and `rank` are those of A's factor.

    Attributes:
        whitened: H, shape (d, m).
        small: C in its lower triangle, shape (m, m).
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
        """``M^-1 B``: whitened columns, for B of shape (d, m) or (d,)."""
        G = super().half_solve(B)
        H, C = self.whitened, self.small
        inner = torch.linalg.solve_triangular(C, H.mT @ _columns(G), upper=False)
        inner = torch.linalg.solve_triangular((C + _eye(C)).mT, inner, upper=True)
        half: Tensor = G - (H @ inner).reshape(G.shape)
        return half

    @isolated()
    def back_solve(self, B: Tensor) -> Tensor:
        """``M^-T B``, which makes a `half_solve` whole, for B of shape (d, m) or (d,)."""
        B = moved(self._right_side(B), self.lower)
        H, C = self.whitened, self.small
        inner = torch.linalg.solve_triangular(C + _eye(C), H.mT @ _columns(B), upper=False)
        inner = torch.linalg.solve_triangular(C.mT, inner, upper=True)
        return super().back_solve(B - (H @ inner).reshape(B.shape))

    @isolated()
    def logdet(self) -> Tensor:
        """The logarithm of the determinant of ``A + P P^T``, a scalar tensor."""
        return super().logdet() + 2 * self.small.diagonal().log().sum()


@isolated()
def updated(factor: CholeskyFactor, P: Tensor) -> UpdatedFactor:
    """The factor of ``A + P P^T``.

    Args:
        factor: Of A, width d; one that was updated before is updated again, which costs products with the new columns
            only.
        P: Columns (d, m), m at least 1, in any dtype and on any device.

    Raises:
        WrongWidth: P is not (d, m).
        BadInput: P is no dense matrix of numbers; or the factor is a refined one, whose halves of a solve are not
            exact.
        NonFiniteKeys: P holds NaN or infinity.
        NonFiniteMatrix: The squares of its whitened columns overflow.
    """
    if isinstance(factor, RefinedFactor):
        raise BadInput("A refined factor cannot be updated; factorise the matrix in float64.")
    P = matrix(P, "The columns of an update")
    if P.dim() != 2 or P.shape[0] != factor.d or P.shape[1] == 0:
        raise WrongWidth(
            f"Columns of shape {tuple(P.shape)} do not fit a factor of width {factor.d}; "
            f"they must be ({factor.d}, m) with m at least 1."
        )
    P = moved(P, factor)
    if not bool(P.isfinite().all()):
        raise NonFiniteKeys(
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


def _root_of_one_plus_gram(G: Tensor) -> Tensor:
    """The Cholesky factor of ``I + G^T G`` (m, m), which is positive definite for every G."""
    square = G.mT @ G
    square.diagonal().add_(1.0)
    if not bool(square.isfinite().all()):
        raise NonFiniteMatrix(
            f"The gram of {square.shape[0]} whitened columns overflows {square.dtype}; the columns "
            "are too large against the matrix: check the weight and the ridge."
        )
    root: Tensor = torch.linalg.cholesky(square)
    return root


def _eye(square: Tensor) -> Tensor:
    return torch.eye(square.shape[0], dtype=square.dtype, device=square.device)


def _columns(B: Tensor) -> Tensor:
    return B if B.dim() == 2 else B.unsqueeze(1)
