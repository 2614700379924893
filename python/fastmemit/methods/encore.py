"""ENCORE: MEMIT for many edits upon one another (Gupta et al. 2025)."""

from __future__ import annotations

from fastcov import closed_form
from fastmemit.methods.base import Workspace, write_layers
from fastmemit.request import EditRequest


def write(work: Workspace, requests: list[EditRequest]) -> None:
    """Write a batch into ``config.layers`` (arXiv 2502.01636).

    ``Delta = R K^T (A + K K^T)^-1`` with ``A = w C + sum K_p K_p^T + ridge I``. The ridge is the weight of the squared
    Frobenius norm of the change; the keys K_p of earlier edits are preserved without being asked for; and target
    vectors are finished as soon as the target is what the model would say (the setting ``stop`` is
    ``"most-probable"``). With ``ridge=0, stop="loss"`` it is sequential MEMIT.
    """
    write_layers(work, requests, lambda i, K, R: closed_form.memit(work.solver(i), K, R))
