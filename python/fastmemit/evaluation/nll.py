"""What answers cost: mean negative log-likelihood per target token, for many prompts at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmemit.errors import BadRequest
from fastmemit.logits import head_reads
from fastmemit.models import ModelAdapter, check_lengths
from fastmemit.tokens import encode_with_target, length_batches, pad_batch

Question = tuple[str, str]  # (prompt, answer with its leading space)


@torch.no_grad()
def answer_nlls(
    adapter: ModelAdapter,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    batch_tokens: int = 4096,
    progress: Callable[[int], None] | None = None,
) -> list[float]:
    """Mean negative log-likelihood per token of each answer after its prompt.

    Sequences are run sorted by length, and equal ones once: the answers " Rome" and " Paris" of one
    prompt are read from the same forward, because an answer's last token is never an input.

    Args:
        adapter: The model.
        tokenizer: Its tokenizer.
        questions: (prompt, answer) pairs; the answer brings its leading space.
        batch_tokens: Padded tokens a forward takes at most (one sequence always runs).
        progress: Called with the number of questions done since the last call.

    Returns:
        Nats per token, in the order of the questions.

    Raises:
        BadRequest: An answer yields no token, or no token stands before it.
    """
    reads: dict[tuple[int, ...], list[tuple[int, int]]] = {}  # ids -> (question, answer tokens)
    tokens: list[tuple[int, ...]] = []
    for number, (prompt, answer) in enumerate(questions):
        encoded, n_answer = encode_with_target(tokenizer, prompt, answer)
        if n_answer == len(encoded):
            raise BadRequest(
                f"The prompt {prompt!r} leaves no token to predict the answer {answer!r} from; "
                "write a word before it."
            )
        reads.setdefault(encoded.ids[:-1], []).append((number, n_answer))
        tokens.append(encoded.ids[-n_answer:])
    nlls = [0.0] * len(questions)
    training = adapter.model.training
    adapter.model.eval()
    try:
        for chunk in length_batches(reads, batch_tokens):
            here = [(row, q, n) for row, ids in enumerate(chunk) for q, n in reads[ids]]
            for question, nll in _run(adapter, chunk, here, tokens):
                nlls[question] = nll
            if progress is not None:
                progress(len(here))
    finally:
        adapter.model.train(training)
    return nlls


def _run(
    adapter: ModelAdapter,
    chunk: list[tuple[int, ...]],
    here: list[tuple[int, int, int]],
    tokens: list[tuple[int, ...]],
) -> list[tuple[int, float]]:
    check_lengths(adapter.model, chunk)
    batch = pad_batch(chunk, device=adapter.device)
    # A position is read once, however many answers are read from it: the head is a large part of a
    # small model's work, and rows of a product may differ in their last bit.
    read: dict[tuple[int, int], int] = {}
    places = [
        read.setdefault((row, len(chunk[row]) - n + i), len(read))
        for row, _, n in here
        for i in range(n)
    ]
    rows, columns = zip(*read, strict=True)
    with head_reads(adapter, rows, columns):
        logits: Tensor = adapter.model(**batch, use_cache=False).logits[0]  # (M, vocabulary)
    logits = logits.float()
    place = torch.tensor(places, device=logits.device)
    wanted = torch.tensor([t for _, q, _ in here for t in tokens[q]], device=logits.device)
    nll = logits.logsumexp(1)[place] - logits[place, wanted]
    parts = nll.cpu().split([n for _, _, n in here])
    return [(q, float(part.mean())) for (_, q, _), part in zip(here, parts, strict=True)]
