"""How many keys a second moment needs, counted from the width of the keys."""

from __future__ import annotations

import math
from numbers import Integral, Real

from fastcov.errors import BadBudget


def budget(multiplier: float, d_k: int) -> int:
    """The number of keys to collect: ``round(multiplier * d_k)``.

    The multiplier is the paper's dynamic multiplier d_m (arXiv 2506.04226, section 4): 10 is recommended for every
    model, 2 is near parity for some, and 1 collapses everywhere, because the smallest eigenvalue of a second moment of
    ``d_m * d_k`` samples is biased low by about ``(1 - 1/sqrt(d_m))^2``.

    Args:
        multiplier: d_m, any finite number above 0, whole or not.
        d_k: The width of the keys (the input width of the edited projection).

    Returns:
        The number of keys, at least 1.

    Raises:
        BadBudget: The multiplier is NaN, infinite, not above 0 or so small that no key is left, or d_k is not a whole
            number above 0.
    """
    if not _is(d_k, Integral) or d_k <= 0:
        raise BadBudget(
            f"The width of the keys d_k must be a whole number above 0 but is {d_k!r}; "
            "pass the input width of the edited projection."
        )
    if not _is(multiplier, Real):
        raise BadBudget(f"The multiplier must be a number above 0 but is {multiplier!r}; 10 is recommended.")
    if not math.isfinite(multiplier) or multiplier <= 0:
        raise BadBudget(f"The multiplier must be finite and above 0 but is {multiplier!r}; 10 is recommended.")
    keys = float(multiplier) * int(d_k)
    if not math.isfinite(keys):
        raise BadBudget(f"The multiplier {multiplier!r} times the key width {d_k} overflows; 10 is recommended.")
    if round(keys) == 0:
        raise BadBudget(
            f"The multiplier {multiplier!r} times the key width {d_k} rounds to no key at all; "
            f"pass more than {0.5 / d_k:g} (10 is recommended)."
        )
    return round(keys)


def minimum_keys(d_k: int, batch_size: int = 1) -> int:
    """The paper's theoretical minimum of preserved keys, ``d_k - batch_size``.

    Equation (2) of arXiv 2506.04226 inverts ``C_eff = lambda * K_0 K_0^T + K_E K_E^T``, a matrix (d_k, d_k). Every
    independent key adds at most one to its rank, whether it is a preserved key (a column of K_0) or an edited one (a
    column of K_E). The batch brings ``batch_size`` keys of its own, so at least ``d_k - batch_size`` preserved keys are
    needed for full rank. It is a bound for invertibility alone: at this number the edits are useless, see `budget`.

    Args:
        d_k: The width of the keys.
        batch_size: The number of edits made at once.

    Returns:
        ``max(d_k - batch_size, 0)``.

    Raises:
        BadBudget: A width or a batch size below 1.
    """
    if d_k < 1 or batch_size < 1:
        raise BadBudget(
            f"The key width and the batch size must be at least 1 but are {d_k} and {batch_size}; "
            "pass the projection's input width and the number of edits made at once."
        )
    return max(d_k - batch_size, 0)


def _is(value: object, kind: type) -> bool:
    """Whether a value is a number of a kind, NumPy's included; True and False are no numbers."""
    return isinstance(value, kind) and not isinstance(value, bool)
