"""What every sum of ``k k^T`` is, whoever made it: finite, symmetric, and within its diagonal."""

from __future__ import annotations

from torch import Tensor

from fastcov.errors import NonFiniteMatrix

_BLOCK = 512  # rows looked at a time
_ROUNDING = 1e-3  # more than a float32 sum of 44 million keys has


def check_finite(total: Tensor, name: str) -> None:
    """Refuse a matrix (d, d) with entries that are no finite numbers.

    Args:
        total: The matrix.
        name: What to call it in the message.

    Raises:
        NonFiniteMatrix: It holds NaN or infinity.
    """
    for start in range(0, total.shape[0], _BLOCK):
        bad = ~total[start : start + _BLOCK].isfinite()
        if bool(bad.any()):
            row, column = (int(i) for i in bad.nonzero()[0])
            raise NonFiniteMatrix(
                f"{name} holds NaN or infinity, first in row {start + row}, column {column}; "
                "collect it again, from a model in float32 or bfloat16.",
                entries=int((~total.isfinite()).sum()),
                where=(start + row, column),
            )


def not_a_sum(total: Tensor) -> str | None:
    """Why a finite matrix (d, d) cannot be a sum of ``k k^T``, or None.

    Such a sum is symmetric, its diagonal is not negative, and no entry is larger than the geometric mean of the two
    entries of the diagonal that it belongs to (Cauchy and Schwarz), up to rounding. Whether its eigenvalues are what
    they must be is not looked at: that takes a factorisation.
    """
    diagonal = total.diagonal().double()  # (d,)
    if bool((diagonal < 0).any()):
        place = int((diagonal < 0).nonzero()[0])
        return f"place {place} of its diagonal is {float(diagonal[place]):g}"
    if not bool(diagonal.any()):
        return "its diagonal is zero"
    scale = diagonal.sqrt()
    slack = 1e-7 * float(diagonal.mean())  # squares of tiny keys underflow before products do
    for start in range(0, total.shape[0], _BLOCK):
        stop = start + _BLOCK
        rows = total[start:stop].double()
        allowed = scale[start:stop, None] * scale
        apart = (rows - total[:, start:stop].mT).abs_() > _ROUNDING * allowed + slack
        if bool(apart.any()):
            i, j = (int(k) for k in apart.nonzero()[0])
            return f"it is not symmetric in row {start + i}, column {j}"
        beyond = rows.abs() > (1 + _ROUNDING) * allowed + slack
        if bool(beyond.any()):
            i, j = (int(k) for k in beyond.nonzero()[0])
            return f"row {start + i}, column {j} is larger than its diagonal allows"
    return None
