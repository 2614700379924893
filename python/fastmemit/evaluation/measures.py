"""What an evaluation asks of a model: the measures of its records, and their table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from fastmemit.data import Record
from fastmemit.data.zsre import ZsreRecord
from fastmemit.editor import Editor
from fastmemit.errors import BadConfig, BadData
from fastmemit.evaluation.counterfact import count_questions, score_records
from fastmemit.evaluation.generation import check_generations, generate_records
from fastmemit.evaluation.references import References
from fastmemit.evaluation.zsre import count_zsre_questions, judge_zsre
from fastmemit.metrics import (
    RecordAccuracy,
    RecordGeneration,
    RecordScore,
    summarise,
    summarise_accuracy,
    summarise_generation,
)
from fastmemit.progress import bar

#: What can be asked for. The first three are read from the same answers.
METRICS = ("score", "magnitude", "accuracy", "attributes", "generation")


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
    """Which measures are taken.

    Args:
        attributes: Ask CounterFact's attribute prompts too.
        generation: Continue the openings, sampled with the editor's seed.
        references: Texts to compare these with.
    """

    attributes: bool = False
    generation: bool = False
    references: References | None = None

    @classmethod
    def of(cls, metrics: Iterable[str], references: References | None = None) -> Measures:
        """The measures with these names.

        Raises:
            BadConfig: A name is unknown, or references come without generation.
        """
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
        """See that the records have what is asked for, before any work is done.

        Raises:
            BadData: zsRE and CounterFact records are mixed, or a prompt or a text is missing.
        """
        zsre = sum(isinstance(record, ZsreRecord) for record in records)
        if 0 < zsre < len(records):
            raise BadData(
                f"{zsre} of {len(records)} records are zsRE's, the others CounterFact's, and their "
                "scores are not the same; evaluate them apart."
            )
        if zsre and (self.attributes or self.generation):
            raise BadData("zsRE has neither attribute nor generation prompts; leave these metrics out.")
        if self.attributes and not any(record.attributes for record in records):
            raise BadData(
                "No record has attribute_prompts; give CounterFact in its full schema, or leave "
                "out the metric attributes."
            )
        if self.generation:
            check_generations(records, self.references)

    def take(self, editor: Editor, records: Sequence[Record], what: str, progress: bool) -> list[Measured]:
        """Measure the editor's model as it is now.

        Args:
            editor: The editor.
            records: The records, checked.
            what: What the progress bar is called.
            progress: Show a bar.
        """
        model = (editor.adapter, editor.tokenizer)
        if records and isinstance(records[0], ZsreRecord):
            questions = cast(Sequence[ZsreRecord], records)
            with bar(what, count_zsre_questions(questions), progress) as advance:
                return [Measured(a) for a in judge_zsre(*model, questions, progress=advance)]
        with bar(what, count_questions(records, self.attributes), progress) as advance:
            scores = score_records(*model, records, attributes=self.attributes, progress=advance)
        if not self.generation:
            return [Measured(score) for score in scores]
        openings = sum(len(record.generations) for record in records)
        with bar(f"{what}: texts", openings, progress) as advance:
            written = generate_records(
                editor.model, editor.tokenizer, records, references=self.references, seed=editor.seed, progress=advance
            )
        return [Measured(*pair) for pair in zip(scores, written, strict=True)]


def table(measured: Sequence[Measured]) -> dict[str, float | None]:
    """The means over records: `FullScoreTable`, with `GenerationTable`, or `AccuracyTable`.

    Raises:
        BadData: There is no record.
    """
    answers = [one.answers for one in measured]
    if answers and isinstance(answers[0], RecordAccuracy):
        return summarise_accuracy(cast(list[RecordAccuracy], answers)).as_dict()
    scores = summarise(cast(list[RecordScore], answers)).as_dict()
    written = [one.written for one in measured if one.written is not None]
    return {**scores, **summarise_generation(written).as_dict()} if written else scores
