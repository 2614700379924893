"""CounterFact's scores as pure functions of negative log-likelihoods; no model is needed here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastmemit.errors import BadData
from fastmemit.metrics.means import harmonic_mean, mean, percent

__all__ = ["Exact", "NllPair", "RecordScore", "Scores", "harmonic_mean", "score_record", "summarise"]


class NllPair(NamedTuple):
    """What one prompt costs with either answer: mean negative log-likelihood per token, in nats."""

    new: float  # of " " + target_new
    true: float  # of " " + target_true

    @property
    def magnitude(self) -> float:
        """``p(new) - p(true)`` with p = exp(-NLL), the geometric mean probability of a token."""
        return math.exp(-self.new) - math.exp(-self.true)


class Exact(NamedTuple):
    """Whether each prompt's wanted answer is the model's own, every token the most probable one."""

    rewrite: bool  # of target_new
    paraphrases: tuple[bool, ...] = ()  # of target_new
    neighbourhood: tuple[bool, ...] = ()  # of target_true


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
        attributes: The costs of the attribute prompts, where they were asked.
        exact: Which answers are exact, where that is known.
    """

    case_id: int
    es: float
    ps: float | None
    ns: float | None
    rewrite: NllPair
    paraphrases: tuple[NllPair, ...] = ()
    neighbourhood: tuple[NllPair, ...] = ()
    attributes: tuple[NllPair, ...] = ()
    exact: Exact | None = None

    @property
    def em(self) -> float:
        """Efficacy magnitude: ``p(new) - p(true)`` at the rewrite prompt, in [-1, 1]."""
        return self.rewrite.magnitude

    @property
    def pm(self) -> float | None:
        """Paraphrase magnitude: the mean of ``p(new) - p(true)`` over the paraphrases."""
        return mean([costs.magnitude for costs in self.paraphrases])

    @property
    def nm(self) -> float | None:
        """Neighbourhood magnitude: the mean of ``p(true) - p(new)`` over the neighbourhood."""
        return mean([-costs.magnitude for costs in self.neighbourhood])

    @property
    def ea(self) -> float | None:
        """Efficacy accuracy: 1.0 if the new answer is exact at the rewrite prompt."""
        return None if self.exact is None else float(self.exact.rewrite)

    @property
    def pa(self) -> float | None:
        """Paraphrase accuracy: share of the paraphrases at which the new answer is exact."""
        return None if self.exact is None else mean([float(x) for x in self.exact.paraphrases])

    @property
    def na(self) -> float | None:
        """Neighbourhood accuracy: share of those prompts at which the true answer is exact."""
        return None if self.exact is None else mean([float(x) for x in self.exact.neighbourhood])

    @property
    def as_(self) -> float | None:
        """Attribute score: share of the attribute prompts with NLL(new) < NLL(true)."""
        return mean([float(costs.new < costs.true) for costs in self.attributes])

    def shares(self) -> dict[str, float | None]:
        """Every score by name, as a share; None where the record has no such prompts."""
        return {
            "es": self.es,
            "ps": self.ps,
            "ns": self.ns,
            "em": self.em,
            "pm": self.pm,
            "nm": self.nm,
            "ea": self.ea,
            "pa": self.pa,
            "na": self.na,
            "as": self.as_,
        }

    def as_dict(self) -> dict[str, Any]:
        """The score for a JSON file; a pair becomes ``[new, true]``, a cost without bound None."""

        def pair(costs: NllPair) -> list[float | None]:
            return [cost if math.isfinite(cost) else None for cost in costs]

        return {
            "case_id": self.case_id,
            **self.shares(),
            "nll": {
                "rewrite": pair(self.rewrite),
                "paraphrases": [pair(costs) for costs in self.paraphrases],
                "neighbourhood": [pair(costs) for costs in self.neighbourhood],
                "attributes": [pair(costs) for costs in self.attributes],
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
        em: Efficacy magnitude, in [-100, 100] as the two others are.
        pm: Paraphrase magnitude.
        nm: Neighbourhood magnitude.
        ea: Efficacy accuracy.
        pa: Paraphrase accuracy.
        na: Neighbourhood accuracy.
        as_: Attribute score; "as" in files.
    """

    es: float
    ps: float | None
    ns: float | None
    s: float | None
    em: float | None = None
    pm: float | None = None
    nm: float | None = None
    ea: float | None = None
    pa: float | None = None
    na: float | None = None
    as_: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        """Every score by name."""
        return {"as" if name == "as_" else name: value for name, value in vars(self).items()}


def score_record(
    case_id: int,
    rewrite: Sequence[float],
    paraphrases: Iterable[Sequence[float]] = (),
    neighbourhood: Iterable[Sequence[float]] = (),
    *,
    attributes: Iterable[Sequence[float]] = (),
    exact: Exact | None = None,
) -> RecordScore:
    """Judge one record by the costs of its prompts.

    A rewrite prompt or paraphrase succeeds when NLL(new) < NLL(true), a neighbourhood prompt when NLL(true) < NLL(new).
    Both are strict: a tie is a failure, so a model that has collapsed to one output for everything scores nothing.

    Args:
        case_id: The record's number, for errors and for the result.
        rewrite: ``(NLL(new), NLL(true))`` of the rewrite prompt, mean per token, in nats.
        paraphrases: The same of each paraphrase.
        neighbourhood: The same of each neighbourhood prompt, in the same order: new, then true.
        attributes: The same of each attribute prompt.
        exact: Which wanted answers are the model's own.

    Raises:
        BadData: A cost is NaN, or `exact` is not of these prompts.
    """
    asked = _pair(case_id, "the rewrite prompt", rewrite)
    said_otherwise = _pairs(case_id, "paraphrase", paraphrases)
    nearby = _pairs(case_id, "neighbourhood prompt", neighbourhood)
    if exact is not None and (len(exact.paraphrases), len(exact.neighbourhood)) != (len(said_otherwise), len(nearby)):
        raise BadData(
            f"Case {case_id} has {len(said_otherwise)} paraphrases and {len(nearby)} neighbourhood "
            f"prompts, but exact answers of {len(exact.paraphrases)} and "
            f"{len(exact.neighbourhood)}; give one for each prompt."
        )
    return RecordScore(
        case_id,
        es=float(asked.new < asked.true),
        ps=mean([float(costs.new < costs.true) for costs in said_otherwise]),
        ns=mean([float(costs.true < costs.new) for costs in nearby]),
        rewrite=asked,
        paraphrases=said_otherwise,
        neighbourhood=nearby,
        attributes=_pairs(case_id, "attribute prompt", attributes),
        exact=exact,
    )


def summarise(records: Iterable[RecordScore]) -> Scores:
    """Average the scores over records, so that each record counts once however many prompts it has.

    Raises:
        BadData: There is no record.
    """
    shares = [record.shares() for record in records]
    if not shares:
        raise BadData("There is no record to average scores over; evaluate at least one.")
    means = {name: mean([value for row in shares if (value := row[name]) is not None]) for name in shares[0]}
    means["s"] = harmonic_mean([means["es"], means["ps"], means["ns"]])
    # "as" is a word of Python's own.
    fields: dict[str, Any] = {"as_" if name == "as" else name: percent(value) for name, value in means.items()}
    return Scores(**fields)


def _pairs(case_id: int, prompt: str, costs: Iterable[Sequence[float]]) -> tuple[NllPair, ...]:
    return tuple(_pair(case_id, f"{prompt} {index}", pair) for index, pair in enumerate(costs))


def _pair(case_id: int, prompt: str, costs: Sequence[float]) -> NllPair:
    new, true = (float(cost) for cost in costs)
    for name, cost in (("target_new", new), ("target_true", true)):
        if math.isnan(cost):
            raise BadData(
                f"The negative log-likelihood of {name} at {prompt} of case {case_id} is NaN, so "
                "the model's output is broken; run it in float32, or undo the edit that broke it."
            )
    return NllPair(new, true)
