"""What MEMIT and its relatives share: the way through the layers, from the lowest up."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastcov import LowRank
from fastmemit.editors.base import Workspace, averaged_keys
from fastmemit.request import EditRequest

Solve = Callable[[int, Tensor, Tensor], LowRank]  # layer, K (d_k, B), R (d, B)


def write_layers(work: Workspace, requests: list[EditRequest], solve: Solve) -> None:
    """Write a batch into ``config.layers``, each layer a share of what is still missing.

    For each layer the activations are read afresh, after the layers below it were written.

    Args:
        work: The workspace.
        requests: The facts.
        solve: Makes the change of a layer from the keys and the residuals there.
    """
    adapter, layers = work.adapter, work.config.layers
    goal = torch.stack([t.vector for t in work.targets(requests, True)]).double()  # (B, d)
    subjects = work.subjects(requests)
    for position, layer in enumerate(layers):
        read = work.read(subjects, layer)
        keys = averaged_keys(read.keys)  # (d_k, B)
        missing = goal.to(read.block.device) - read.block
        missing = missing / share(work.config.spread, len(layers) - position)
        # The last edited block may be on another device than this layer, its norm and its factor.
        missing = missing.to(read.outputs.device)
        residual = adapter.projection_residual(layer, read.outputs, missing, subjects.bare_ids)
        work.write(layer, solve(layer, keys, residual.T), keys)


def share(spread: str, left: int) -> float:
    """By what a layer divides the residual while so many layers are left, itself among them.

    ``"linear"``: by their number, L - i (MEMIT); ``"sqrt"``: by its square root (PMET).
    """
    return math.sqrt(left) if spread == "sqrt" else left
