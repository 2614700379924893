"""What a model answers: what many answers cost it, and whether the facts of an edit are what it says.

The loss of a target vector and a solved system say nothing of what a user will read, so the edited model is asked each
fact again, as written: one batched forward over the prompts with their new answers, and a greedy continuation of those
that it does not give.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from fastcov.files import printable
from fastcov.hooks import evaluation_mode, isolated
from fastmemit.errors import BadRequest
from fastmemit.models import ModelAdapter
from fastmemit.models.running import check_lengths, context_limit, head_reads, length_batches, pad_batch
from fastmemit.partial_forward import goes_on, left_padded
from fastmemit.request import EditRequest
from fastmemit.text import continue_rows, encode_with_target, end_tokens, lead

Question = tuple[str, str]  # (prompt, answer with its leading space)
Kept = dict[tuple[int, ...], tuple[Cache, int]]  # tokens that have run -> the cache and the row of it that begin so

# Padded tokens of one forward. A few hundred already keep a CPU's matrix products busy, and larger
# batches only pad more and leave the caches; a GPU wants more at once.
_BATCH_TOKENS = {"cpu": 512}
_BATCH_TOKENS_ELSEWHERE = 8192

SHOWN = 3  # tokens that a continuation has at least, so that it can be read
MORE = 4  # tokens beyond the new answer's that it has where it may still become that answer
KEPT = 1024  # padded tokens whose keys and values are kept to go on from
ROWS = 64  # continued at once
NAMED = 10  # facts that a verdict names at most


class Answer(NamedTuple):
    """What a model makes of one answer after its prompt."""

    nll: float  # mean negative log-likelihood per token, in nats
    matches: tuple[bool, ...]  # per token: is it the most probable one after those before it
    best: tuple[int, ...] = ()  # per token: the most probable one after those of the answer before it

    @property
    def exact(self) -> bool:
        """Whether greedy decoding of the prompt gives this answer: every token matches."""
        return all(self.matches)


class _Read(NamedTuple):
    """Where a question's answer is read: its last `tokens` positions before `end`."""

    question: int
    end: int  # tokens of prompt and answer without the last, which is never an input
    tokens: tuple[int, ...]  # of the answer


@isolated()
def judge_answers(
    adapter: ModelAdapter,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    batch_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
    kept: Kept | None = None,
) -> list[Answer]:
    """Cost and accuracy of each answer after its prompt, under teacher forcing; in the order of the questions.

    Sequences are run sorted by length, and what several questions share runs once: the answers " Rome" and " Paris" of
    one prompt are read from the same forward, because an answer's last token is never an input; and a sequence that
    begins another one is read from that one, because no token depends on a later one.

    Args:
        adapter: The model.
        tokenizer: Its tokenizer.
        questions: (prompt, answer) pairs; the answer brings its leading space.
        batch_tokens: Padded tokens a forward takes at most (one sequence always runs); None takes 512 on a CPU and 8192
            elsewhere.
        progress: Called with the number of questions done since the last call.
        kept: Where to keep the model's keys and values of each prompt and answer, but for its last token, of the first
            `KEPT` padded tokens.

    Raises:
        UnknownArchitecture: The model is not causal.
        BadRequest: An answer yields no token, or no token stands before it.
    """
    adapter.check_causal()
    if batch_tokens is None:
        batch_tokens = _BATCH_TOKENS.get(adapter.device.type, _BATCH_TOKENS_ELSEWHERE)
    wanted: dict[tuple[int, ...], list[_Read]] = {}
    for number, (prompt, answer) in enumerate(questions):
        encoded, n_answer = encode_with_target(tokenizer, prompt, answer)
        if n_answer == len(encoded):
            raise BadRequest(
                f"The prompt {prompt!r} leaves no token to predict the answer {answer!r} from; write a word before it."
            )
        read = _Read(number, len(encoded) - 1, encoded.ids[-n_answer:])
        wanted.setdefault(encoded.ids[:-1], []).append(read)
    host = _hosts(wanted)
    reads: dict[tuple[int, ...], list[_Read]] = {}  # what runs -> what is read from it
    for ids, found in wanted.items():
        reads.setdefault(host[ids], []).extend(found)
    answers: dict[int, Answer] = {}
    room = KEPT
    with evaluation_mode(adapter.model):
        # A row that padding changes runs alone.
        together = batch_tokens if adapter.traits.right_padding != "none" else 1
        for chunk in length_batches(reads, together):
            here = [(row, read) for row, ids in enumerate(chunk) for read in reads[ids]]
            room -= len(chunk) * len(chunk[-1])  # the longest comes last
            answers.update(_run(adapter, chunk, here, kept if room >= 0 else None))
            if progress is not None:
                progress(len(here))
    if kept is not None:
        kept.update({ids: kept[longer] for ids, longer in host.items() if longer in kept})
    return [answers[number] for number in range(len(questions))]


