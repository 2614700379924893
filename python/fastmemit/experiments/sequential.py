"""Sequential editing: batch on batch into the same weights, scored over all that was written.

The tables of arXiv 2506.04226 give the unedited weights back after every batch.  Here nothing is
given back until the end, and the question is what becomes of the earlier facts: with a second moment of few keys, and
with or without the keys of the earlier edits among the preserved ones.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, TypedDict

from fastcov.errors import NonFiniteKeys, NonFiniteMatrix
from fastmemit.data import Record
from fastmemit.editor import Editor
from fastmemit.errors import BadConfig, BadData, DamagedFile, FastmemitError, WrongModel
from fastmemit.evaluation.scores import RecordScore, ScoreTable, score_records
from fastmemit.experiments.cell import scored_or_failed, table_of
from fastmemit.experiments.header import as_published
from fastmemit.experiments.intervals import SCORES, SHARES
from fastmemit.methods import PRESERVING, EditConfig, PreservedKeys, ReadCache
from fastmemit.request import check_batch
from fastmemit.tokens import request_rows

log = logging.getLogger(__name__)


class StepRecord(TypedDict):
    """One fact of a step; shares in [0, 1], None where the record has no such prompts."""

    case_id: int
    batch: int  # counted from 0
    before: dict[str, float | None]  # es, ps, ns, ea, pa, na of the unedited model
    after: dict[str, float | None]  # of the model as it is now


class Step(TypedDict):
    """The state of a run after some batches; scores in percent, over all facts so far."""

    edits: int  # batches so far
    facts: int  # records in them
    failed: int  # batches that could not be written, because the model had broken down before
    preserved: int  # keys of earlier edits that the next batch would preserve at a layer
    scores: ScoreTable  # of the model as it is now
    before: ScoreTable  # of the unedited model on the same records
    by_batch: list[ScoreTable]  # `scores` of each batch alone, the oldest first
    perplexity: float | None  # of the model as it is now; None where it was not asked for
    records: list[StepRecord]  # of all facts so far; earlier versions wrote none


def check_step(place: str, line: Mapping[str, Any]) -> None:
    """Refuse what is no line of a file of steps: a `Step`, its multiplier and whether it preserves.

    Args:
        place: The line, for the message.
        line: A JSON object.

    Raises:
        DamagedFile: A field is missing or is something else.
    """
    kinds: dict[str, Callable[[Any], bool]] = {
        **dict.fromkeys(("edits", "facts", "failed"), _is_count),
        **dict.fromkeys(("scores", "before"), _is_table),
        # The exponential of a mean cost, which is never below 0.
        "perplexity": lambda found: found is None or _is_from(found, 1.0, math.inf),
        "multiplier": lambda found: found is None or (_is_from(found, 0.0, sys.float_info.max) and found > 0),
        "preserve": lambda found: isinstance(found, bool),
        "by_batch": lambda found: bool(isinstance(found, list) and found and all(map(_is_table, found))),
    }
    if "records" in line:
        kinds["records"] = lambda found: isinstance(found, list) and all(map(_is_record, found))
    for name, fits in kinds.items():
        if name not in line or not fits(line[name]):
            said = f"has {name} = {line[name]!r:.80}" if name in line else f"lacks {name}"
            raise DamagedFile(f"{place} {said}; delete the lines of its run, which is then run again.")


def _is_table(found: Any) -> bool:
    if not isinstance(found, dict):
        return False
    # Lines of earlier versions have no exact matches.
    names = ("es", "ps", "ns", "s", *(name for name in SCORES if name in found))
    return all(name in found and _is_none_or(found[name], 100.0) for name in names)


def _is_record(found: Any) -> bool:
    return (
        isinstance(found, dict)
        and type(found.get("case_id")) is int
        and all(
            isinstance(shares := found.get(when), dict)
            and all(name in shares and _is_none_or(shares[name], 1.0) for name in SHARES)
            for when in ("before", "after")
        )
    )


def _is_count(found: Any) -> bool:
    return type(found) is int and 0 <= found <= 2**53


def _is_none_or(found: Any, high: float) -> bool:
    return found is None or _is_from(found, 0.0, high)


def _is_from(found: Any, low: float, high: float) -> bool:
    """Whether it is a number in a range; a whole number in JSON has no largest, a float has."""
    if type(found) is int and abs(found) > sys.float_info.max:
        return False
    return type(found) in (int, float) and low <= found <= high


def run_sequential(
    editor: Editor,
    batches: Sequence[Sequence[Record]],
    method: str | EditConfig,
    settings: Mapping[str, Any] | None = None,
    *,
    preserve: bool,
    score_every: int = 1,
    perplexity: Callable[[], float] | None = None,
    unedited: Mapping[int, RecordScore] | None = None,
    reads: ReadCache | None = None,
    progress: Callable[[int], None] | None = None,
) -> Generator[Step]:
    """Write batches one after the other, and score after every k-th and after the last.

    Target vectors are those of the model as it is when a batch is written, with the earlier edits
    in it; contexts are those of the unedited model.  All edits are undone when the iterator ends,
    is closed or fails: the weights have their bits back, last edit first.

    Args:
        editor: The editor of an unedited model, with its statistics precomputed.
        batches: Records to be edited together, in the order in which they are written.
        method: One of `fastmemit.methods.METHODS`, or settings, see `fastmemit.Editor.plan`.
        settings: What replaces the preset's settings.
        preserve: Whether each batch preserves the keys of the earlier ones too, ``A = w C + ridge I + sum K_p K_p^T``.
        score_every: k.
        perplexity: Measures the model as it is.
        unedited: case_id -> the unedited model's score of every record, if it was taken already.
        reads: See `fastmemit.Editor.plan`; of use where the first batch is written several times.
        progress: Called with the number of records written or scored since the last call.

    Yields:
        A `Step` after each k-th batch and after the last.

    Raises:
        WrongModel: The model is edited already.
        BadConfig: `score_every` is below 1.
        BadData: There is no batch, or an empty one.
        BadRequest: A record cannot be edited, or two of a batch contradict each other.
        fastcov.StoreMissing: No statistics of the edited layers were precomputed.
    """
    if editor.edits:
        raise WrongModel("The model is edited already; undo its edits before a sequence.")
    if score_every < 1:
        raise BadConfig(f"Scores are taken after every {score_every} batches; give 1 or more.")
    if not batches or not all(batches):
        raise BadData("A sequence needs batches with at least one record each; give some.")
    config = editor.config(method, **as_published(method, settings))
    editor.statistics_for(config.layers)
    contexts = editor.contexts(config.method)  # written by the unedited model
    for batch in batches:  # refused now, not when it is their turn
        for request in check_batch([record.request for record in batch]):
            request_rows(editor.tokenizer, request, contexts)
    if unedited is None:
        records = [record for batch in batches for record in batch]
        unedited = {s.case_id: s for s in score_records(editor.adapter, editor.tokenizer, records)}
    run = _Run(editor, config, PreservedKeys() if preserve else None, reads)
    try:
        for number, batch in enumerate(batches, 1):
            run.write(batch)
            if progress is not None:
                progress(len(batch))
            if number % score_every == 0 or number == len(batches):
                yield run.step(batches[:number], unedited, perplexity)
                if progress is not None:
                    progress(sum(map(len, batches[:number])))
    finally:
        for edit in reversed(editor.edits):
            edit.undo()


class _Run:
    """A sequence while it runs."""

    def __init__(
        self, editor: Editor, config: EditConfig, preserved: PreservedKeys | None, reads: ReadCache | None
    ) -> None:
        self._editor, self._config = editor, config
        self._preserved, self._reads = preserved, reads
        self._failed = 0

    def write(self, batch: Sequence[Record]) -> None:
        """Edit one batch on top of the others."""
        requests = [record.request for record in batch]
        try:
            # Their last bits depend on what vectors are optimised beside, so that a run that was
            # interrupted may not take some from the store and make the others.
            self._editor.sources.targets(requests, self._config, together=True)
            self._editor.edit(requests, self._config, preserved=self._earlier(), reads=self._reads, verify=False)
        except (NonFiniteKeys, NonFiniteMatrix, FastmemitError) as broken:
            # Requests were checked before, so that what is left of our own errors is a target
            # whose loss is not finite.
            if not self._editor.edits:
                raise  # not the work of earlier edits
            log.warning("A batch was not written: %s", broken)
            self._failed += 1

    def _earlier(self) -> PreservedKeys | None:
        """What the next batch preserves: without a word, some methods take all earlier keys."""
        if self._preserved is None and self._config.method in PRESERVING:
            return PreservedKeys()
        return self._preserved

    def step(
        self,
        batches: Sequence[Sequence[Record]],
        unedited: Mapping[int, RecordScore],
        perplexity: Callable[[], float] | None,
    ) -> Step:
        """Score all that was written."""
        records = [record for batch in batches for record in batch]
        numbers = [number for number, batch in enumerate(batches) for _ in batch]
        scored = [
            StepRecord(
                case_id=record.case_id, batch=number, before=_shares(unedited[record.case_id]), after=_shares(score)
            )
            for record, number, score in zip(records, numbers, scored_or_failed(self._editor, records), strict=True)
        ]
        parts = [
            table_of([record["after"] for record in scored if record["batch"] == number])
            for number in range(len(batches))
        ]
        return Step(
            edits=len(batches),
            facts=len(records),
            failed=self._failed,
            preserved=0 if self._preserved is None else len(self._preserved),
            scores=table_of([record["after"] for record in scored]),
            before=table_of([record["before"] for record in scored]),
            by_batch=parts,
            perplexity=None if perplexity is None else _measured(perplexity),
            records=scored,
        )


def _shares(score: RecordScore) -> dict[str, float | None]:
    shares = score.shares()
    return {name: shares[name] for name in SHARES}


def _measured(perplexity: Callable[[], float]) -> float:
    """A perplexity; infinite for a model whose output is not finite."""
    try:
        return perplexity()
    except FastmemitError as broken:
        log.warning("%s It counts as infinite.", broken)
        return math.inf
