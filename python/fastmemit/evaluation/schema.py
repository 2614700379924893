"""The result file of an evaluation, field by field (``fastmemit evaluate --json``)."""

from __future__ import annotations

from typing import Any, TypedDict


class ScoreTable(TypedDict):
    """Scores in percent; null where no record has such prompts."""

    es: float  # efficacy: the rewrite prompt gives the new answer
    ps: float | None  # the paraphrases give it
    ns: float | None  # the neighbourhood prompts keep the true answer
    s: float | None  # harmonic mean of the three


class RecordResult(TypedDict):
    """One record before and after the edit of its batch."""

    case_id: int
    batch: int  # counted from 0
    before: dict[str, Any]  # es, ps, ns as shares, and nll: [new, true] of each prompt
    after: dict[str, Any]


class Result(TypedDict):
    """Everything that an evaluation found."""

    before: ScoreTable  # the unedited model, same records
    after: ScoreTable
    records: list[RecordResult]
    settings: dict[str, Any]  # the method's, the batches', the model's and the statistics'
    seconds: dict[str, float]  # wall time per stage
    versions: dict[str, str]
