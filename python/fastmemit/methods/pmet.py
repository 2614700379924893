"""PMET's spread: MEMIT with larger shares for the lower layers (Li et al. 2023)."""

from __future__ import annotations

from fastcov import closed_form
from fastmemit.methods.base import Workspace, write_layers
from fastmemit.request import EditRequest


def write(work: Workspace, requests: list[EditRequest]) -> None:
    """Write a batch into ``config.layers`` (arXiv 2308.08742).

    ``Delta = R K^T (A + K K^T)^-1`` with ``A = w C + ridge I`` as in MEMIT, where R is what is still missing over
    ``sqrt(layers left)``: the setting ``spread`` is ``"sqrt"``. The other half of PMET, target vectors optimised for
    attention and MLP side by side, is not here: the targets are those of MEMIT, and shared with it.
    """
    write_layers(work, requests, lambda i, K, R: closed_form.memit(work.solver(i), K, R))
