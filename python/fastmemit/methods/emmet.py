"""EMMET: a batch in one layer, memorisation as an equality constraint (Gupta et al. 2024)."""

from __future__ import annotations

from torch import Tensor

from fastcov import closed_form
from fastmemit.methods.base import Draft, register
from fastmemit.methods.config import EmmetConfig
from fastmemit.request import EditRequest


@register(EmmetConfig)
def write(draft: Draft[EmmetConfig], requests: list[EditRequest], goal: Tensor) -> None:
    """Write a batch into one layer.

    ``Delta = R (K^T A^-1 K + lambda_e I)^-1 K^T A^-1`` with ``A = w C + ridge I``, and the keys of earlier edits in A
    where they are preserved; lambda_e relaxes the constraint for batches only, a single edit is always exact.
    """
    (layer,) = draft.config.layers
    subjects = draft.subjects(requests)
    read = draft.read(subjects, layer)
    keys = read.keys.T  # (d_k, B)
    if draft.config.site == "projection":
        residual = goal.to(read.outputs.device) - read.outputs
    else:
        missing = (goal.to(read.block.device) - read.block).to(read.outputs.device)
        residual = draft.adapter.projection_residual(layer, read.outputs, missing, subjects.bare_ids)
    relaxed = draft.config.lambda_e if len(requests) > 1 else 0.0
    A = draft.preserving(layer, draft.work.statistics.factor(draft.config, layer))
    draft.write(layer, closed_form.emmet(A, keys, residual.T, relaxed), keys)
