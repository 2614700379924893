"""What each method writes: its closed form on the keys and residuals of a batch.

ROME writes one fact into one layer (Meng et al. 2022), EMMET a batch into one layer, memorised as an equality
constraint (Gupta et al. 2024); MEMIT spreads the residual over several layers, from the lowest up (Meng et al. 2023),
with PMET's spread and ENCORE; AlphaEdit goes MEMIT's way in the null space of C (Fang et al. 2025).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import fastcov
from fastcov import closed_form
from fastcov.hooks import evaluation_mode
from fastmemit.errors import BadConfig, BadRequest
from fastmemit.methods.base import Draft, Reading, averaged_keys, register
from fastmemit.methods.config import (
    AlphaEditConfig,
    EmmetConfig,
    EncoreConfig,
    MemitConfig,
    PmetConfig,
    RlsEditConfig,
    RomeConfig,
)
from fastmemit.models.running import BlockMap
from fastmemit.request import EditRequest

log = logging.getLogger(__name__)


@register(RomeConfig, one_by_one=True)
def write_rome(draft: Draft[RomeConfig], requests: list[EditRequest], goal: Tensor) -> None:
    """Write one fact, on the model with the earlier ones of its batch written.

    ``Delta = (v* - W k)(C^-1 k)^T / (k^T C^-1 k)`` with one key k everywhere, which is what r-ROME (arXiv 2403.07175)
    repairs in ROME; `RomeConfig.keys` chooses it. The default, the key of MEMIT and EMMET, makes ROME EMMET with one
    fact; ``"original"`` has the bare prompt's key in the denominator and in ``W k``.

    In a model without a BOS token a subject that begins its prompt has nothing before it, and is often cut into other
    tokens than inside a text: its key there can be far from the mean over 21 contexts, in which it all but vanishes.

    Where the keys of earlier edits are preserved, C is joined by theirs, and by those of the facts that were written
    before in the same batch.
    """
    (layer,) = draft.config.layers
    read = draft.context_outputs(layer, requests)
    keys, outputs = read.keys, read.outputs  # (1, contexts, d_k), (1, contexts, d)
    original = draft.config.keys == "original"
    average = averaged_keys if draft.config.keys == "consistent" else _mean
    key, bare = average(keys)[:, 0], keys[0, 0]
    # The projection is affine, so an average of its outputs is its output at the average key.
    now = outputs[0, 0] if original else average(outputs)[:, 0]
    residual = goal[0].to(now) - now  # (d,)
    C = draft.preserving(layer, draft.work.statistics.factor(draft.config, layer))
    change = closed_form.rome(C, key, residual, denominator_key=bare if original else None)
    draft.write(layer, change, key[:, None])


def _mean(values: Tensor) -> Tensor:
    """Over contexts: (1, contexts, width) to (width, 1)."""
    return values.mean(1).T


def share(spread: str, left: int) -> float:
    """By what a layer divides the residual with so many layers left, itself one: L - i (MEMIT) or its root (PMET)."""
    return math.sqrt(left) if spread == "sqrt" else left


def residuals(
    draft: Draft[Any],
    requests: list[EditRequest],
    goal: Tensor,  # (B, d)
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The edited layers from the lowest up, each with its keys K (d_k, B) and its share R (d, B) of what is missing.

    The activations of a layer are read after the layers below it were written. With ``iterations`` above 1 the layers
    come again, each time for what the model as it is then still lacks: the keys of the lowest one are the same ones,
    those of the others have moved with what was written below them.
    """
    adapter, config = draft.adapter, draft.config
    layers, spread = config.layers, getattr(config, "spread", "linear")  # one layer takes all
    subjects, asked = draft.subjects(requests), torch.empty(0)
    at_projection = config.targets().site == "projection"
    if at_projection and len(layers) > 1:
        # Layers below move the stream and not the last projection's output: what they lead to is what the block makes
        # of that.
        with evaluation_mode(adapter.model):
            goal, at_projection = BlockMap(adapter, layers[-1], subjects.bare_ids)(goal), False
    lowest: Reading | None = None
    for iteration in range(config.iterations):
        draft.keys.clear()  # nobody preserves a batch against itself; on record are the keys of the last iteration
        for position, layer in enumerate(layers):
            read = draft.read(subjects, layer, None if position else lowest)
            lowest = lowest or read
            now = read.outputs if at_projection else read.block
            missing = goal.to(now.device) - now
            if iteration == position == 0:
                asked = torch.linalg.vector_norm(missing)
            elif position == 0:
                left = float(torch.linalg.vector_norm(missing) / asked)
                done, of = iteration + 1, config.iterations
                log.info("iteration %d of %d begins with %.1f %% of the residual", done, of, 100 * left)
            # The last edited block may be on another device than this layer, its norm and its factor.
            residual = (missing / share(spread, len(layers) - position)).to(read.outputs.device)
            if now is read.block:
                residual = adapter.projection_residual(layer, read.outputs, residual, subjects.bare_ids)
            yield layer, read.keys.T, residual.T


@register(EmmetConfig)
def write_emmet(draft: Draft[EmmetConfig], requests: list[EditRequest], goal: Tensor) -> None:
    """Write a batch into one layer.

    ``Delta = R (K^T A^-1 K + lambda_e I)^-1 K^T A^-1`` with ``A = w C + ridge I``, and the keys of earlier edits in A
    where they are preserved; lambda_e relaxes the constraint for batches only, a single edit is always exact.
    """
    relaxed = draft.config.lambda_e if len(requests) > 1 else 0.0
    for layer, K, R in residuals(draft, requests, goal):
        A = draft.preserving(layer, draft.work.statistics.factor(draft.config, layer))
        draft.write(layer, closed_form.emmet(A, K, R, relaxed), K)


@register(MemitConfig, PmetConfig, EncoreConfig, RlsEditConfig)
def write_memit(draft: Draft[Any], requests: list[EditRequest], goal: Tensor) -> None:
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

    RLSEdit (arXiv 2601.15686, Wang et al. 2026) is recursive least squares: each batch solves for all keys so far, the
    preserved ones and a penalty on the distance from the unedited weight. That is sequential MEMIT with a ridge, the
    earlier batches' keys joining the factor of A as they come.
    """
    for layer, K, R in residuals(draft, requests, goal):
        A = draft.preserving(layer, draft.work.statistics.factor(draft.config, layer))
        draft.write(layer, closed_form.memit(A, K, R), K)


@register(AlphaEditConfig)
def write_alphaedit(draft: Draft[AlphaEditConfig], requests: list[EditRequest], goal: Tensor) -> None:
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
