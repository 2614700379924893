"""ROME: one fact, one rank, one layer (Meng et al. 2022), with r-ROME's consistent keys."""

from __future__ import annotations

from torch import Tensor

from fastcov import closed_form
from fastmemit.methods.base import Draft, averaged_keys, register
from fastmemit.methods.config import RomeConfig
from fastmemit.request import EditRequest


@register(RomeConfig, one_by_one=True)
def write(draft: Draft[RomeConfig], requests: list[EditRequest], goal: Tensor) -> None:
    """Write one fact, on the model with the earlier ones of its batch written.

    ``Delta = (v* - W k)(C^-1 k)^T / (k^T C^-1 k)`` with one key k everywhere, which is what r-ROME (arXiv 2403.07175)
    repairs in ROME. ``keys`` chooses it: ``"consistent"`` is the key of MEMIT and EMMET, half the bare prompt's, so
    that ROME is EMMET with one fact; ``"mean"`` is r-ROME's own, the mean over contexts; ``"original"`` is ROME as
    first released: the mean, but the bare prompt's key in the denominator and in ``W k``.

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
