"""The formulas of the paper, literally, in float64 NumPy: what fastcov is tested against.

Keys are rows (n, d_k) in `second_moment`; K is (d_k, B) and R is (d, B) in the updates.
"""

from __future__ import annotations

import numpy as np


def second_moment(keys, mask=None):
    """The mean of k k^T, one key at a time."""
    keys = np.asarray(keys, dtype=np.float64).reshape(-1, np.shape(keys)[-1])
    kept = np.ones(len(keys), bool) if mask is None else np.asarray(mask, bool).reshape(-1)
    total = np.zeros((keys.shape[1], keys.shape[1]))
    for key, keep in zip(keys, kept, strict=True):
        if keep:
            total += np.outer(key, key)
    return total / kept.sum()


def regularised(C, weight, ridge):
    """A = w C + ridge I."""
    return weight * C + ridge * np.eye(len(C))


def memit(A, K, R):
    """Delta = R K^T (A + K K^T)^-1, equation (2)."""
    return R @ K.T @ np.linalg.inv(A + K @ K.T)


def emmet(A, K, R, lambda_e=0.0):
    """Delta = R (K^T A^-1 K + lambda_e I)^-1 K^T A^-1."""
    inverse = np.linalg.inv(A)
    return R @ np.linalg.inv(K.T @ inverse @ K + lambda_e * np.eye(K.shape[1])) @ K.T @ inverse


def rome(A, k, r, denominator_key=None):
    """Delta = r (A^-1 k)^T / (q^T A^-1 k), with q = k unless another key is given."""
    inverse = np.linalg.inv(A)
    q = k if denominator_key is None else denominator_key
    return np.outer(r, inverse @ k) / (q @ inverse @ k)


def preserving(A, blocks):
    """A + sum K_p K_p^T over the keys of earlier edits, one key at a time (sequential MEMIT)."""
    total = np.array(A, dtype=np.float64)
    for K in blocks:
        for key in np.asarray(K).T:
            total += np.outer(key, key)
    return total


def null_projector(C, threshold):
    """P = U U^T over the eigenvectors of C whose eigenvalue is below the threshold (AlphaEdit)."""
    eigenvalues, vectors = np.linalg.eigh(C)
    U = vectors[:, eigenvalues < threshold]
    return U @ U.T


def alphaedit(P, K, R, l2, preserved=None):
    """Delta^T = (P (K K^T + K_p K_p^T) + l2 I)^-1 P K R^T."""
    M = K @ K.T
    if preserved is not None:
        M = preserving(M, [preserved])
    return (np.linalg.inv(P @ M + l2 * np.eye(len(P))) @ P @ K @ R.T).T


def spread_share(kind, layers_left):
    """What of the missing residual one layer takes: MEMIT's 1/(L - i), PMET's 1/sqrt(L - i)."""
    return {"linear": 1 / layers_left, "sqrt": 1 / np.sqrt(layers_left)}[kind]
