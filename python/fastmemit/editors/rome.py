"""ROME: one fact, one rank, one layer (Meng et al. 2022), with r-ROME's consistent keys."""

from __future__ import annotations

from fastcov import closed_form
from fastmemit.editors.base import Workspace
from fastmemit.request import EditRequest


def write(work: Workspace, requests: list[EditRequest]) -> None:
    """Write facts one after the other, each on the model with the earlier ones written.

    ``Delta = (v* - W k)(C^-1 k)^T / (k^T C^-1 k)``.  The key k is the mean over contexts,
    everywhere; with ``keys="original"`` the denominator and ``W k`` take the bare prompt's key
    instead, which is how ROME was first released and what r-ROME (arXiv 2403.07175) repairs.
    """
    layer = work.config.layers[0]
    for number, request in enumerate(requests):
        (target,) = work.targets([request], number == 0)
        keys, outputs = work.context_outputs(layer, [request])  # (1, contexts, d_k), (1, …, d)
        key, bare = keys[0].mean(0), keys[0, 0]
        consistent = work.config.keys == "consistent"
        # The projection is affine, so the mean of its outputs is its output at the mean key.
        now = outputs[0].mean(0) if consistent else outputs[0, 0]
        residual = target.vector.to(now) - now  # (d,)
        change = closed_form.rome(
            work.factor(layer), key, residual, denominator_key=None if consistent else bare
        )
        work.write(layer, change)
