"""Shrinkage: how far to move a second moment of few keys towards a multiple of the identity.

The mean over n keys, S, spreads the eigenvalues of what it tends to: the large ones come out too large and the small
ones too small, the more so the nearer n is to the width d. The matrix

    (1 - a) S + a m I,    m = trace(S) / d

has the same mean eigenvalue and less spread. Both estimates of the best intensity a minimise the expected squared
Frobenius distance from the truth. `ledoit_wolf` assumes nothing of the keys but that they are independent, and needs
the sum of ``||k||^4``; `oas` assumes that they are Gaussian, and needs S and n alone. As everywhere here S is not
centred, and no mean is subtracted: what scikit-learn calls ``assume_centered=True``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fastcov.errors import BadInput, EmptyCorpus, NonFiniteMatrix, QuarticUnknown
from fastcov.inputs import shares_entries, square
from fastcov.mode import isolated
from fastcov.moments import SecondMoment, check_moment

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
