"""CounterFact's and zsRE's scores: the questions put to a model, many records at once, and what its answers are worth.

`score_record`, `accuracy_record` and the summaries are pure functions of what a model said; `score_records` and
`judge_zsre` ask one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

from fastmemit.answers import Question, judge_answers
from fastmemit.data import Record, ZsreRecord
from fastmemit.data.records import Asked, Probe
from fastmemit.display import Described, Rows
from fastmemit.errors import BadData
from fastmemit.models import ModelAdapter
from fastmemit.request import joined_answer

SHARES = ("es", "ps", "ns", "ea", "pa", "na")  # what a record of CounterFact is scored by, each a share of its prompts
#: The scores in the order in which they are shown: S beside what it is made of.
SCORES = ("es", "ps", "ns", "s", "ea", "pa", "na")
#: Harmonic means of the others: S of CounterFact, A of zsRE.
HARMONIC = {"s": ("es", "ps", "ns"), "a": ("ea", "pa", "na")}
#: All that CounterFact's answers tell. em, pm and nm are magnitudes, in [-100, 100]: p(new) - p(true) at the rewrite
#: prompt and at the paraphrases, p(true) - p(new) at the neighbourhood prompts; "as" is the attribute prompts' score.
ALL = ("es", "ps", "ns", "s", "em", "pm", "nm", "ea", "pa", "na", "as")
#: zsRE's, per answer token, their mean, and the same of whole answers: the question and the rephrased one get the new
#: answer, the unrelated one its own.
ACCURACIES = ("ea", "pa", "na", "a", "ew", "pw", "nw")


class ScoreTable(TypedDict):
    """CounterFact's scores in percent; None where no record has such prompts."""

    es: float  # efficacy: the rewrite prompt gives the new answer
    ps: float | None  # the paraphrases give it
    ns: float | None  # the neighbourhood prompts keep the true answer
    s: float | None  # harmonic mean of the three; 0 if one of them is 0
    ea: float | None  # exact match: the wanted answer is what greedy decoding gives
    pa: float | None
    na: float | None


class NllPair(NamedTuple):
    """What one prompt costs with either answer: mean negative log-likelihood per token, in nats."""

    new: float  # of " " + target_new
    true: float  # of " " + target_true
    exact: bool | None = None  # whether the model itself says the one that is wanted, where that is known

    @property
    def magnitude(self) -> float:
        """``p(new) - p(true)`` with p = exp(-NLL), the geometric mean probability of a token."""
        return math.exp(-self.new) - math.exp(-self.true)


@dataclass(frozen=True, repr=False)
class RecordScore(Described):
    """The outcome of one record of CounterFact; each share is in [0, 1], None where there are no such prompts."""

    case_id: int
    es: float  # efficacy: 1.0 if the rewrite prompt gives the new answer
    ps: float | None  # share of the paraphrases that give the new answer
    ns: float | None  # share of the neighbourhood prompts that keep the true answer
    ea: float | None  # the same by exact match: every token of the wanted answer is the most probable one
    pa: float | None
    na: float | None
    rewrite: NllPair  # what is behind them
    paraphrases: tuple[NllPair, ...] = ()
    neighbourhood: tuple[NllPair, ...] = ()
    attributes: tuple[NllPair, ...] = ()  # of the attribute prompts, where they were asked

    def describe(self) -> str:
        """One line for people: the record and its shares."""
        return _described(self.case_id, {name: self.shares()[name] for name in SHARES})

    def shares(self) -> dict[str, float | None]:
        """Every score by name: successes, magnitudes (in [-1, 1]), exact matches and the attribute score."""
        return {
            **{name: getattr(self, name) for name in ("es", "ps", "ns")},
            "em": self.rewrite.magnitude,
            "pm": mean([costs.magnitude for costs in self.paraphrases]),
            "nm": mean([-costs.magnitude for costs in self.neighbourhood]),
            **{name: getattr(self, name) for name in ("ea", "pa", "na")},
            "as": mean([float(costs.new < costs.true) for costs in self.attributes]),
        }

    def as_dict(self) -> dict[str, Any]:
        """The score for a JSON file; a pair becomes ``[new, true]``, a cost without bound None."""

        def pair(costs: NllPair) -> list[float | None]:
            return [cost if math.isfinite(cost) else None for cost in (costs.new, costs.true)]

        groups = ("paraphrases", "neighbourhood", "attributes")
        nll = {"rewrite": pair(self.rewrite), **{name: [pair(x) for x in getattr(self, name)] for name in groups}}
        return {"case_id": self.case_id, **self.shares(), "nll": nll}


