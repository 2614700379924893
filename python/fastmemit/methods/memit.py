"""MEMIT: spread the residual over several layers, from the lowest up (Meng et al. 2023); PMET's spread and ENCORE."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastcov import closed_form
from fastmemit.methods.base import Draft, register, residuals
from fastmemit.methods.config import EncoreConfig, MemitConfig, PmetConfig
from fastmemit.request import EditRequest


@register(MemitConfig, PmetConfig, EncoreConfig)
def write(draft: Draft[Any], requests: list[EditRequest], goal: Tensor) -> None:
    """Write a batch into ``config.layers`` (method of MEMIT, algorithm 1).

    For each layer the activations are read afresh, after the layers below it were written; it takes the share ``1 /
    (layers left)`` of what is still missing at the last edited block's output: ``Delta = R K^T (A + K K^T)^-1`` with
    ``A = w C + ridge I``, equation (2) of arXiv 2506.04226, and the keys of earlier edits in A where they are
    preserved.

    PMET's spread (arXiv 2308.08742, Li et al. 2023) gives the lower layers larger shares, what is missing over
    ``sqrt(layers left)``: the setting ``spread`` is ``"sqrt"``. The other half of PMET, target vectors optimised for
    attention and MLP side by side, is not here: the targets are those of MEMIT, and shared with it.

    ENCORE (arXiv 2502.01636, Gupta et al. 2025) is for many edits upon one another. Its ridge is the weight of the
    squared Frobenius norm of the change; the keys of earlier edits are preserved without being asked for; and target
    vectors are finished as soon as the target is what the model would say (the setting ``stop`` is
    ``"most-probable"``). With ``ridge=0, stop="loss"`` it is sequential MEMIT.
    """
    for layer, K, R in residuals(draft, requests, goal):
        A = draft.preserving(layer, draft.work.statistics.factor(draft.config, layer))
        draft.write(layer, closed_form.memit(A, K, R), K)
