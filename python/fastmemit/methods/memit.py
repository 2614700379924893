"""MEMIT: spread the residual over several layers, from the lowest up (Meng et al. 2023)."""

from __future__ import annotations

from fastcov import closed_form
from fastmemit.methods.base import Workspace, write_layers
from fastmemit.request import EditRequest


def write(work: Workspace, requests: list[EditRequest]) -> None:
    """Write a batch into ``config.layers`` (method of MEMIT, algorithm 1).

    For each layer the activations are read afresh, after the layers below it were written; it takes the share ``1 /
    (layers left)`` of what is still missing at the last edited block's output: ``Delta = R K^T (A + K K^T)^-1`` with
    ``A = w C + ridge I``, equation (2) of arXiv 2506.04226, and the keys of earlier edits in A where they are
    preserved.
    """
    write_layers(work, requests, lambda i, K, R: closed_form.memit(work.solver(i), K, R))
