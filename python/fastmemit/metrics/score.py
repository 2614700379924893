"""CounterFact's scores as pure functions of negative log-likelihoods; no model is needed here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastmemit.errors import BadData


class NllPair(NamedTuple):
    """What one prompt costs with either answer: mean negative log-likelihood per token, in nats."""

    new: float  # of " " + target_new
    true: float  # of " " + target_true


@dataclass(frozen=True)
class RecordScore:
    """The outcome of one record; each share is in [0, 1].

    Args:
        case_id: The record's number.
        es: 1.0 if the rewrite prompt gives the new answer, else 0.0 (efficacy).
        ps: Share of the paraphrases that give the new answer; None if there are none.
        ns: Share of the neighbourhood prompts that keep the true answer; None if there are none.
        rewrite: The costs behind `es`.
        paraphrases: The costs behind `ps`.
        neighbourhood: The costs behind `ns`.
    """

    case_id: int
    es: float
    ps: float | None
    ns: float | None
    rewrite: NllPair
    paraphrases: tuple[NllPair, ...] = ()
    neighbourhood: tuple[NllPair, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The score for a JSON file; a pair becomes ``[new, true]``, a cost without bound None."""

        def pair(costs: NllPair) -> list[float | None]:
            return [cost if math.isfinite(cost) else None for cost in costs]

        return {
            "case_id": self.case_id,
            "es": self.es,
            "ps": self.ps,
            "ns": self.ns,
            "nll": {
                "rewrite": pair(self.rewrite),
                "paraphrases": [pair(costs) for costs in self.paraphrases],
                "neighbourhood": [pair(costs) for costs in self.neighbourhood],
            },
        }


@dataclass(frozen=True)
class Scores:
    """The scores of a set of records, in percent; None where no record has such prompts.

    Args:
        es: Efficacy score, the mean of the records' `es`.
        ps: Paraphrase score, the mean over the records that have paraphrases.
        ns: Neighbourhood score, the mean over the records that have neighbourhood prompts.
        s: Harmonic mean of the three; 0 if one of them is 0, None if one of them is None.
    """

    es: float
    ps: float | None
    ns: float | None
    s: float | None

    def as_dict(self) -> dict[str, float | None]:
        """The four scores by name."""
        return {"es": self.es, "ps": self.ps, "ns": self.ns, "s": self.s}


def score_record(
    case_id: int,
    rewrite: Sequence[float],
    paraphrases: Iterable[Sequence[float]] = (),
    neighbourhood: Iterable[Sequence[float]] = (),
) -> RecordScore:
    """Judge one record by the costs of its prompts.

    A rewrite prompt or paraphrase succeeds when NLL(new) < NLL(true), a neighbourhood prompt when
    NLL(true) < NLL(new). Both are strict: a tie is a failure, so a model that has collapsed to one
    output for everything scores nothing.

    Args:
        case_id: The record's number, for errors and for the result.
        rewrite: ``(NLL(new), NLL(true))`` of the rewrite prompt, mean per token, in nats.
        paraphrases: The same of each paraphrase.
        neighbourhood: The same of each neighbourhood prompt, in the same order: new, then true.

    Raises:
        BadData: A cost is NaN.
    """
    asked = _pair(case_id, "the rewrite prompt", rewrite)
    said_otherwise = tuple(
        _pair(case_id, f"paraphrase {index}", costs) for index, costs in enumerate(paraphrases)
    )
    nearby = tuple(
        _pair(case_id, f"neighbourhood prompt {index}", costs)
        for index, costs in enumerate(neighbourhood)
    )
    return RecordScore(
        case_id,
        es=float(asked.new < asked.true),
        ps=_mean([float(costs.new < costs.true) for costs in said_otherwise]),
        ns=_mean([float(costs.true < costs.new) for costs in nearby]),
        rewrite=asked,
        paraphrases=said_otherwise,
        neighbourhood=nearby,
    )


def summarise(records: Iterable[RecordScore]) -> Scores:
    """Average the scores over records, so that each record counts once however many prompts it has.

    Raises:
        BadData: There is no record.
    """
    scored = list(records)
    es = _mean([record.es for record in scored])
    if es is None:
        raise BadData("There is no record to average scores over; evaluate at least one.")
    ps = _mean([record.ps for record in scored if record.ps is not None])
    ns = _mean([record.ns for record in scored if record.ns is not None])
    return Scores(
        100 * es,
        None if ps is None else 100 * ps,
        None if ns is None else 100 * ns,
        None if ps is None or ns is None else 100 * harmonic_mean((es, ps, ns)),
    )


def harmonic_mean(values: Sequence[float]) -> float:
    """``n / sum(1 / value)`` of values >= 0; 0 if one of them is 0, which is its limit."""
    if any(value == 0 for value in values):
        return 0.0
    return len(values) / math.fsum(1 / value for value in values)


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _pair(case_id: int, prompt: str, costs: Sequence[float]) -> NllPair:
    new, true = (float(cost) for cost in costs)
    for name, cost in (("target_new", new), ("target_true", true)):
        if math.isnan(cost):
            raise BadData(
                f"The negative log-likelihood of {name} at {prompt} of case {case_id} is NaN, so "
                "the model's output is broken; run it in float32, or undo the edit that broke it."
            )
    return NllPair(new, true)
