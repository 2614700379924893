"""Perplexity on running text: how well a model still speaks, whatever was edited.

The text is tokenised once and cut into windows that are run as they are, without padding and so without a mask, which
leaves a model its fastest attention.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from fastcov.mode import evaluation_mode, isolated
from fastmemit.errors import FastmemitError, UnknownArchitecture
from fastmemit.evaluation.schema import Perplexity
from fastmemit.evaluation.windows import PerplexityText, Window, read_text
from fastmemit.logits import head_reads
from fastmemit.models import ModelAdapter, agrees, hidden_of, with_hidden
from fastmemit.models.context import context_limit
from fastmemit.targets.suffix import forward_as

__all__ = [
    "PerplexityResult",
    "PerplexityText",
    "before_and_after",
    "count_tokens",
    "edited_nll",
    "perplexity",
    "read_text",
]

log = logging.getLogger(__name__)

# Of one block of logits in float32; their log-sum-exp needs as much again. Larger is not faster.
_LOGIT_BYTES = 1 << 26


@dataclass(frozen=True)
class PerplexityResult:
    """What a text costs a model.

    Attributes:
        nll: Mean negative log-likelihood, in nats per predicted token.
        tokens: How many tokens were predicted.
        windows: How many windows were run.
        context: Tokens in the longest of them.
    """

    nll: float
    tokens: int
    windows: int
    context: int

    @property
    @isolated()
    def perplexity(self) -> float:
        """``exp(nll)``; infinite where that is too large for a float."""
        return _exp(self.nll)


def perplexity(
    adapter: ModelAdapter,
    text: PerplexityText,
    *,
    batch_tokens: int = 4096,
    progress: Callable[[int], None] | None = None,
) -> PerplexityResult:
    """Perplexity of a text on the model as it is now: ``exp`` of the mean cost of its tokens.

    Args:
        adapter: The model.
        text: See `read_text`.
        batch_tokens: Tokens a forward takes at most (one window always runs).
        progress: Called with the number of tokens predicted since the last call; they are `count_tokens` in all.

    Raises:
        BadConfig: The text's context is longer than the model takes, or its stride than a window.
        FastmemitError: The model gives NaN.
        UnknownArchitecture: The model is not causal, has no decoder to take hidden states from, or gives other logits
            with its head run apart.
    """
    windows = text.windows(context_limit(adapter.model))
    adapter.check_causal()
    total, tokens = 0.0, 0
    with evaluation_mode(adapter.model):
        for batch in _batches(windows, batch_tokens):
            nll = _run(adapter, batch)
            if not math.isfinite(nll):
                raise FastmemitError(
                    f"The model's logits are not finite between the tokens {tokens} and "
                    f"{tokens + sum(w.predicted for w in batch)} of {text.name}, so there is no "
                    "perplexity; look for NaN in its weights, or choose float32."
                )
            total += nll
            done = sum(window.predicted for window in batch)
            tokens += done
            if progress is not None:
                progress(done)
    return PerplexityResult(total / tokens, tokens, len(windows), max(len(window.ids) for window in windows))


def edited_nll(adapter: ModelAdapter, text: PerplexityText) -> float:
    """The cost of a text's tokens on an edited model, in nats; infinite where edits broke it.

    A model whose output is not finite is a result of an experiment and not the end of it. For a text that the unedited
    model has been measured on, nothing else can be wrong.
    """
    try:
        return perplexity(adapter, text).nll
    except FastmemitError as broken:
        log.warning("%s It counts as infinite.", broken)
        return math.inf


def before_and_after(unedited: PerplexityResult, costs: Sequence[float]) -> Perplexity:
    """The perplexity of the unedited model, and after the edits of each of some batches.

    Args:
        unedited: Of the unedited model.
        costs: `edited_nll` after each of the batches, at least one.
    """
    return Perplexity(
        before=unedited.perplexity,
        after=_exp(math.fsum(costs) / len(costs)),
        batches=len(costs),
        tokens=unedited.tokens,
    )


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def count_tokens(adapter: ModelAdapter, text: PerplexityText) -> int:
    """How many tokens `perplexity` predicts."""
    return sum(window.predicted for window in text.windows(context_limit(adapter.model)))


def _batches(windows: Sequence[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Neighbouring windows of one shape (all but the first and the last have the same)."""
    for (length, _), group in groupby(windows, lambda window: (len(window.ids), window.first)):
        same = list(group)
        rows = max(1, batch_tokens // length)
        yield from (same[start : start + rows] for start in range(0, len(same), rows))


def _run(adapter: ModelAdapter, windows: Sequence[Window]) -> float:
    """The summed cost of the predicted tokens of windows of one shape, in nats.

    The blocks run once. Their hidden states then go through the rest of the model's own forward (head, scaling, soft
    caps) in pieces, as if the decoder had given only those.
    """
    ids = torch.tensor([window.ids for window in windows], device=adapter.device)  # (B, L)
    first = windows[0].first
    decoder = _decoder(adapter)
    kept: list[Any] = []
    with ExitStack() as hooks:
        hooks.callback(decoder.register_forward_hook(lambda _m, _a, out: kept.append(out)).remove)
        hooks.enter_context(head_reads(adapter, [0], [first - 1]))
        whole: Tensor = adapter.run(input_ids=ids, use_cache=False).logits[0]  # (1, vocabulary)
    if not kept:
        raise UnknownArchitecture(
            f"{type(adapter.model).__name__} does not call {type(decoder).__name__}, which holds "
            "its blocks, so its hidden states cannot be read; score it with another tool."
        )
    hidden = hidden_of(kept[0])[:, first - 1 : -1].flatten(0, 1)  # (M, d)
    wanted = ids[:, first:].flatten()
    rows = max(1, _LOGIT_BYTES // (4 * whole.shape[-1]))
    total = torch.zeros((), dtype=torch.float64)
    begun = False
    for part, targets in zip(hidden.split(rows), wanted.split(rows), strict=True):
        given = with_hidden(kept[0], part[None])
        with forward_as(decoder, lambda *_a, _given=given, **_k: _given):
            out: Tensor = adapter.run(input_ids=targets[None], use_cache=False).logits[0]
        if not begun and not agrees(adapter.model, out[:1], whole):
            raise UnknownArchitecture(
                f"{type(adapter.model).__name__} gives other logits where its head runs apart from "
                "its blocks, so its perplexity cannot be computed in pieces; score it with another "
                "tool."
            )
        begun = True
        out = out.float()
        # logsumexp adds pairwise; the log-softmax of a CPU adds in a row and is 1e-5 nats too low
        # at 49,152 words.
        costs = out.logsumexp(1) - out.gather(1, targets.to(out.device)[:, None])[:, 0]
        total += costs.cpu().double().sum()
    return float(total)


def _decoder(adapter: ModelAdapter) -> nn.Module:
    """The module that owns the blocks and gives the hidden states after the last norm."""
    blocks = adapter.template.partition(".{}")[0]
    return adapter.model.get_submodule(blocks.rpartition(".")[0])
