"""A factor of ``A + P P^T`` made from a factor of A, for columns P that come a few at a time.

Sequential editing preserves the keys of earlier edits beside those of the corpus (method of MEMIT after many batches):
P grows with each batch and A stays. Factorising anew costs d^3 / 3 a batch; this costs products of d with the few
columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastcov.errors import BadInput, NonFiniteKeys, NonFiniteMatrix, WrongWidth
from fastcov.factor import CholeskyFactor, RefinedFactor, moved
from fastcov.inputs import matrix
from fastcov.mode import isolated


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
