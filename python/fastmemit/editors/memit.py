"""MEMIT: spread the residual over several layers, from the lowest up (Meng et al. 2023)."""

from __future__ import annotations

import torch

from fastcov import closed_form
from fastmemit.editors.base import Workspace, averaged_keys
from fastmemit.request import EditRequest


def write(work: Workspace, requests: list[EditRequest]) -> None:
    """Write a batch into ``config.layers`` (method of MEMIT, algorithm 1).

    For each layer the activations are read afresh, after the layers below it were written; it takes
    the share ``1 / (layers left)`` of what is still missing at the last edited block's output:
    ``Delta = R K^T (w C + ridge I + K K^T)^-1``, equation (2) of arXiv 2506.04226.
    """
    adapter, layers = work.adapter, work.config.layers
    goal = torch.stack([t.vector for t in work.targets(requests, True)]).double()  # (B, d)
    for position, layer in enumerate(layers):
        keys = averaged_keys(work.context_keys(layer, requests))  # (d_k, B)
        out, now = work.bare_outputs(requests, adapter.projection(layer), adapter.block(layers[-1]))
        missing = (goal.to(now.device) - now) / (len(layers) - position)
        residual = adapter.projection_residual(layer, out.to(missing.device), missing)
        work.write(layer, closed_form.memit(work.factor(layer), keys, residual.T))
