"""A fact as tokens: where its subject stands, what the answer is, and which facts a model knows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastcov.mode import evaluation_mode, isolated
from fastmemit.errors import BadRequest
from fastmemit.logits import head_reads
from fastmemit.models import ModelAdapter, check_lengths
from fastmemit.request import EditRequest
from fastmemit.tokens import encode_with_target, length_batches, pad_batch, subject_end
from fastmemit.tracing.settings import TraceSettings
from fastmemit.tracing.sites import restored_module

#: ROME's groups of positions (its figure 2), in the order of the text.
GROUPS = ("first subject", "middle subject", "last subject", "first after", "further", "last")
_CHUNK = 32  # facts asked for at a time, until as many are known as are to be traced


@dataclass(frozen=True)
class TracedFact:
    """One fact as the model reads it.

    Attributes:
        request: The fact.
        ids: The tokens of its prompt, up to the one that the answer is predicted from.
        first: Index of the subject's first token.
        last: Index of its last token.
        answer: Id of the first token of the true answer.
    """

    request: EditRequest
    ids: tuple[int, ...]
    first: int
    last: int
    answer: int

    def groups(self) -> dict[int, str]:
        """The group of each position from the subject on; one each.

        A subject of one token is its last token, and a single token after it is the last one.
        """
        found = {}
        for index in range(self.first, len(self.ids)):
            if index <= self.last:
                names = {self.first: "first subject", self.last: "last subject"}
                found[index] = names.get(index, "middle subject")
            else:
                names = {self.last + 1: "first after", len(self.ids) - 1: "last"}
                found[index] = names.get(index, "further")
        return found


def encode_fact(tokenizer: Any, request: EditRequest) -> TracedFact:
    """Tokenise a fact and its true answer.

    Raises:
        BadRequest: It has no true answer; its subject shares a token with the answer; or no token stands between the
            two, so that there is nothing to trace.
    """
    if request.target_true is None:
        raise BadRequest(
            f"The fact {request.text!r:.80} has no target_true, whose probability is traced; "
            "add the answer that the model gives."
        )
    truth = request.answer_to(request.text, request.target_true)
    encoded, n_answer = encode_with_target(tokenizer, request.text, truth)
    ids = encoded.ids[:-n_answer]
    start, end = len(request.before), len(request.before) + len(request.subject)
    last = subject_end(encoded, start, end)
    first = next(index for index, (a, b) in enumerate(encoded.spans) if max(a, start) < min(b, end))
    if last >= len(ids):
        raise BadRequest(
            f"The tokenizer merges the end of the subject {request.subject!r} with the answer "
            f"{truth!r}; put a word between them in the prompt {request.prompt!r}."
        )
    if last == len(ids) - 1:
        raise BadRequest(
            f"The prompt {request.text!r:.80} ends with its subject, so no token after it reads "
            "what was restored there; write at least one word behind the subject."
        )
    return TracedFact(request, tuple(ids), first, last, encoded.ids[-n_answer])


def probability(logits: Tensor, answers: Tensor) -> Tensor:
    """Probabilities of one token each: logits (M, vocabulary), answers (M,) -> (M,), float32."""
    logits = logits.float()
    wanted = logits.gather(1, answers.to(logits.device)[:, None])[:, 0]
    return (wanted - logits.logsumexp(1)).exp()


@dataclass(frozen=True)
class Chosen:
    """The facts to trace.

    Attributes:
        facts: Those.
        looked_at: How many the model was asked about to find them.
    """

    facts: tuple[TracedFact, ...]
    looked_at: int


@isolated()
def choose_facts(
    adapter: ModelAdapter, tokenizer: Any, requests: Sequence[EditRequest], settings: TraceSettings
) -> Chosen:
    """Encode the facts and choose those to trace: by default known ones, `settings.limit` at most.

    Known is a fact whose first answer token is the model's most probable next token.  The order is
    shuffled, because files of facts are often sorted by relation.

    Args:
        adapter: The model.
        tokenizer: Its tokenizer.
        requests: The facts, each with its true answer.
        settings: Of the trace.

    Raises:
        BadRequest: A fact cannot be traced, there is none, or none is known.
        BadConfig: A window is more than the model's layers.
        UnknownArchitecture: The model's attention cannot be told.
    """
    for kind in settings.kinds:
        settings.window_of(kind, adapter.n_layers)
        for layer in range(adapter.n_layers):
            restored_module(adapter, kind, layer)
    order = [encode_fact(tokenizer, request) for request in requests]
    if not order:
        raise BadRequest("There is no fact to trace; give at least one.")
    check_lengths(adapter.model, [fact.ids for fact in order])
    random.Random(settings.seed).shuffle(order)
    if not settings.only_known:
        facts = tuple(order[: settings.limit])
        return Chosen(facts, len(facts))
    known: list[TracedFact] = []
    batch_tokens = settings.tokens_on(adapter.device)
    with evaluation_mode(adapter.model):
        for begin in range(0, len(order), _CHUNK):
            chunk = order[begin : begin + _CHUNK]
            said = _predictions(adapter, [fact.ids for fact in chunk], batch_tokens)
            for index, (fact, token) in enumerate(zip(chunk, said, strict=True)):
                if token == fact.answer:
                    known.append(fact)
                if len(known) == settings.limit:
                    return Chosen(tuple(known), begin + index + 1)
    if not known:
        raise BadRequest(
            f"The model knows none of the {len(order)} facts: its most probable next token is "
            "never the first of target_true; give facts that it knows, or trace unknown ones too "
            "with only_known=False (--unknown-too)."
        )
    return Chosen(tuple(known), len(order))


def _predictions(adapter: ModelAdapter, prompts: Sequence[tuple[int, ...]], batch_tokens: int) -> list[int]:
    """The most probable next token of each prompt."""
    said: dict[tuple[int, ...], int] = {}
    for rows in length_batches(dict.fromkeys(prompts), batch_tokens):
        batch = pad_batch(rows, device=adapter.device)
        with head_reads(adapter, range(len(rows)), [len(row) - 1 for row in rows]):
            logits = adapter.run(**batch, use_cache=False).logits[0]
        said.update(zip(rows, logits.argmax(1).tolist(), strict=True))
    return [said[prompt] for prompt in prompts]
