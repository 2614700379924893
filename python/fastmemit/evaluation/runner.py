"""The protocol of the tables: edit a batch, score it, give the weights back, go on."""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypedDict, cast

from fastmemit.data import Record, ZsreRecord
from fastmemit.data.records import Asked
from fastmemit.display import bar, data_frame, html_table
from fastmemit.editor import Editor
from fastmemit.errors import BadConfig, BadData, WrongModel
from fastmemit.evaluation.generation import (
    RecordGeneration,
    References,
    check_generations,
    generate_records,
    summarise_generation,
)
from fastmemit.evaluation.perplexity import PerplexityText, before_and_after, edited_nll, perplexity
from fastmemit.evaluation.scores import (
    ACCURACIES,
    ALL,
    RecordAccuracy,
    RecordScore,
    count_questions,
    judge_probes,
    judge_zsre,
    portability,
    score_records,
    summarise,
)
from fastmemit.methods import EditConfig, ReadCache
from fastmemit.request import joined_answer
from fastmemit.statistics import versions
from fastmemit.text import chat_request, chat_text, encode

_MORE = 4  # tokens beyond those of the longest new answer that an own answer may take

#: What can be asked for. The first three are read from the same answers.
METRICS = ("score", "magnitude", "accuracy", "attributes", "generation")


class RecordResult(TypedDict):
    """One record before and after the edit of its batch.

    Shares of CounterFact: those of `RecordScore`, and nll: [new, true] of each prompt; of zsRE: those of
    `RecordAccuracy`; "generation" with ge in bits, rs as a share and the texts if it was asked for.
    """

    case_id: int
    batch: int  # counted from 0
    before: dict[str, Any]
    after: dict[str, Any]


class Result(dict[str, Any]):
    """Everything that an evaluation found, as a dictionary (``fastmemit evaluate --json``).

    * ``before``, ``after``: `table` of the unedited and the edited model, on the same records.
    * ``records``: a `RecordResult` for each.
    * ``portability``: what follows from the edits, see `fastmemit.evaluation.scores.portability`; None where no record
      has such questions.
    * ``perplexity``: `Perplexity`, or None where it was not asked for.
    * ``settings``: those of the method, the batches, the model and the statistics.
    * ``seconds``: wall time by stage.
    * ``versions``: of the libraries.
    """

    def rows(self) -> list[dict[str, Any]]:
        """A line for each score: before, after and the change, in percent; perplexity last."""
        table = {name: (self["before"][name], value) for name, value in self["after"].items() if value is not None}
        if self["perplexity"] is not None:
            table["perplexity"] = (self["perplexity"]["before"], self["perplexity"]["after"])
        return [
            {"score": name, "before": old, "after": new, "change": None if old is None else new - old}
            for name, (old, new) in table.items()
        ]

    def to_pandas(self) -> Any:
        """A pandas data frame with a row for each record: its shares before and after, such as ``ps_after``."""
        return data_frame(
            {
                "case_id": record["case_id"],
                "batch": record["batch"],
                **{
                    f"{name}_{when}": share
                    for when in ("before", "after")
                    for name, share in record[when].items()
                    if name in (*ALL, *ACCURACIES)
                },
            }
            for record in self["records"]
        )

    def __repr__(self) -> str:
        scores = (f"{row['score'].upper()} {row['after']:.1f}" for row in self.rows())
        return f"<Result: {len(self['records'])} records edited, {', '.join(scores)}; to_pandas() has them one by one>"

    def _repr_html_(self) -> str:
        return html_table(self.rows())


class Measured(NamedTuple):
    """One record's measures."""

    answers: RecordScore | RecordAccuracy
    written: RecordGeneration | None = None

    def shown(self) -> dict[str, Any]:
        """As in the result file; the record's number stands beside it there."""
        row = {name: value for name, value in self.answers.as_dict().items() if name != "case_id"}
        return row if self.written is None else {**row, "generation": self.written.as_dict()}


