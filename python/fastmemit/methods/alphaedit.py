"""AlphaEdit: MEMIT's way through the layers, in the null space of C (Fang et al. 2025)."""

from __future__ import annotations

import torch
from torch import Tensor

import fastcov
from fastmemit.errors import BadConfig, BadRequest
from fastmemit.methods.base import Draft, register, residuals
from fastmemit.methods.config import AlphaEditConfig
from fastmemit.request import EditRequest


@register(AlphaEditConfig)
def write(draft: Draft[AlphaEditConfig], requests: list[EditRequest], goal: Tensor) -> None:
    """Write a batch into ``config.layers`` (arXiv 2410.02355).

    ``Delta^T = (P (K K^T + K_p K_p^T) + l2 I)^-1 P K R^T``. P projects onto the directions in which C is below
    ``null_threshold`` (or ``null_relative``); the keys K_p of earlier edits are preserved without being asked for.
    There is no A.

    Raises:
        BadConfig: C of a layer has no null space, or l2 is 0 and the keys depend on one another.
        BadRequest: A key has no part in the null space.
    """
    config = draft.config
    for layer, K, R in residuals(draft, requests, goal):
        space = draft.work.statistics.null_space(config, layer)
        if space.rank == 0:
            raise BadConfig(
                f"C of layer {layer} has no eigenvalue below {space.threshold:g} (the smallest is "
                f"{float(space.eigenvalues[0]):g}), so there is no null space to edit in; raise "
                "null_threshold, or set null_relative, a multiple of the mean of C's diagonal."
            )
        earlier = draft.earlier_keys(layer)
        joined = torch.cat([k.to(K.device) for k in earlier], 1) if earlier else None
        try:
            change = fastcov.alphaedit(space, K, R, config.l2, joined)
        except fastcov.NoNullSpace as error:
            request = requests[error.columns[0]]
            raise BadRequest(
                f"The key of {request.text!r} in layer {layer} has no part in the null space of C "
                f"({space.rank} directions, eigenvalues below {space.threshold:g}); raise "
                "null_threshold or null_relative, or leave that request out."
            ) from error
        except fastcov.NotPositiveDefinite as error:
            raise BadConfig(
                f"In the null space of layer {layer} ({space.rank} directions) the keys depend on one "
                f"another, which l2={config.l2:g} does not allow for; set l2=10, or write fewer facts."
            ) from error
        draft.write(layer, change, K)
