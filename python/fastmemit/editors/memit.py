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
    ``Delta = R K^T (A + K K^T)^-1`` with ``A = w C + ridge I``, equation (2) of arXiv 2506.04226,
    and the keys of earlier edits in A where they are preserved.
    """
    adapter, layers = work.adapter, work.config.layers
    goal = torch.stack([t.vector for t in work.targets(requests, True)]).double()  # (B, d)
    subjects = work.subjects(requests)
    for position, layer in enumerate(layers):
        read = work.read(subjects, layer)
        keys = averaged_keys(read.keys)  # (d_k, B)
        missing = (goal.to(read.block.device) - read.block) / (len(layers) - position)
        # The last edited block may be on another device than this layer, its norm and its factor.
        missing = missing.to(read.outputs.device)
        residual = adapter.projection_residual(layer, read.outputs, missing)
        work.write(layer, closed_form.memit(work.solver(layer), keys, residual.T), keys)