@dataclass(frozen=True)
class Measures:
    """Which measures are taken."""

    attributes: bool = False  # ask CounterFact's attribute prompts too
    generation: bool = False  # continue the openings, sampled with the editor's seed
    references: References | None = None  # texts to compare these with

    @classmethod
    def of(cls, metrics: Iterable[str], references: References | None = None) -> Measures:
        """The measures with these names; BadConfig for an unknown one, and for references without generation."""
        wanted = list(metrics)
        for name in wanted:
            if name not in METRICS:
                raise BadConfig(f"There is no metric {name!r}; choose from {', '.join(METRICS)}.")
        if references is not None and "generation" not in wanted:
            raise BadConfig(
                "References are compared with generated text; ask for the metric generation too, or name no references."
            )
        return cls("attributes" in wanted, "generation" in wanted, references)

    def check(self, records: Sequence[Record]) -> None:
        """See, before any work, that the records are of one kind and have what is asked for; else BadData."""
        zsre = sum(isinstance(record, ZsreRecord) for record in records)
        if 0 < zsre < len(records):
            raise BadData(
                f"{zsre} of {len(records)} records are zsRE's, the others CounterFact's, and their scores are not the "
                "same; evaluate them apart."
            )
        if zsre and (self.attributes or self.generation):
            raise BadData("zsRE has neither attribute nor generation prompts; leave these metrics out.")
        if self.attributes and not any(record.attributes for record in records):
            raise BadData(
                "No record has attribute_prompts; give CounterFact in its full schema, or leave out the metric "
                "attributes."
            )
        if self.generation:
            check_generations(records, self.references)

    def take(self, editor: Editor, records: Sequence[Record], what: str, progress: bool) -> list[Measured]:
        """Measure the editor's model as it is now on checked records, with a progress bar of that name."""
        model = (editor.adapter, editor.tokenizer)
        with bar(what, count_questions(records, self.attributes), progress) as advance:
            if records and isinstance(records[0], ZsreRecord):
                zsre = cast(Sequence[ZsreRecord], records)
                return [Measured(a) for a in judge_zsre(*model, zsre, progress=advance)]
            scores = score_records(*model, records, attributes=self.attributes, progress=advance)
        if not self.generation:
            return [Measured(score) for score in scores]
        openings = sum(len(record.generations) for record in records)
        with bar(f"{what}: texts", openings, progress) as advance:
            written = generate_records(
                editor.model, editor.tokenizer, records, references=self.references, seed=editor.seed, progress=advance
            )
        return [Measured(*pair) for pair in zip(scores, written, strict=True)]


def measure_answers(editor: Editor, records: Sequence[Record]) -> list[Record]:
    """The records with an answer of the model, as it is now, for each that own facts leave open; see `load_records`.

    An answer is what greedy decoding gives, as many words as the new answer has.

    Raises:
        BadData: The model says nothing, or the new answer itself, where a score needs another one to compare it with.
    """
    places: list[tuple[int, str]] = []  # whose, and which prompt
    for number, record in enumerate(records):
        if record.request.target_true is None:
            places.append((number, record.request.text))
        pairs = zip(record.neighbourhood, record.neighbourhood_answers, strict=False)
        places += [(number, prompt) for prompt, answer in pairs if answer is None]
    wanted = [records[number].request.target_new for number, _ in places]
    longest = max((len(encode(editor.tokenizer, " " + answer.strip())) for answer in wanted), default=0)
    prompts = [prompt for _, prompt in places]
    texts = editor.generate(prompts, longest + _MORE) if places else []
    known: dict[tuple[int, str], str] = {}
    for place, text, new in zip(places, texts, wanted, strict=True):
        known[place] = answer = first_words(text, new)
        where = f"{place[1]!r:.80} of record {records[place[0]].case_id}"
        if not answer:
            raise BadData(f"The model says no word to {where}; give its own answer there.")
        if answer.casefold() == new.strip().casefold():
            raise BadData(
                f"The model says {answer!r:.40} to {where} already, unedited, which is the new answer itself, "
                "and no score can compare the two; give another answer there, or leave the prompt out."
            )
    return [
        replace(
            record,
            request=replace(
                record.request, target_true=known.get((n, record.request.text), record.request.target_true)
            ),
            neighbourhood_answers=tuple(
                known[n, prompt] if answer is None else answer
                for prompt, answer in zip(record.neighbourhood, record.neighbourhood_answers, strict=False)
            ),
        )
        for n, record in enumerate(records)
    ]


def chat_record(tokenizer: Any, record: Record) -> Record:
    """A record whose every prompt is a question in chat; see `fastmemit.text.chat_request`, also for its BadConfig."""

    def turns(prompts: Sequence[str]) -> tuple[str, ...]:
        return tuple(chat_text(tokenizer, prompt) for prompt in prompts)

    def asked(forms: Sequence[Asked]) -> tuple[Asked, ...]:
        return tuple((chat_text(tokenizer, prompt), answers) for prompt, answers in forms)

    return replace(
        record,
        request=chat_request(tokenizer, record.request),
        more=tuple(chat_request(tokenizer, fact) for fact in record.more),
        probes=tuple(
            replace(probe, asked=asked(probe.asked), conditions=asked(probe.conditions)) for probe in record.probes
        ),
        paraphrases=turns(record.paraphrases),
        neighbourhood=turns(record.neighbourhood),
        attributes=turns(record.attributes),
        generations=turns(record.generations),
    )


def first_words(text: str, like: str) -> str:
    """The beginning of a continuation: as many words as another answer has, without the marks that end a sentence.

    Where a script has no spaces, as many characters.
    """
    line = next((line for line in text.splitlines() if line.strip()), "")
    words = " ".join(line.split()[: len(like.split())])
    if any(mark.isalpha() and joined_answer(mark, "x") == "x" for mark in words):  # a script without spaces
        words = words[: len(like.strip())]
    marks = "".join({mark for mark in words if unicodedata.category(mark)[0] == "P" and mark not in "%#@&"})
    return words.strip(marks + " ")


