"""Perplexity on running text: how well a model still speaks, whatever was edited.

The text is read once, tokenised, and cut into windows that are run as they are, without padding and so without a mask,
which leaves a model its fastest attention.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from fastcov.files import StrPath
from fastcov.hooks import evaluation_mode, isolated
from fastmemit.data.reading import decode, read_whole
from fastmemit.errors import BadConfig, BadData, FastmemitError, UnknownArchitecture
from fastmemit.models import ModelAdapter
from fastmemit.models.running import agrees, context_limit, forward_as, head_reads, hidden_of, with_hidden
from fastmemit.text import encode

log = logging.getLogger(__name__)

DEFAULT_CONTEXT = 1024  # tokens in a window where nothing else is asked for and the model takes so many
_SLACK = 256  # a cut text may differ from the whole one in its last tokens; so many are read and not used
# Size of one block of logits in float32; their log-sum-exp needs as much again. Larger is not faster.
_LOGIT_BYTES = 1 << 26


class Perplexity(TypedDict):
    """Perplexity on running text, of the unedited model and after the edits."""

    before: float
    after: float  # the geometric mean over the batches it was measured after
    batches: int  # how many those were
    tokens: int  # predicted tokens


class Window(NamedTuple):
    """Some tokens that are run together, and which of them are predicted."""

    ids: tuple[int, ...]
    first: int  # index of the first predicted token; all after it are predicted too

    @property
    def predicted(self) -> int:
        """How many tokens are predicted."""
        return len(self.ids) - self.first


@dataclass(frozen=True)
class PerplexityText:
    """A tokenised text and how it is cut."""

    name: str  # the file's name without its folder
    sha256: str  # digest of the file, in hex
    ids: tuple[int, ...]  # tokens, without special ones
    lead: tuple[int, ...] = ()  # special tokens that the tokenizer puts in front (BOS); every window begins with them
    context: int | None = None  # tokens in a window, `lead` included; None: what the model takes, <= `DEFAULT_CONTEXT`
    stride: int | None = None  # tokens of the text from a window's begin to the next one's; None: no overlap

    def __post_init__(self) -> None:
        """Refuse a window that predicts nothing, and a stride that goes nowhere."""
        lead = len(self.lead)
        if self.context is not None and self.context < lead + 2 - bool(lead):
            raise BadConfig(
                f"A context of {self.context} tokens predicts nothing; give 2 or more"
                + (f", or {lead + 1} with the {lead} special ones in front." if lead > 1 else ".")
            )
        if self.stride is not None and self.stride < 1:
            raise BadConfig(f"The stride must be 1 or more but is {self.stride}; give more.")

    def windows(self, limit: int | None = None) -> list[Window]:
        """The windows, in the order of the text.

        Every token of the text is predicted once, except the first of a window that has nothing in front of it: without
        overlap and without BOS that is one token a window. The model takes `limit` tokens at once; None: any number.

        Raises:
            BadConfig: The context is longer than that, or the stride is longer than a window.
        """
        context = self.context or min(limit or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
        if limit is not None and context > limit:
            raise BadConfig(f"The context is {context} tokens but the model takes {limit} at once; give a smaller one.")
        lead = len(self.lead)
        body = context - lead
        step = self.stride or body
        if step > body:
            raise BadConfig(
                f"The stride is {step} tokens but a window has room for {body} of the text, so some would be left out; "
                "give a smaller stride."
            )
        found, done = [], 0
        for start in range(0, len(self.ids), step):
            end = min(start + body, len(self.ids))
            window = Window((*self.lead, *self.ids[start:end]), max(lead + done - start, 1))
            if window.predicted > 0:
                found.append(window)
            done = end
            if end == len(self.ids):
                break
        return found


def read_text(
    path: StrPath, tokenizer: Any, *, tokens: int | None = None, context: int | None = None, stride: int | None = None
) -> PerplexityText:
    """Read and tokenise a UTF-8 file, so many tokens from its beginning; line ends become one line feed each.

    Raises:
        BadData: The file is missing, empty, not UTF-8, larger than 1 GiB, or has fewer tokens than asked for or than
            can be predicted.
        BadConfig: A number that makes no sense.
    """
    if tokens is not None and tokens < 2:
        raise BadConfig(f"{tokens} tokens predict nothing; give 2 or more.")
    path = Path(path)
    raw = read_whole(path, BadData, "give a part of it")
    text = decode(raw, path, 0, BadData).replace("\r\n", "\n").replace("\r", "\n")
    ids = _ids(tokenizer, text, tokens)
    lead = encode(tokenizer, "").ids
    if len(ids) < (tokens or 1) or len(lead) + len(ids) < 2:
        needed = tokens or (1 if lead else 2)
        fix = "a longer text or ask for fewer" if tokens else "a longer text"
        raise BadData(f"{path} has {len(ids)} tokens but {needed} are needed for a perplexity; give {fix}.")
    return PerplexityText(path.name, hashlib.sha256(raw).hexdigest(), tuple(ids), lead, context, stride)


def _ids(tokenizer: Any, text: str, wanted: int | None) -> list[int]:
    """The first tokens of a text, without tokenising much more of it than they need."""
    size = len(text) if wanted is None else 8 * (wanted + _SLACK)
    while True:
        ids = tokenizer(text[:size], add_special_tokens=False, verbose=False)["input_ids"]
        if size >= len(text) or len(ids) >= (wanted or 0) + _SLACK:
            return list(ids[:wanted])
        size *= 4


@dataclass(frozen=True)
class PerplexityResult:
    """What a text costs a model."""

    nll: float  # mean negative log-likelihood, in nats per predicted token
    tokens: int  # predicted tokens
    windows: int  # windows that were run
    context: int  # tokens in the longest of them

    @property
    def perplexity(self) -> float:
        """``exp(nll)``; infinite where that is too large for a float."""
        return _exp(self.nll)


@isolated()
def perplexity(
    adapter: ModelAdapter,
    text: PerplexityText,
    *,
    batch_tokens: int = 4096,
    progress: Callable[[int], None] | None = None,
) -> PerplexityResult:
    """Perplexity of a text on the model as it is now: ``exp`` of the mean cost of its tokens.

    A forward takes `batch_tokens` at most (one window always runs). `progress` is called with the number of tokens
    predicted since its last call; they are `count_tokens` in all.

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
            nll, done = _run(adapter, batch), sum(window.predicted for window in batch)
            if not math.isfinite(nll):
                raise FastmemitError(
                    f"The model's logits are not finite between the tokens {tokens} and {tokens + done} of "
                    f"{text.name}, so there is no perplexity; look for NaN in its weights, or choose float32."
                )
            total += nll
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
    """The perplexity of the unedited model, and after some batches, at least one, each with its `edited_nll`."""
    after = _exp(math.fsum(costs) / len(costs))
    return Perplexity(before=unedited.perplexity, after=after, batches=len(costs), tokens=unedited.tokens)


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
    """The summed cost of the predicted tokens of windows of one shape, in nats."""
    # The blocks run once. Their hidden states then go through the rest of the model's own forward (head, scaling, soft
    # caps) in pieces, as if the decoder had given only those.
    ids = torch.tensor([window.ids for window in windows], device=adapter.device)  # (B, L)
    first = windows[0].first
    # The module that owns the blocks and gives the hidden states after the last norm.
    blocks = adapter.template.partition(".{}")[0]
    decoder = adapter.model.get_submodule(blocks.rpartition(".")[0])
    kept: list[Any] = []
    with ExitStack() as hooks:
        hooks.callback(decoder.register_forward_hook(lambda _m, _a, out: kept.append(out)).remove)
        hooks.enter_context(head_reads(adapter, [0], [first - 1]))
        whole: Tensor = adapter.run(input_ids=ids, use_cache=False).logits[0]  # (1, vocabulary)
    if not kept:
        raise UnknownArchitecture(
            f"{type(adapter.model).__name__} does not call {type(decoder).__name__}, which holds its blocks, so its "
            "hidden states cannot be read; score it with another tool."
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
                f"{type(adapter.model).__name__} gives other logits where its head runs apart from its blocks, so its "
                "perplexity cannot be computed in pieces; score it with another tool."
            )
        begun = True
        out = out.float()
        # logsumexp adds pairwise; the log-softmax of a CPU adds in a row and is 1e-5 nats too low at 49,152 words.
        costs = out.logsumexp(1) - out.gather(1, targets.to(out.device)[:, None])[:, 0]
        total += costs.cpu().double().sum()
    return float(total)
