"""The float64 result that every row of the rank-k suite is checked against.

It is computed with plain float64 products of torch, never with a kernel of this package.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 1024  # rows of C at a time
_CHUNK_BYTES = 256 << 20  # of keys converted to float64 at a time


@dataclass(frozen=True)
class Gate:
    """What a result may be wrong by.

    Attributes:
        error: Relative Frobenius error of the lower triangle.
        bias: Mean relative error of the diagonal, whichever its sign; None where only the error counts. Accumulation
            that truncates shows here first: all terms of a diagonal are positive, so nothing cancels.
    """

    error: float
    bias: float | None = None


def gate(device: torch.device, sums: torch.dtype) -> Gate:
    """The gate of docs/results/performance.md for sums of a dtype on a device."""
    if sums == torch.float64:
        return Gate(error=1e-13)
    return Gate(error=1e-5, bias=3e-6) if device.type == "cuda" else Gate(error=1e-6)


def expected_lower(C: Tensor, X: Tensor) -> Tensor:
    """``C + X^T X`` in float64; what is above the block diagonal means nothing.

    Args:
        C: What is there already, shape (d, d).
        X: Keys, shape (n, d).

    Returns:
        A new matrix (d, d).
    """
    n, d = X.shape
    total = C.double()
    total = total.clone() if total is C else total
    step = max(1, _CHUNK_BYTES // (8 * d))
    for begin in range(0, n, step):
        rows = X[begin : begin + step].double()  # (step, d)
        for low in range(0, d, _BLOCK):
            high = min(low + _BLOCK, d)
            total[low:high, :high].addmm_(rows[:, low:high].mT, rows[:, :high])
    return total


def lower_error(C: Tensor, expected: Tensor) -> tuple[float, float]:
    """How far the lower triangle of C is from what was expected, both of shape (d, d).

    Returns:
        The relative Frobenius error, and the mean relative error of the diagonal with its sign. Both are NaN where C
        holds NaN.
    """
    d = C.shape[0]
    wrong = torch.zeros((), dtype=torch.float64, device=C.device)
    size = torch.zeros((), dtype=torch.float64, device=C.device)
    for low in range(0, d, _BLOCK):
        high = min(low + _BLOCK, d)
        want = expected[low:high, :high].tril(low)
        got = C[low:high, :high].double().tril(low)
        wrong += (got - want).square().sum()
        size += want.square().sum()
    want, got = expected.diagonal(), C.diagonal().double()
    return float((wrong / size).sqrt()), float(((got - want) / want).mean())


def upper_is_untouched(C: Tensor, before: Tensor) -> bool:
    """Whether nothing above the diagonal of C (d, d) differs from what was there before."""
    d = C.shape[0]
    for low in range(0, d, _BLOCK):
        high = min(low + _BLOCK, d)
        if not torch.equal(C[low:high].triu(low + 1), before[low:high].triu(low + 1)):
            return False
    return True


def failure(allowed: Gate, error: float, bias: float) -> str | None:
    """Why a result does not pass a gate, or None. NaN passes none."""
    if not error <= allowed.error:
        return f"relative error {error:.2g} is above {allowed.error:.0e}"
    if allowed.bias is not None and not abs(bias) <= allowed.bias:
        return f"diagonal bias {bias:+.2g} is beyond {allowed.bias:.0e}"
    return None
