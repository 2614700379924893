"""The result file of an evaluation, field by field (``fastmemit evaluate --json``)."""

from __future__ import annotations

from typing import Any, TypedDict

# A field of this name cannot be written as a class's, because "as" is a word of Python's own.
_AttributeScore = TypedDict("_AttributeScore", {"as": float | None}, total=False)


class ScoreTable(_AttributeScore):
    """CounterFact's scores in percent; null where no record has such prompts or none was asked."""

    es: float  # efficacy: the rewrite prompt gives the new answer
    ps: float | None  # the paraphrases give it
    ns: float | None  # the neighbourhood prompts keep the true answer
    s: float | None  # harmonic mean of the three
    ea: float | None  # exact match: the wanted answer is what greedy decoding gives
    pa: float | None
    na: float | None


class FullScoreTable(ScoreTable):
    """The scores, and what else the same answers tell; all in percent, "as" included."""

    em: float | None  # magnitudes: p(new) - p(true), at the rewrite prompt
    pm: float | None  # at the paraphrases
    nm: float | None  # p(true) - p(new), at the neighbourhood prompts


class Perplexity(TypedDict):
    """Perplexity on running text, of the unedited model and after the edits."""

    before: float
    after: float  # the geometric mean over the batches it was measured after
    batches: int  # how many those were
    tokens: int  # predicted tokens


class GenerationTable(TypedDict):
    """Free text about the subjects; in a table of scores only if it was asked for."""

    ge: float | None  # n-gram entropy in bits
    rs: float | None  # reference score in percent; null without reference texts


class AccuracyTable(TypedDict):
    """zsRE's accuracies per answer token, in percent; null where no record has such questions."""

    ea: float  # the question gets the new answer
    pa: float | None  # the rephrased question gets it
    na: float | None  # the unrelated question gets its own answer
    a: float | None  # harmonic mean of the three


class RecordResult(TypedDict):
    """One record before and after the edit of its batch."""

    case_id: int
    batch: int  # counted from 0
    # Shares of CounterFact: those of FullScoreTable, and nll: [new, true] of each prompt; of zsRE:
    # ea, pa and na; "generation" with ge in bits, rs as a share and the texts if it was asked for.
    before: dict[str, Any]
    after: dict[str, Any]


class Result(TypedDict):
    """Everything that an evaluation found."""

    # The unedited model, same records: FullScoreTable (with GenerationTable) or AccuracyTable.
    before: dict[str, float | None]
    after: dict[str, float | None]
    records: list[RecordResult]
    perplexity: Perplexity | None  # None where it was not asked for
    settings: dict[str, Any]  # the method's, the batches', the model's and the statistics'
    seconds: dict[str, float]  # wall time per stage
    versions: dict[str, str]
