"""What released codebases do, written anew from their description: the baselines of two suites.

Covariance (section 2 of the method): one pass a layer, one document at a time, the forward stopped at the hooked layer
once its projection has run; keys are gathered by the mask, converted to float32 and added as a full product. Solve: for
every batch the matrix is formed and solved by LU in float64. Their loading and tokenising, which they repeat for each
layer, are left out here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def covariances(model: nn.Module, modules: Sequence[str], documents: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """The sum of ``k k^T`` of each module, (d_k, d_k) float32, in a pass of its own.

    Args:
        model: Called with ``input_ids`` and ``attention_mask``.
        modules: Paths of the projections.
        documents: Token ids, all of which count.
    """
    return {path: _covariance(model, path, documents) for path in modules}


def _covariance(model: nn.Module, path: str, documents: Sequence[Sequence[int]]) -> Tensor:
    module: Any = model.get_submodule(path)
    device = module.weight.device
    width = getattr(module, "in_features", module.weight.shape[0])
    total = torch.zeros(width, width, device=device)
    inputs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        inputs.append(args[0])
        raise _Stop

    handle = module.register_forward_hook(keep)
    try:
        with torch.no_grad():
            for document in documents:
                ids = torch.tensor([list(document)], device=device)  # (1, L)
                mask = torch.ones_like(ids)
                with contextlib.suppress(_Stop):
                    model(input_ids=ids, attention_mask=mask)
                keys = inputs.pop()[mask.bool()].float()  # (L, d_k)
                total.addmm_(keys.mT, keys)
    finally:
        handle.remove()
    return total


def memit(A: Tensor, batches: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """``R K^T (A + K K^T)^-1`` for each batch, by a fresh LU in float64.

    Args:
        A: weight * C + ridge * I, shape (d_k, d_k), float64.
        batches: K (d_k, B) and R (d, B) of each.
    """
    return [R @ torch.linalg.solve(A + K @ K.mT, K).mT for K, R in batches]


class _Stop(Exception):
    """The hooked layer has run."""
