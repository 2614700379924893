"""One cell of a sweep: its batches edited, scored and taken out again, one after the other."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

from fastmemit.activations import ReadCache
from fastmemit.data import Corpus, Record
from fastmemit.editor import Editor
from fastmemit.errors import BadData
from fastmemit.evaluation.perplexity import PerplexityResult, PerplexityText, before_and_after, edited_nll
from fastmemit.evaluation.scores import Exact, NllPair, RecordScore, ScoreTable, score_records
from fastmemit.experiments.folders import score_means
from fastmemit.experiments.grid import Place
from fastmemit.experiments.header import as_published, hardware
from fastmemit.experiments.schema import Cell, CellRecord, Sweep, Timing
from fastmemit.experiments.statistics import FULL_KEYS
from fastmemit.statistics import Statistics, versions

log = logging.getLogger(__name__)


@dataclass
class SweepInputs:
    """What a sweep runs on.

    Attributes:
        records: Where batches are dealt from.
        corpus: Where the statistics come from.
        folder: Where the results go.
        header: What all cells share, as ``sweep.json`` has it.
        full_keys: Of the full precompute, if the corpus has so many.
        max_length: Cut documents at so many tokens.
        text: What perplexity is measured on; None measures none.
        perplexity_batches: After how many of a cell's batches, at most.
    """

    records: Sequence[Record]
    corpus: Corpus
    folder: Path
    header: Sweep
    full_keys: int = FULL_KEYS
    max_length: int | None = None
    text: PerplexityText | None = None
    perplexity_batches: int = 1


@dataclass
class SweepRun:
    """What the cells of a running sweep share.

    Attributes:
        editor: Of the unedited model.
        inputs: See `SweepInputs`.
        dealt: Batch size -> batches.
        before: case_id -> the unedited model's score, as a file has it.
        unedited: The unedited model's perplexity; None where none is measured.
        reads: What edits read from the unedited weights, the same at every multiplier.
        seconds: Of the present cell, by stage.
    """

    editor: Editor
    inputs: SweepInputs
    dealt: dict[int, list[list[Record]]]
    before: dict[int, dict[str, Any]]
    unedited: PerplexityResult | None = None
    reads: ReadCache = field(default_factory=ReadCache)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the wall time inside to a stage of the present cell."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun


def run_cell(run: SweepRun, place: Place, used: Statistics, advance: Callable[[int], None]) -> tuple[Cell, Timing]:
    """Edit and score the batches of a cell, each on the unedited weights.

    Args:
        run: What the cells share.
        place: Where the cell stands.
        used: The statistics in use.
        advance: Called with the number of records done since the last call.

    Raises:
        FastcovError, FastmemitError: What can go wrong with an edit; the weights are unedited.
    """
    editor = run.editor
    config = editor.config(place.method, **as_published(place.method, dict(place.settings)))
    run.seconds = {}
    records: list[CellRecord] = []
    costs: list[float] = []
    with run.stage("factor"):
        jitter = {str(layer): value for layer, value in editor.sources.prepare(config).items()}
    for number, batch in enumerate(run.dealt[place.batch_size]):
        with run.stage("edit"):
            requests = [record.request for record in batch]
            edit = editor.edit(requests, config, reads=run.reads, verify=False)
        try:
            with run.stage("evaluate"):
                scores = scored_or_failed(editor, batch)
            if run.inputs.text is not None and number < run.inputs.perplexity_batches:
                with run.stage("perplexity"):
                    costs.append(edited_nll(editor.adapter, run.inputs.text))
        finally:
            with run.stage("undo"):
                edit.undo()
        records += [
            CellRecord(
                case_id=record.case_id, batch=number, before=_shares(run.before[record.case_id]), after=score.shares()
            )
            for record, score in zip(batch, scores, strict=True)
        ]
        advance(len(batch))
    cell = Cell(
        key=place.key,
        **place.as_dict(),
        keys=used.keys,
        scores=table_of([record["after"] for record in records]),
        before=table_of([record["before"] for record in records]),
        records=records,
        perplexity=before_and_after(run.unedited, costs) if run.unedited and costs else None,
        jitter=jitter,
    )
    timing = Timing(
        key=place.key,
        seconds={name: round(value, 3) for name, value in run.seconds.items()},
        hardware=hardware(editor.adapter.device),
        versions=versions(),
        finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    return cell, timing


def scored_or_failed(editor: Editor, batch: Sequence[Record]) -> list[RecordScore]:
    """Scores of edited records; a model whose output is NaN answers nothing."""
    try:
        return score_records(editor.adapter, editor.tokenizer, batch)
    except BadData as broken:
        log.warning("%s Its records count as failures.", broken)
        return [
            RecordScore(
                record.case_id,
                es=0.0,
                ps=0.0 if record.paraphrases else None,
                ns=0.0 if record.neighbourhood else None,
                rewrite=NllPair(math.inf, math.inf),
                exact=Exact(False, (False,) * len(record.paraphrases), (False,) * len(record.neighbourhood)),
            )
            for record in batch
        ]


def table_of(shares: Sequence[Mapping[str, float | None]]) -> ScoreTable:
    """The means over records, in percent."""
    means = {name: None if mean is None else 100 * mean for name, mean in score_means(shares).items()}
    return cast(ScoreTable, means)


def _shares(score: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in score.items() if name not in ("case_id", "nll")}