@dataclass(frozen=True, repr=False)
class RecordAccuracy(Described):
    """The outcome of one zsRE record; each share is in [0, 1], None where there are no such questions."""

    case_id: int
    ea: float  # share of the new answer's tokens that are the most probable ones, each after those before it
    pa: float | None  # the same at the rephrased questions, averaged over them
    na: float | None  # the same of the unrelated questions' own answers
    ew: float  # 1 where all of the new answer's tokens are, else 0: greedy decoding says the answer
    pw: float | None  # share of the rephrased questions at which it is
    nw: float | None  # share of the unrelated questions at which their own answers are

    def describe(self) -> str:
        """One line for people: the record and its accuracies."""
        return _described(self.case_id, self.shares())

    def shares(self) -> dict[str, float | None]:
        """The accuracies by name."""
        return {name: getattr(self, name) for name in ACCURACIES if name not in HARMONIC}

    def as_dict(self) -> dict[str, Any]:
        """The accuracies for a JSON file."""
        return {"case_id": self.case_id, **self.shares()}


def _described(case: int, shares: Mapping[str, float | None]) -> str:
    known = (f"{name.upper()} {share:.2f}" for name, share in shares.items() if share is not None)
    return f"record {case}, {', '.join(known)}"


def mean(values: Sequence[float]) -> float | None:
    """The arithmetic mean; None of nothing."""
    return math.fsum(values) / len(values) if values else None