def _hosts(sequences: Iterable[tuple[int, ...]]) -> dict[tuple[int, ...], tuple[int, ...]]:
    """For each sequence a longest one that begins with it: itself, if no other does."""
    host: dict[tuple[int, ...], tuple[int, ...]] = {}
    following: tuple[int, ...] = ()
    # In lexical order what begins with a sequence comes right after it.
    for ids in sorted(sequences, reverse=True):
        host[ids] = host[following] if following[: len(ids)] == ids else ids
        following = ids
    return host


def _run(
    adapter: ModelAdapter, chunk: list[tuple[int, ...]], here: list[tuple[int, _Read]], kept: Kept | None
) -> list[tuple[int, Answer]]:
    check_lengths(adapter.model, chunk)
    batch = pad_batch(chunk, device=adapter.device)
    if adapter.traits.right_padding == "unmasked":  # attention without a mask is faster
        del batch["attention_mask"]
    # A position is read once, however many answers are read from it: the head is a large part of a
    # small model's work, and rows of a product may differ in their last bit.
    positions: dict[tuple[int, int], int] = {}
    places = [
        positions.setdefault((row, read.end - len(read.tokens) + i), len(positions))
        for row, read in here
        for i in range(len(read.tokens))
    ]
    rows, columns = zip(*positions, strict=True)
    more: dict[str, Any] = {"use_cache": False}
    if kept is not None:
        more = {"use_cache": True, "past_key_values": DynamicCache()}
        kept.update({ids: (more["past_key_values"], row) for row, ids in enumerate(chunk)})
    with head_reads(adapter, rows, columns):
        logits: Tensor = adapter.run(**batch, **more).logits[0]  # (M, vocabulary)
    logits = logits.float()
    place = torch.tensor(places, device=logits.device)
    wanted = torch.tensor([t for _, read in here for t in read.tokens], device=logits.device)
    nll = logits.logsumexp(1)[place] - logits[place, wanted]
    best = logits.argmax(1)[place]
    matches = best == wanted
    sizes = [len(read.tokens) for _, read in here]
    parts = zip(here, nll.cpu().split(sizes), matches.cpu().split(sizes), best.cpu().split(sizes), strict=True)
    return [
        (read.question, Answer(float(cost.mean()), tuple(match.tolist()), tuple(tokens.tolist())))
        for (_, read), cost, match, tokens in parts
    ]


@dataclass(frozen=True)
class Reply:
    """What a model makes of one fact as it is now."""

    asked: str  # the prompt as it was put to the model, behind its lead if it has one (`fastmemit.text.lead`)
    probability: float  # of the whole new answer
    said: bool  # whether the new answer is what the model says: each token the most probable one
    says: str  # the new answer, or the most probable tokens instead, as many as it has and three at least
    at_start: bool | None  # of a prompt with a lead: whether the new answer is said without it


@dataclass(frozen=True)
class Outcome:
    """What became of one fact."""

    request: EditRequest
    before: Reply  # without the edit; its `Reply.says` is the former answer
    after: Reply

    @property
    def said(self) -> bool:
        """Whether the new answer is what the model says now."""
        return self.after.said

    def described(self) -> str:
        """One line: the new answer's probability before and after, the fact, the former answer."""
        return (
            f"{self.before.probability:7.2%} -> {self.after.probability:7.2%}  "
            f"{one_line(self.request.text + self.request.target, end=True)} (before: {one_line(self.before.says)})"
        )


@isolated()
def ask(adapter: ModelAdapter, tokenizer: Any, requests: Sequence[EditRequest]) -> list[Reply]:
    """Ask a model for facts, as it is now: a reply for each, in their order; only `target_new` is looked for."""
    fronts = [lead(tokenizer, request) for request in requests]
    asked = [front + request.text for front, request in zip(fronts, requests, strict=True)]
    bare = [index for index, front in enumerate(fronts) if front]
    questions = [
        *((text, request.target) for text, request in zip(asked, requests, strict=True)),
        *((requests[index].text, requests[index].target) for index in bare),
    ]
    kept: Kept = {}
    judged = judge_answers(adapter, tokenizer, questions, kept=kept if goes_on(adapter) else None)
    started = {index: each.exact for index, each in zip(bare, judged[len(asked) :], strict=True)}
    answers = judged[: len(asked)]
    missed = [index for index, answer in enumerate(answers) if not answer.exact]
    said = _continued(adapter, tokenizer, [(*questions[i], answers[i]) for i in missed], kept)
    instead = dict(zip(missed, said, strict=True))
    replies = []
    for index, (text, request, answer) in enumerate(zip(asked, requests, answers, strict=True)):
        wanted = request.target.strip()
        says = instead.get(index, wanted)
        replies.append(
            Reply(
                text,
                math.exp(-answer.nll * len(answer.matches)),
                answer.exact or _begins_with(says, wanted),
                says,
                started.get(index),
            )
        )
    return replies


