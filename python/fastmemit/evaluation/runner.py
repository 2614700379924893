"""The protocol of the tables: edit a batch, score it, give the weights back, go on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fastmemit.data import Record
from fastmemit.editor import Editor
from fastmemit.editors import EditConfig
from fastmemit.errors import WrongModel
from fastmemit.evaluation.measures import Measured, Measures, table
from fastmemit.evaluation.perplexity import PerplexityText, before_and_after, edited_nll, perplexity
from fastmemit.evaluation.references import References
from fastmemit.evaluation.schema import RecordResult, Result
from fastmemit.factors import resolved
from fastmemit.progress import bar
from fastmemit.statistics import versions


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
    first.

    Args:
        editor: The editor of an unedited model, with its statistics precomputed.
        batches: Records to be edited together, batch by batch; CounterFact's or zsRE's.
        method: One of `fastmemit.editors.METHODS`, or settings, see `Editor.plan`.
        overrides: Settings that replace the preset's.
        metrics: ``"attributes"`` asks the attribute prompts too, ``"generation"`` continues the openings; the rest of
            `METRICS` is read from the same answers and always there.
        references: Texts to compare generated ones with.
        text: What perplexity is measured on, before and after; None measures none.
        perplexity_batches: After how many of the batches, at most.
        progress: Show a bar for each stage.

    Raises:
        WrongModel: The model is edited already.
        BadConfig: A metric is unknown, references come without generation, or the text's windows are longer than the
            model takes.
        BadData: The records lack what a metric asks for.
        FastmemitError: The unedited model gives NaN for the text.
        BadRequest: A record cannot be edited, or two of a batch contradict each other.
        fastcov.StoreMissing: No statistics of the edited layers were precomputed.
    """
    if editor.edits:
        raise WrongModel("The model is edited already; undo its edits before an evaluation.")
    measures = Measures.of(metrics, references)
    config = editor.config(method, **(overrides or {}))
    statistics = editor.statistics_for(config.layers)
    records = [record for batch in batches for record in batch]
    measures.check(records)
    seconds: dict[str, float] = {}
    with _stage(seconds, "before"):
        before = measures.take(editor, records, "unedited scores", progress)
    unedited, costs = None, []
    if text is not None:
        with _stage(seconds, "perplexity"):
            unedited = perplexity(editor.adapter, text)
    with _stage(seconds, "targets"):
        editor.targets([record.request for record in records], config)
    after: list[Measured] = []
    with bar("edited batches", len(batches), progress) as advance:
        for number, batch in enumerate(batches):
            with _stage(seconds, "edit"):
                requests = [record.request for record in batch]
                edit = editor.edit(requests, config, verify=False)
            try:
                with _stage(seconds, "after"):
                    after += measures.take(editor, batch, "edited scores", False)
                if text is not None and number < perplexity_batches:
                    with _stage(seconds, "perplexity"):
                        costs.append(edited_nll(editor.adapter, text))
            finally:
                with _stage(seconds, "undo"):
                    edit.undo()
            advance(1)
    numbers = [index for index, batch in enumerate(batches) for _ in batch]
    return Result(
        before=table(before),
        after=table(after),
        records=[
            RecordResult(case_id=record.case_id, batch=number, before=b.shown(), after=a.shown())
            for record, number, b, a in zip(records, numbers, before, after, strict=True)
        ],
        perplexity=before_and_after(unedited, costs) if unedited is not None and costs else None,
        settings={
            **resolved(editor.adapter, statistics, config).as_dict(),
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


@contextmanager
def _stage(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the wall time inside to a stage."""
    begun = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begun
