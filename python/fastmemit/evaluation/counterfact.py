"""CounterFact's questions put to a model, many records at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastmemit.data import Record
from fastmemit.errors import BadData
from fastmemit.evaluation.nll import Question, answer_nlls
from fastmemit.metrics.score import RecordScore, score_record
from fastmemit.models import ModelAdapter


def score_records(
    adapter: ModelAdapter,
    tokenizer: Any,
    records: Sequence[Record],
    *,
    batch_tokens: int = 4096,
    progress: Callable[[int], None] | None = None,
) -> list[RecordScore]:
    """Score the model, as it is now, on the rewrite, paraphrase and neighbourhood prompts.

    Args:
        adapter: The model.
        tokenizer: Its tokenizer.
        records: The records; each needs a true answer.
        batch_tokens: See `answer_nlls`.
        progress: Called with the number of questions done since the last call; a record asks two
            for each of its prompts (`count_questions`).

    Raises:
        BadData: A record has no true answer.
    """
    questions: list[Question] = []
    for record in records:
        if record.request.target_true is None:
            raise BadData(
                f"Record {record.case_id} has no target_true, which scores compare with; add it."
            )
        answers = (record.request.target, " " + record.request.target_true.strip())
        questions += [(prompt, answer) for prompt in _prompts(record) for answer in answers]
    nlls = iter(
        answer_nlls(adapter, tokenizer, questions, batch_tokens=batch_tokens, progress=progress)
    )
    scores = []
    for record in records:
        pairs = [(next(nlls), next(nlls)) for _ in _prompts(record)]
        split = 1 + len(record.paraphrases)
        scores.append(score_record(record.case_id, pairs[0], pairs[1:split], pairs[split:]))
    return scores


def count_questions(records: Sequence[Record]) -> int:
    """How many questions `score_records` asks."""
    return sum(2 * len(_prompts(record)) for record in records)


def _prompts(record: Record) -> list[str]:
    return [record.request.text, *record.paraphrases, *record.neighbourhood]
