"""EMMET: a batch in one layer, memorisation as an equality constraint (Gupta et al. 2024)."""

from __future__ import annotations

import torch

from fastcov import closed_form
from fastmemit.methods.base import Workspace, averaged_keys
from fastmemit.request import EditRequest


def write(work: Workspace, requests: list[EditRequest]) -> None:
    """Write a batch into one layer.

    ``Delta = R (K^T A^-1 K + lambda_e I)^-1 K^T A^-1`` with ``A = w C + ridge I``, and the keys of earlier edits in A
    where they are preserved; lambda_e relaxes the constraint for batches only, a single edit is always exact.
    """
    adapter, layer = work.adapter, work.config.layers[0]
    goal = torch.stack([t.vector for t in work.targets(requests, True)]).double()  # (B, d)
    subjects = work.subjects(requests)
    read = work.read(subjects, layer)
    keys = averaged_keys(read.keys)  # (d_k, B)
    if work.config.site == "projection":
        residual = goal.to(read.outputs.device) - read.outputs
    else:
        missing = (goal.to(read.block.device) - read.block).to(read.outputs.device)
        residual = adapter.projection_residual(layer, read.outputs, missing, subjects.bare_ids)
    relaxed = work.config.lambda_e if len(requests) > 1 else 0.0
    work.write(layer, closed_form.emmet(work.solver(layer), keys, residual.T, relaxed), keys)
