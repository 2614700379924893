"""What the stopping rule estimates, literally, in float64 NumPy."""

from __future__ import annotations

import numpy as np


def leverage(before, after, ridge=0.0):
    """Mean ``k^T A^-1 k`` of fresh keys (m, d) over that of the keys (n, d) that A is made of."""
    S = before.T @ before / len(before)
    A = S + ridge * np.mean(np.diag(S)) * np.eye(len(S))

    def mean(keys):
        return np.mean([k @ np.linalg.solve(A, k) for k in keys])

    return mean(after) / mean(before)


def direction(A, k):
    """``u = A^-1 k / (k^T A^-1 k)``, along which ROME's update for a key k runs."""
    solved = np.linalg.solve(A, k)
    return solved / (k @ solved)


def excess(S, C, keys):
    """Mean of ``||u - best||^2 / ||best||^2`` in the norm of C, over edit keys (m, d)."""
    shares = []
    for k in keys:
        u, best = direction(S, k), direction(C, k)
        shares.append((u - best) @ C @ (u - best) / (best @ C @ best))
    return np.mean(shares)
