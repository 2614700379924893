"""What answers cost: mean negative log-likelihood per target token, for many prompts at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcov.hooks import evaluation_mode, isolated
from fastmemit.errors import BadRequest
from fastmemit.models import ModelAdapter, check_lengths
from fastmemit.partial_forward import head_reads
from fastmemit.tokens import encode_with_target, length_batches, pad_batch

Question = tuple[str, str]  # (prompt, answer with its leading space)

# Padded tokens of one forward. A few hundred already keep a CPU's matrix products busy, and larger
# batches only pad more and leave the caches; a GPU wants more at once.
_BATCH_TOKENS = {"cpu": 512}
_BATCH_TOKENS_ELSEWHERE = 8192


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


def answer_nlls(
    adapter: ModelAdapter,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    batch_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[float]:
    """Mean negative log-likelihood per token of each answer after its prompt: see `judge_answers`.

    Returns:
        Nats per token, in the order of the questions.

    Raises:
        BadRequest: An answer yields no token, or no token stands before it.
    """
    judged = judge_answers(adapter, tokenizer, questions, batch_tokens=batch_tokens, progress=progress)
    return [answer.nll for answer in judged]


@isolated()
def judge_answers(
    adapter: ModelAdapter,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    batch_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Cost and accuracy of each answer after its prompt, under teacher forcing.

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

    Returns:
        An answer for each question, in their order.

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
    with evaluation_mode(adapter.model):
        # A row that padding changes runs alone.
        together = batch_tokens if adapter.right_padding != "none" else 1
        for chunk in length_batches(reads, together):
            here = [(row, read) for row, ids in enumerate(chunk) for read in reads[ids]]
            answers.update(_run(adapter, chunk, here))
            if progress is not None:
                progress(len(here))
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
    adapter: ModelAdapter, chunk: list[tuple[int, ...]], here: list[tuple[int, _Read]]
) -> list[tuple[int, Answer]]:
    check_lengths(adapter.model, chunk)
    batch = pad_batch(chunk, device=adapter.device)
    if adapter.right_padding == "unmasked":  # attention without a mask is faster
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
    with head_reads(adapter, rows, columns):
        logits: Tensor = adapter.run(**batch, use_cache=False).logits[0]  # (M, vocabulary)
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
