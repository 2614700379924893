"""zsRE's questions put to a model, many records at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastmemit.answers import Question, judge_answers
from fastmemit.data.zsre import ZsreRecord
from fastmemit.metrics.accuracy import RecordAccuracy, accuracy_record
from fastmemit.models import ModelAdapter


def judge_zsre(
    adapter: ModelAdapter,
    tokenizer: Any,
    records: Sequence[ZsreRecord],
    *,
    batch_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[RecordAccuracy]:
    """Which tokens of its answers the model finds, as it is now, under teacher forcing.

    Args:
        adapter: The model.
        tokenizer: Its tokenizer.
        records: The records.
        batch_tokens: See `judge_answers`.
        progress: Called with the number of questions done since the last call (`count_zsre_questions`).
    """
    questions = [question for record in records for question in _questions(record)]
    judged = iter(judge_answers(adapter, tokenizer, questions, batch_tokens=batch_tokens, progress=progress))

    def take(prompts: Sequence[str]) -> list[tuple[bool, ...]]:
        return [next(judged).matches for _ in prompts]

    return [
        accuracy_record(
            record.case_id, next(judged).matches, take(record.paraphrases),
            take(record.neighbourhood),
        )
        for record in records
    ]  # fmt: skip


def count_zsre_questions(records: Sequence[ZsreRecord]) -> int:
    """How many questions `judge_zsre` asks."""
    return sum(len(_questions(record)) for record in records)


def _questions(record: ZsreRecord) -> list[Question]:
    asked = [record.request.text, *record.paraphrases]
    unrelated = zip(record.neighbourhood, record.neighbourhood_answers, strict=True)
    return [
        *((text, record.request.answer_to(text, record.request.target_new)) for text in asked),
        *((prompt, " " + answer.strip()) for prompt, answer in unrelated),
    ]