def table(measured: Sequence[Measured]) -> dict[str, float | None]:
    """The means over records, at least one: see `summarise` and `summarise_generation`."""
    written = [one.written for one in measured if one.written is not None]
    return {**summarise(one.answers for one in measured), **(summarise_generation(written) if written else {})}


@contextmanager
def stage(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the wall time inside to a stage."""
    begun = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begun


@contextmanager
def edited(
    editor: Editor,
    batch: Sequence[Record],
    config: EditConfig,
    seconds: dict[str, float],
    reads: ReadCache | None = None,
) -> Iterator[None]:
    """Write a batch into the model inside, and take it out again; both are stages."""
    with stage(seconds, "edit"):
        edit = editor.edit([fact for record in batch for fact in record.requests], config, reads=reads, verify=False)
    try:
        yield
    finally:
        with stage(seconds, "undo"):
            edit.undo()


def evaluate(
    editor: Editor,
    batches: Sequence[Sequence[Record]],
    method: str | EditConfig,
    overrides: Mapping[str, Any] | None = None,
    *,
    metrics: Sequence[str] = ("score",),
    references: References | None = None,
    text: PerplexityText | None = None,
    perplexity_batches: int = 1,
    progress: bool = False,
) -> Result:
    """Edit and score batches of records, each on the unedited model (Table 1's protocol).

    Target vectors do not depend on the covariance nor on the batch, so those of all batches are optimised together,
    first. The editor has its statistics precomputed; for the method see `Editor.plan`. The batches are CounterFact's or
    zsRE's. Of `METRICS`, ``"attributes"`` and ``"generation"`` (compared with references, if any) ask more; the rest is
    always there. On a text perplexity is measured before, and after `perplexity_batches` of the batches at most.

    Raises:
        WrongModel: The model is edited already.
        BadConfig: A metric is unknown, references come without generation, or the text's windows are longer than the
            model takes.
        BadData: The records lack what a metric asks for.
        FastmemitError: The unedited model gives NaN for the text.
        BadRequest: A record cannot be edited, or two of a batch contradict each other.
        fastcov.FastcovError: No statistics of the edited layers were precomputed.
    """
    if editor.edits:
        raise WrongModel("The model is edited already; undo its edits before an evaluation.")
    measures = Measures.of(metrics, references)
    config = editor.config(method, **(overrides or {}))
    statistics = editor.store.needed(config)
    records = [record for batch in batches for record in batch]
    measures.check(records)
    seconds: dict[str, float] = {}
    with stage(seconds, "before"):
        before = measures.take(editor, records, "unedited scores", progress)
        model = (editor.adapter, editor.tokenizer)
        counted = judge_probes(*model, records, conditions=True)
        answered = judge_probes(*model, records)
    unedited, costs = None, []
    if text is not None:
        with stage(seconds, "perplexity"):
            unedited = perplexity(editor.adapter, text)
    with stage(seconds, "targets"):
        editor.targets([fact for record in records for fact in record.requests], config)
    after: list[Measured] = []
    follows: list[tuple[bool, ...]] = []
    with bar("edited batches", len(batches), progress) as advance:
        for number, batch in enumerate(batches):
            with edited(editor, batch, config, seconds):
                with stage(seconds, "after"):
                    after += measures.take(editor, batch, "edited scores", False)
                    follows += judge_probes(*model, batch)
                if text is not None and number < perplexity_batches:
                    with stage(seconds, "perplexity"):
                        costs.append(edited_nll(editor.adapter, text))
            advance(1)
    numbers = [index for index, batch in enumerate(batches) for _ in batch]
    return Result(
        before=table(before),
        after=table(after),
        records=[
            RecordResult(case_id=record.case_id, batch=number, before=b.shown(), after=a.shown())
            for record, number, b, a in zip(records, numbers, before, after, strict=True)
        ],
        portability=portability(records, counted, answered, follows) or None,
        perplexity=before_and_after(unedited, costs) if unedited is not None and costs else None,
        settings={
            **statistics.resolved(editor.adapter, config).as_dict(),
            "batches": [len(batch) for batch in batches],
            "metrics": list(metrics),
            "text": None if text is None else {"name": text.name, "sha256": text.sha256, "tokens": len(text.ids)},
            "seed": editor.seed,
            "model": editor.name,
            "fingerprint": editor.fingerprint,
            "dtype": str(editor.model.dtype).removeprefix("torch."),
            "device": str(editor.adapter.device),
            "statistics": dict(statistics.provenance),
        },
        seconds={name: round(value, 3) for name, value in seconds.items()},
        versions=versions(),
    )