def compare(requests: Sequence[EditRequest], before: Sequence[Reply], after: Sequence[Reply]) -> tuple[Outcome, ...]:
    """What became of facts: what `ask` found before and after an edit."""
    return tuple(map(Outcome, requests, before, after))


def verdict(outcomes: Sequence[Outcome]) -> str:
    """How many facts are now what the model says, and which not; in a second line those that hold behind other text."""
    missed = [each for each in outcomes if not each.said]
    count = len(outcomes)
    lines = [f"{count - len(missed)} of {count} {'fact is' if count == 1 else 'facts are'} now what the model says"]
    if missed:
        named = [
            f"{one_line(each.request.text + each.request.target, end=True)} (says: {one_line(each.after.says)})"
            for each in missed
        ]
        lines[0] += f"; not: {_listed(named)}"
    behind = [each for each in outcomes if each.said and each.after.at_start is False]
    if behind:
        subjects = _listed([one_line(each.request.subject) for each in behind])
        lines.append(
            f"{len(behind)} of these behind other text (a line break will do) but not at the very "
            f"start of one, where one token is hardly told from another: {subjects}"
        )
    return "\n".join(lines)


def _continued(
    adapter: ModelAdapter, tokenizer: Any, missed: Sequence[tuple[str, str, Answer]], kept: Kept
) -> list[str]:
    """How the model goes on from each prompt: about as far as the answer, and further if it may become that."""
    limit = context_limit(adapter.model) or sys.maxsize
    ends = end_tokens(adapter.model, tokenizer)
    asked: list[tuple[int, ...]] = []  # the tokens of each prompt
    pasts: list[tuple[Cache, int] | None] = []
    tokens: list[list[int]] = []  # that are said after it
    reach: list[tuple[int, int]] = []  # how many of them there shall be; and if what is said is still open
    for prompt, wanted, answer in missed:
        encoded, count = encode_with_target(tokenizer, prompt, wanted)
        asked.append(encoded.ids[:-count])
        pasts.append(kept.get(encoded.ids[:-1]))
        room = limit - len(asked[-1])
        reach.append((min(max(count, SHOWN), room), min(count + MORE, room)))
        # The answer's own forward has shown what is said up to the first token that differs.
        known = answer.best[: answer.matches.index(False) + 1][: reach[-1][0]]
        tokens.append([*takewhile(lambda token: token not in ends, known)])

    def said(index: int) -> str:
        return str(tokenizer.decode(tokens[index], skip_special_tokens=True)).strip()

    for turn in range(2):
        rows = [
            (reach[index][turn] - len(tokens[index]), index, (*asked[index], *tokens[index]))
            for index in range(len(missed))
            if turn == 0 or missed[index][1].strip().startswith(said(index).rstrip("\ufffd"))
        ]
        for group in _alike([row for row in rows if row[0] > 0], limit):
            found = [pasts[index] for _, index, _ in group if turn == 0]

            def past(numbers: Sequence[int], group: Any = group, found: Any = found) -> Cache:
                return left_padded([found[n] for n in numbers], [len(group[n][2]) - 1 for n in numbers])

            new = continue_rows(
                adapter.model, tokenizer, [ids for _, _, ids in group], max(more for more, _, _ in group),
                past=past if found and None not in found else None,
            )  # fmt: skip
            for (more, index, _), each in zip(group, new, strict=True):
                tokens[index] += each[:more]
    return [said(index) for index in range(len(missed))]


def _alike(rows: list[tuple[int, int, tuple[int, ...]]], limit: int) -> list[list[tuple[int, int, tuple[int, ...]]]]:
    """Rows that are continued together: none more than twice as far as it needs, nor beyond the context."""
    groups: list[list[tuple[int, int, tuple[int, ...]]]] = []
    longest = 0
    for row in sorted(rows, key=lambda row: (row[0], len(row[2]))):
        more, _, ids = row
        longest = max(longest, len(ids))
        if not groups or len(groups[-1]) == ROWS or more > 2 * groups[-1][0][0] or longest + more > limit:
            groups.append([])
            longest = len(ids)
        groups[-1].append(row)
    return groups


def _begins_with(text: str, answer: str) -> bool:
    """Whether a text begins with an answer as whole words: other tokens may spell the same."""
    rest = text[len(answer) :]
    return text.startswith(answer) and not (answer[-1:].isalnum() and rest[:1].isalnum())


def one_line(text: str, limit: int = 80, *, end: bool = False) -> str:
    """A text on one line, without what would steer a terminal, and its beginning or end where that is too long."""
    shown = printable(" ".join(text.split())) or "nothing but white space"
    if len(shown) <= limit:
        return shown
    return "…" + shown[1 - limit :] if end else shown[: limit - 1] + "…"


def _listed(items: Sequence[str]) -> str:
    more = len(items) - NAMED
    shown = "; ".join(items[:NAMED])
    return f"{shown}; and {more} more" if more > 0 else shown
