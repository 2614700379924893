"""zsRE's accuracies as pure functions of which answer tokens a model finds; no model is needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fastmemit.errors import BadData
from fastmemit.metrics.means import harmonic_mean, mean, percent


@dataclass(frozen=True)
class RecordAccuracy:
    """The outcome of one zsRE record; each share is in [0, 1].

    Args:
        case_id: The record's number.
        ea: Efficacy accuracy: share of the new answer's tokens that are the most probable ones at the question, each
            after those before it (teacher forcing).
        pa: Paraphrase accuracy: the same at the rephrased questions, averaged over them; None if there are none.
        na: Neighbourhood accuracy: the same of the unrelated questions' own answers; None if there are none.
    """

    case_id: int
    ea: float
    pa: float | None
    na: float | None

    def as_dict(self) -> dict[str, Any]:
        """The accuracies for a JSON file."""
        return {"case_id": self.case_id, "ea": self.ea, "pa": self.pa, "na": self.na}


@dataclass(frozen=True)
class Accuracies:
    """The accuracies of a set of records, in percent; None where no record has such questions.

    Args:
        ea: Efficacy accuracy, the mean of the records' `ea`.
        pa: Paraphrase accuracy, the mean over the records that have rephrased questions.
        na: Neighbourhood accuracy, the mean over the records that have unrelated questions.
        a: Harmonic mean of the three; 0 if one of them is 0, None if one of them is None.
    """

    ea: float
    pa: float | None
    na: float | None
    a: float | None

    def as_dict(self) -> dict[str, float | None]:
        """The four accuracies by name."""
        return {"ea": self.ea, "pa": self.pa, "na": self.na, "a": self.a}


def accuracy_record(
    case_id: int,
    rewrite: Sequence[bool],
    paraphrases: Iterable[Sequence[bool]] = (),
    neighbourhood: Iterable[Sequence[bool]] = (),
) -> RecordAccuracy:
    """Judge one record by which tokens of its answers the model finds.

    Args:
        case_id: The record's number, for errors and for the result.
        rewrite: For each token of the new answer whether it is the most probable one.
        paraphrases: The same at each rephrased question.
        neighbourhood: The same of each unrelated question's own answer.

    Raises:
        BadData: An answer has no token.
    """
    return RecordAccuracy(
        case_id,
        ea=_share(case_id, "the question", rewrite),
        pa=mean([_share(case_id, "a rephrased question", tokens) for tokens in paraphrases]),
        na=mean([_share(case_id, "an unrelated question", tokens) for tokens in neighbourhood]),
    )


def summarise_accuracy(records: Iterable[RecordAccuracy]) -> Accuracies:
    """Average the accuracies over records, each of which counts once.

    Raises:
        BadData: There is no record.
    """
    judged = list(records)
    ea = mean([record.ea for record in judged])
    if ea is None:
        raise BadData("There is no record to average accuracies over; evaluate at least one.")
    pa = mean([record.pa for record in judged if record.pa is not None])
    na = mean([record.na for record in judged if record.na is not None])
    return Accuracies(100 * ea, percent(pa), percent(na), percent(harmonic_mean([ea, pa, na])))


def _share(case_id: int, where: str, tokens: Sequence[bool]) -> float:
    share = mean([float(found) for found in tokens])
    if share is None:
        raise BadData(f"The answer to {where} of case {case_id} has no token; give a word.")
    return share
