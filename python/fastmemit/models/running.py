"""Run a model, and measure on it what a batched or a shortened run of it may rely on.

What a config says of a model (that it is causal, which kinds of state its layers keep) is not what
decides: a few tiny forwards do.  Part of a model, or a batch of padded rows, stands for the whole
model on one row only where both give the same to rounding.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fastcov.hooks import evaluation_mode, isolated
from fastmemit.models.context import context_limit
from fastmemit.models.outputs import hidden_of
from fastmemit.tokens import pad_batch

Padding = Literal["unmasked", "masked", "none"]

_LONG, _SHORT, _CHANGED = 12, 7, 4  # tokens of the rows that are tried, and of a changed ending


def input_device(model: Any) -> torch.device:
    """Where a model's token ids go: the device of its input embeddings."""
    embeddings = model.get_input_embeddings()
    device: torch.device = embeddings.weight.device
    # Weights offloaded by accelerate are on "meta" until their module runs.
    hook: Any = getattr(embeddings, "_hf_hook", None)
    if device.type == "meta" and getattr(hook, "execution_device", None) is not None:
        return torch.device(hook.execution_device)
    return device


def run_model(model: Any, **inputs: Any) -> Any:
    """What a model gives for some inputs, without the names that its forward does not know.

    BLOOM, MPT and Mamba count positions themselves; where padding stands they read from the mask.
    """
    known = inspect.signature(model.forward).parameters
    optional = {"position_ids", "use_cache"} - known.keys()
    return model(**{name: value for name, value in inputs.items() if name not in optional})


def tolerance(model: Any) -> float:
    """The largest `difference` between two runs of a model that rounding alone can explain.

    In float32 it is a thousandth, hundreds of times what is seen.  Half precision rounds every
    activation, and what reaches the logits of a deep model is several of its epsilons.
    """
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point() and p.itemsize > 1}
    epsilons = [torch.finfo(dtype).eps for dtype in dtypes]
    if torch.backends.cuda.matmul.allow_tf32 and input_device(model).type == "cuda":
        epsilons.append(2.0**-10)
    return max(1e-3, 12 * max(epsilons, default=0.0))


def difference(got: Tensor, want: Tensor) -> float:
    """How far two results (rows, width) of a model are apart: the largest share of a row's length.

    A row's length is counted from its mean, because logits may share a large offset.  What is not
    finite in `want` is left out: forbidden words, or a broken model, which is not judged here.
    """
    got, want = got.detach().to(want.device).double(), want.detach().double()
    finite = want.isfinite()
    if not bool(got[finite].isfinite().all()):
        return float("inf")
    count = finite.sum(-1, keepdim=True).clamp(min=1)
    known = torch.where(finite, want, 0.0)
    centred = torch.where(finite, want - known.sum(-1, keepdim=True) / count, 0.0)
    off = torch.where(finite, got - want, 0.0).norm(dim=-1)
    share = torch.where(off > 0, off / centred.norm(dim=-1), 0.0)
    return float(share.max()) if share.numel() else 0.0


def agrees(model: Any, got: Tensor, want: Tensor) -> bool:
    """Whether two results (rows, width) of a model are the same to rounding."""
    return got.shape == want.shape and difference(got, want) <= tolerance(model)


def probe_ids(model: Any, length: int = _LONG) -> tuple[int, ...]:
    """Some token ids to try a model on, fewer where it takes fewer."""
    words = model.get_input_embeddings().weight.shape[0]
    length = min(length, context_limit(model) or length)
    return tuple((20 + 3 * place) % words for place in range(length))


@isolated()
def is_causal(model: Any) -> bool:
    """Whether no token's output depends on later tokens: other ones behind it are tried."""
    ids = probe_ids(model)
    kept = len(ids) - _CHANGED
    if kept < 1:
        return True
    words = model.get_input_embeddings().weight.shape[0]
    other = (*ids[:kept], *((token + words // 2) % words for token in ids[kept:]))
    with evaluation_mode(model):
        first, second = (_output(model, [row])[0, :kept] for row in (ids, other))
    return agrees(model, second, first)


@isolated()
def padding(model: Any, side: Literal["left", "right"]) -> Padding:
    """What rows of different lengths in one batch need so that each is run as if alone.

    Returns:
        ``"unmasked"``: nothing, what pads a row is seen by none of its tokens; ``"masked"``: an attention mask;
        ``"none"``: nothing helps, rows of different lengths do not go together.
    """
    long, short = probe_ids(model), probe_ids(model, _SHORT)
    batch = pad_batch([long, short], side=side, device=input_device(model))
    own = slice(len(short)) if side == "right" else slice(len(long) - len(short), None)
    with evaluation_mode(model):
        alone = _output(model, [short])[0]
        free = {name: value for name, value in batch.items() if name != "attention_mask"}
        forms: list[tuple[Padding, dict[str, Tensor]]] = [("unmasked", free), ("masked", batch)]
        for name, inputs in forms:
            together = hidden_of(run_model(model, **inputs, use_cache=False))[1, own]
            if agrees(model, together, alone):
                return name
    return "none"


def _output(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:  # (rows, L, vocabulary)
    """Logits of rows of one length; the hidden states of a model without a head."""
    batch = pad_batch(rows, device=input_device(model))
    return hidden_of(run_model(model, **batch, use_cache=False))
