"""CounterFact's questions put to a model, many records at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fastmemit.answers import Answer, Question, judge_answers
from fastmemit.data import Record
from fastmemit.errors import BadData
from fastmemit.metrics.score import Exact, RecordScore, score_record
from fastmemit.models import ModelAdapter


def score_records(
    adapter: ModelAdapter,
    tokenizer: Any,
    records: Sequence[Record],
    *,
    attributes: bool = False,
    batch_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[RecordScore]:
    """Score the model, as it is now, on the rewrite, paraphrase and neighbourhood prompts.

    Args:
        adapter: The model.
        tokenizer: Its tokenizer.
        records: The records; each needs a true answer.
        attributes: Ask the attribute prompts too, which are as many again in CounterFact.
        batch_tokens: See `judge_answers`.
        progress: Called with the number of questions done since the last call; a record asks two for each of its
            prompts (`count_questions`).

    Raises:
        BadData: A record has no true answer.
    """
    questions: list[Question] = []
    for record in records:
        if record.request.target_true is None:
            raise BadData(f"Record {record.case_id} has no target_true, which scores compare with; add it.")
        answers = (record.request.target_new, record.request.target_true)
        for prompt in _prompts(record, attributes):
            questions += [(prompt, record.request.answer_to(prompt, each)) for each in answers]
    judged = iter(judge_answers(adapter, tokenizer, questions, batch_tokens=batch_tokens, progress=progress))
    return [_score(record, judged, attributes) for record in records]


def count_questions(records: Sequence[Record], attributes: bool = False) -> int:
    """How many questions `score_records` asks."""
    return sum(2 * len(_prompts(record, attributes)) for record in records)


def _prompts(record: Record, attributes: bool) -> list[str]:
    asked = [record.request.text, *record.paraphrases, *record.neighbourhood]
    return [*asked, *record.attributes] if attributes else asked


def _score(record: Record, judged: Iterator[Answer], attributes: bool) -> RecordScore:
    """The score of a record whose answers, new and true of each prompt, come next."""

    def take(prompts: Sequence[str]) -> list[tuple[Answer, Answer]]:
        return [(next(judged), next(judged)) for _ in prompts]

    ((new, true),) = take([record.request.text])
    said_otherwise, nearby = take(record.paraphrases), take(record.neighbourhood)
    related = take(record.attributes) if attributes else []
    return score_record(
        record.case_id,
        (new.nll, true.nll),
        _costs(said_otherwise),
        _costs(nearby),
        attributes=_costs(related),
        exact=Exact(
            new.exact, tuple(said.exact for said, _ in said_otherwise), tuple(kept.exact for _, kept in nearby)
        ),
    )


def _costs(pairs: Sequence[tuple[Answer, Answer]]) -> list[tuple[float, float]]:
    return [(new.nll, true.nll) for new, true in pairs]