def harmonic_mean(values: Sequence[float | None]) -> float | None:
    """``n / sum(1 / value)`` of values >= 0; None if one is None, and 0 if one is 0, which is the limit."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return 0.0 if 0 in known else len(known) / math.fsum(1 / value for value in known)


def score_means(shares: Sequence[Mapping[str, float | None]], names: Sequence[str] = SCORES) -> dict[str, float | None]:
    """Means over the records that have a share, each record once, and their harmonic means; in percent."""
    found: dict[str, float | None] = {}
    for name in names:
        if name in HARMONIC:
            found[name] = harmonic_mean([found[part] for part in HARMONIC[name]])
        else:
            found[name] = mean([share for record in shares if (share := record.get(name)) is not None])
    return {name: None if value is None else 100 * value for name, value in found.items()}


def summarise(records: Iterable[RecordScore | RecordAccuracy]) -> dict[str, float | None]:
    """Average over records of one kind, `ALL` or `ACCURACIES` in percent; each record counts once; BadData for none."""
    known = list(records)
    if not known:
        raise BadData("There is no record to average scores over; evaluate at least one.")
    names = ACCURACIES if isinstance(known[0], RecordAccuracy) else ALL
    return score_means([record.shares() for record in known], names)


def score_record(
    case_id: int,
    rewrite: Sequence[Any],
    paraphrases: Iterable[Sequence[Any]] = (),
    neighbourhood: Iterable[Sequence[Any]] = (),
    *,
    attributes: Iterable[Sequence[Any]] = (),
) -> RecordScore:
    """Judge one record of CounterFact by its prompts, each ``(NLL(new), NLL(true))`` in nats a token or an `NllPair`.

    A rewrite prompt or paraphrase succeeds when NLL(new) < NLL(true), a neighbourhood prompt when NLL(true) < NLL(new).
    Both are strict: a tie is a failure, so a model that has collapsed to one output for everything scores nothing.

    Raises:
        BadData: A cost is NaN.
    """

    def pair(prompt: str, costs: Sequence[Any]) -> NllPair:
        found = NllPair(*costs)
        for name, cost in (("target_new", found.new), ("target_true", found.true)):
            if math.isnan(cost):
                raise BadData(
                    f"The negative log-likelihood of {name} at {prompt} of case {case_id} is NaN, so the model's "
                    "output is broken; run it in float32, or undo the edit that broke it."
                )
        return found

    def pairs(prompt: str, costs: Iterable[Sequence[Any]]) -> tuple[NllPair, ...]:
        return tuple(pair(f"{prompt} {index}", each) for index, each in enumerate(costs))

    def exact(found: Iterable[NllPair]) -> float | None:
        return mean([float(each.exact) for each in found if each.exact is not None])

    asked, said_otherwise = pair("the rewrite prompt", rewrite), pairs("paraphrase", paraphrases)
    nearby = pairs("neighbourhood prompt", neighbourhood)
    return RecordScore(
        case_id,
        es=float(asked.new < asked.true),
        ps=mean([float(costs.new < costs.true) for costs in said_otherwise]),
        ns=mean([float(costs.true < costs.new) for costs in nearby]),
        ea=exact([asked]),
        pa=exact(said_otherwise),
        na=exact(nearby),
        rewrite=asked,
        paraphrases=said_otherwise,
        neighbourhood=nearby,
        attributes=pairs("attribute prompt", attributes),
    )


def accuracy_record(
    case_id: int,
    rewrite: Sequence[bool],
    paraphrases: Iterable[Sequence[bool]] = (),
    neighbourhood: Iterable[Sequence[bool]] = (),
) -> RecordAccuracy:
    """Judge one zsRE record by which tokens of its answers are most probable; BadData for an answer without any."""

    def shares(where: str, answers: Iterable[Sequence[bool]]) -> tuple[float | None, float | None]:
        """Of the tokens of each answer, and of whole answers."""
        known = [[float(token) for token in tokens] for tokens in answers]
        if not all(known):
            raise BadData(f"The answer to {where} of case {case_id} has no token; give a word.")
        return mean([math.fsum(tokens) / len(tokens) for tokens in known]), mean([min(tokens) for tokens in known])

    (ea, ew), (pa, pw), (na, nw) = (
        shares("the question", [rewrite]),
        shares("a rephrased question", paraphrases),
        shares("an unrelated question", neighbourhood),
    )
    assert ea is not None and ew is not None
    return RecordAccuracy(case_id, ea=ea, pa=pa, na=na, ew=ew, pw=pw, nw=nw)


def score_records(
    adapter: ModelAdapter,
    tokenizer: Any,
    records: Sequence[Record],
    *,
    attributes: bool = False,
    batch_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[RecordScore]:
    """Score the model, as it is now, on the rewrite, paraphrase and neighbourhood prompts of CounterFact.

    With `attributes` on the attribute prompts too, which are as many again in CounterFact. `batch_tokens` is that of
    `judge_answers`; `progress` is called with the number of questions done since its last call, of `count_questions`.

    Raises:
        BadData: A record has no true answer.
    """
    questions: list[Question] = []
    for record in records:
        for prompt, other in _asked(record, attributes):
            if other is None:
                raise BadData(
                    f"Record {record.case_id} has no true answer to {prompt!r:.80}, which scores compare with; add it."
                )
            questions += [
                (prompt, record.request.answer_to(prompt, each)) for each in (record.request.target_new, other)
            ]
    judged = iter(judge_answers(adapter, tokenizer, questions, batch_tokens=batch_tokens, progress=progress))

    def take(prompts: Sequence[str], *, keep: bool = False) -> list[NllPair]:  # the true answer is wanted, or the new
        pairs = [(next(judged), next(judged)) for _ in prompts]
        return [NllPair(new.nll, true.nll, (true if keep else new).exact) for new, true in pairs]

    scores = [
        score_record(
            record.case_id,
            take([record.request.text])[0],
            take(record.paraphrases),
            take(record.neighbourhood, keep=True),
            attributes=take(record.attributes if attributes else ()),
        )
        for record in records
    ]
    return Rows(scores, _columns)


def count_questions(records: Sequence[Record], attributes: bool = False) -> int:
    """How many questions `score_records`, which asks two for each prompt, or `judge_zsre` asks."""
    return sum(
        len(_zsre_questions(each)) if isinstance(each, ZsreRecord) else 2 * len(_asked(each, attributes))
        for each in records
    )


def _asked(record: Record, attributes: bool) -> list[tuple[str, str | None]]:
    """The prompts of a record, each with the answer that the new one is compared with."""
    true = record.request.target_true
    own = record.neighbourhood_answers or [true] * len(record.neighbourhood)
    related = record.attributes if attributes else ()
    return [
        *((prompt, true) for prompt in (record.request.text, *record.paraphrases)),
        *zip(record.neighbourhood, own, strict=True),
        *((prompt, true) for prompt in related),
    ]


def judge_probes(
    adapter: ModelAdapter, tokenizer: Any, records: Sequence[Record], *, conditions: bool = False
) -> list[tuple[bool, ...]]:
    """Which questions about what follows from an edit the model, as it is now, answers; of each record, in its order.

    A form is answered if greedy decoding gives one of its answers after a space. With `conditions` instead: whether all
    conditions of a question are, which is to be asked of the unedited model.
    """
    forms = [[probe.conditions if conditions else probe.asked for probe in record.probes] for record in records]
    questions = [
        (prompt, joined_answer(prompt, answer))
        for record in forms
        for probe in record
        for prompt, answers in probe
        for answer in answers
    ]
    judged = iter(judge_answers(adapter, tokenizer, questions))

    def answered(probe: Probe, asked: Sequence[Asked]) -> bool:
        found = [any([next(judged).exact for _ in answers]) for _, answers in asked]
        return all(found) if conditions or probe.every else any(found)

    return [
        tuple(answered(probe, asked) for probe, asked in zip(record.probes, each, strict=True))
        for record, each in zip(records, forms, strict=True)
    ]


def portability(
    records: Sequence[Record],
    counted: Sequence[Sequence[bool]],
    before: Sequence[Sequence[bool]],
    after: Sequence[Sequence[bool]],
) -> dict[str, dict[str, float | None]]:
    """By kind of question: how many there are, how many count, and the share in percent of these that is answered.

    `counted`, `before` and `after` are what `judge_probes` says of each record.
    """
    found: dict[str, list[tuple[bool, bool, bool]]] = {}
    for record, *answers in zip(records, counted, before, after, strict=True):
        for probe, *one in zip(record.probes, *answers, strict=True):
            found.setdefault(probe.kind, []).append((one[0], one[1], one[2]))
    table: dict[str, dict[str, float | None]] = {}
    for kind, all_of_it in found.items():
        count = [one for one in all_of_it if one[0]]
        shares = {
            when: None if not count else 100 * sum(one[place] for one in count) / len(count)
            for when, place in (("before", 1), ("after", 2))
        }
        table[kind] = {"questions": len(all_of_it), "counted": len(count), **shares}
    return table


def judge_zsre(
    adapter: ModelAdapter,
    tokenizer: Any,
    records: Sequence[ZsreRecord],
    *,
    batch_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[RecordAccuracy]:
    """Which tokens of zsRE's answers the model finds, as it is now, under teacher forcing; else as `score_records`."""
    questions = [question for record in records for question in _zsre_questions(record)]
    judged = iter(judge_answers(adapter, tokenizer, questions, batch_tokens=batch_tokens, progress=progress))

    def take(prompts: Sequence[str]) -> list[tuple[bool, ...]]:
        return [next(judged).matches for _ in prompts]

    found = [
        accuracy_record(record.case_id, next(judged).matches, take(record.paraphrases), take(record.neighbourhood))
        for record in records
    ]
    return Rows(found, _columns)


def _columns(score: RecordScore | RecordAccuracy) -> dict[str, Any]:
    return {"case_id": score.case_id, **score.shares()}


def _zsre_questions(record: ZsreRecord) -> list[Question]:
    asked = [record.request.text, *record.paraphrases]
    unrelated = zip(record.neighbourhood, record.neighbourhood_answers, strict=True)
    return [
        *((text, record.request.answer_to(text, record.request.target_new)) for text in asked),
        *((prompt, " " + str(answer).strip()) for prompt, answer in unrelated),
    ]
