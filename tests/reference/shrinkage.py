"""Shrinkage, literally as in the papers, in float64 NumPy and one key at a time."""

from __future__ import annotations

import numpy as np


def ledoit_wolf(keys):
    """Ledoit and Wolf (2004), section 3.2: b^2 over d^2, with the norm ``tr(A A^T) / d``."""
    keys = np.asarray(keys, dtype=np.float64)
    n, d = keys.shape
    S = keys.T @ keys / n
    target = np.trace(S) / d * np.eye(d)
    distance = np.sum((S - target) ** 2) / d
    error = sum(np.sum((np.outer(k, k) - S) ** 2) / d for k in keys) / n**2
    return min(error, distance) / distance


def oas(keys):
    """Chen et al. (2010), equation (23), without the terms in 2 / d."""
    keys = np.asarray(keys, dtype=np.float64)
    n, d = keys.shape
    S = keys.T @ keys / n
    above = np.trace(S @ S) + np.trace(S) ** 2
    below = (n + 1) * (np.trace(S @ S) - np.trace(S) ** 2 / d)
    return min(1.0, above / below)


def shrunk(C, intensity):
    """(1 - a) C + a mean(diag C) I."""
    return (1 - intensity) * C + intensity * np.mean(np.diag(C)) * np.eye(len(C))
