"""The null space of a second moment: directions in which keys hardly point (AlphaEdit).

An edit that is confined to these directions changes the outputs of preserved keys next to nothing. C has no exact null
space once it has seen enough keys, so a threshold on its eigenvalues decides what counts as one: an absolute one, as
AlphaEdit was released with (0.02), which depends on the scale of a model's keys, or one relative to the mean of C's
diagonal, which does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcov.errors import NonFiniteMatrix
from fastcov.inputs import square
from fastcov.mode import isolated
from fastcov.moments import SecondMoment
from fastcov.refinement import place_of_float64

THRESHOLD = 0.02


@dataclass(frozen=True)
class NullSpace:
    """An orthonormal basis of the directions whose eigenvalue lies below a threshold.

    Attributes:
        basis: U, shape (d_k, r), float64; r may be 0.
        eigenvalues: All of C's, ascending, shape (d_k,), float64.
        threshold: In the units of C: eigenvalues below it count as zero.
    """

    basis: Tensor
    eigenvalues: Tensor
    threshold: float

    @property
    def rank(self) -> int:
        """r, the number of directions."""
        return self.basis.shape[1]

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

    Args:
        second_moment: C, shape (d_k, d_k), the mean of ``k k^T``; its lower triangle is read. Or the moment whose mean
            is taken.
        threshold: Eigenvalues below it count as zero.
        relative: Instead of `threshold`, a multiple of the mean of C's diagonal.

    Raises:
        WrongWidth: C is not square, or empty.
        BadInput: C is no dense matrix of numbers.
        EmptyCorpus: The moment has seen no key.
        NonFiniteMatrix: C holds NaN or infinity.
        ValueError: The threshold is not a finite number above 0.
    """
    if isinstance(second_moment, SecondMoment):
        second_moment = second_moment.second_moment
    second_moment = square(second_moment, "A second moment")
    name, value = ("threshold", threshold) if relative is None else ("relative", relative)
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} must be a finite number above 0 but is {value!r}; 0.02 is usual.")
    C = second_moment.to(place_of_float64(second_moment.device)).double()
    bad = ~C.isfinite()
    if bool(bad.any()):
        row, column = (int(i) for i in bad.nonzero()[0])
        raise NonFiniteMatrix(
            f"The second moment holds {int(bad.sum())} entries that are NaN or infinite, the first "
            f"in row {row}, column {column}; collect it again from a model in float32.",
            entries=int(bad.sum()),
            where=(row, column),
        )
    limit = threshold if relative is None else relative * float(C.diagonal().mean())
    eigenvalues, vectors = torch.linalg.eigh(C)
    kept = int((eigenvalues < limit).sum())  # ascending, so these are the first
    return NullSpace(vectors[:, :kept].contiguous(), eigenvalues, limit)
