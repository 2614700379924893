"""The factor of a positive definite matrix: made once by `fastcov.factorize`, solved with often."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastcov.errors import WrongWidth
from fastcov.inputs import matrix
from fastcov.mode import isolated
from fastcov.refinement import TOLERANCE, place_of_float64, refined_solve, upper_product


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
