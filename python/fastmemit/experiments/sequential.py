"""Sequential editing: batch on batch into the same weights, scored over all that was written.

The tables of arXiv 2506.04226 give the unedited weights back after every batch. Here nothing is given back until the
end, and the question is what becomes of the earlier facts: with a second moment of few keys, and with or without the
keys of the earlier edits among the preserved ones.

``sequential.jsonl`` has a line for each step of each run, and nothing that differs from time to time;
``sequential-timings.jsonl`` says how long each run took, and where. A sequence cannot be taken up in its middle, since
its weights are gone, so a run that was killed begins again; those that were finished stay.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastcov.errors import NonFinite
from fastmemit.data import Record
from fastmemit.display import Rows, bar
from fastmemit.editor import Editor
from fastmemit.errors import BadConfig, BadData, FastmemitError, WrongModel
from fastmemit.evaluation.generation import check_generations, generate_records
from fastmemit.evaluation.perplexity import perplexity
from fastmemit.evaluation.scores import SHARES, score_records
from fastmemit.experiments import results
from fastmemit.experiments.results import Inputs, Step, as_published
from fastmemit.experiments.sweep import (
    multiplier_name,
    precompute_multipliers,
    scored_or_failed,
    table_of,
    unedited_scores,
)
from fastmemit.methods import PRESERVING, PreservedKeys, ReadCache, TargetConfig
from fastmemit.methods.config import config_class
from fastmemit.request import EditRequest, check_batch
from fastmemit.targets import Target
from fastmemit.text import request_rows

log = logging.getLogger(__name__)

_EDITED = "The model is edited already; undo its edits before a sequence."


@dataclass(frozen=True)
class Plan:
    """Which sequences are run."""

    batches: Sequence[Sequence[Record]]  # records to be edited together, in the order in which they are written
    method: str  # one of `fastmemit.methods.METHODS`
    settings: Mapping[str, Any] = field(default_factory=dict)  # what replaces the preset's settings
    multipliers: Sequence[float | None] = (10.0,)  # in ascending order; None, which comes last, is the full precompute
    earlier_keys: Sequence[bool] = (True, False)  # with the keys of earlier edits preserved, without, or both
    score_every: int = 1  # after how many batches scores are taken
    targets: Literal["edited", "unedited"] = "edited"  # of which model: as it is when a batch is written, or before all
    generations: int = 0  # of how many of the first records the openings are continued, for `Step.entropy`

    def runs(self) -> dict[str, tuple[float | None, bool]]:
        """Multiplier, and whether edit keys are preserved, by name, such as ``memit/b16x10/x2/preserved``."""
        place = f"{self.method}/b{max(map(len, self.batches))}x{len(self.batches)}"
        ending = "" if self.targets == "edited" else "+unedited"
        solves = issubclass(config_class(self.method), TargetConfig)  # with keys to be preserved
        return {
            f"{place}/{multiplier_name(multiplier)}/{'preserved' if preserve else 'plain'}{ending}": (
                multiplier,
                preserve,
            )
            for multiplier in self.multipliers
            for preserve in (self.earlier_keys if solves else (False,))
        }

    def scored(self) -> int:
        """How many records one run writes and scores."""
        sizes = [len(batch) for batch in self.batches]
        ends = [*range(self.score_every, len(sizes), self.score_every), len(sizes)]
        return sum(sizes) + sum(sum(sizes[:end]) for end in ends)


def run_sequences(editor: Editor, plan: Plan, inputs: Inputs, *, progress: bool = False) -> list[dict[str, Any]]:
    """Run the sequences of a plan that are not finished on an unedited model, and append each step when it is done.

    Returns:
        The lines of all runs of the plan, in its order: a `Step` each, with ``key``, ``method``, ``batch_size``,
        ``multiplier``, ``preserve`` (whether the keys of earlier edits are) and ``keys`` (of the corpus, a layer).

    Raises:
        WrongModel: The model is edited already.
        BadData: The folder holds sequences of something else, or a line that is not JSON; or another process is writing
            there.
        DamagedFile: A line is not what a run writes.
        FastcovError, FastmemitError: What can go wrong with statistics, targets and edits.
    """
    if editor.edits:
        raise WrongModel(_EDITED)
    folder, runs, text = inputs.folder, plan.runs(), inputs.text
    config = editor.config(plan.method, **as_published(plan.method, plan.settings))
    cases = [[record.case_id for record in batch] for batch in plan.batches]
    header = {**results.make_header(editor, inputs, [config]), "batches": cases, "score_every": plan.score_every}
    names = (results.SEQUENTIAL, results.STEPS, results.STEP_TIMINGS)
    with results.written(folder, header, names) as (lines, timings):
        finished = read_sequences(lines.path, len(cases))
        results.write_in_order(lines.path, list(runs), finished)  # without the steps of a run that was killed
        todo = {key: run for key, run in runs.items() if key not in finished}
        if todo:
            layers = config.layers if config.needs_statistics else ()
            statistics = precompute_multipliers(editor, inputs, plan.multipliers, layers, quartic=config.quartic)
            records = [record for batch in plan.batches for record in batch]
            unedited = unedited_scores(editor, folder, records, progress)
            reads = ReadCache()  # the first batch is written into the unedited model, every time
            with bar("records", plan.scored() * len(todo), progress) as advance:
                for key, (multiplier, preserve) in todo.items():
                    advance.note(key)
                    used = statistics[multiplier]
                    if used is not None:
                        editor.store.use(used)
                    begun = time.perf_counter()
                    run = run_sequential(
                        editor,
                        plan,
                        preserve,
                        perplexity=None if text is None else lambda: perplexity(editor.adapter, text).perplexity,
                        entropy=_entropy(editor, records[: plan.generations]),
                        unedited=unedited,
                        reads=reads,
                        progress=advance,
                    )
                    place = {"method": plan.method, "batch_size": max(map(len, cases)), "multiplier": multiplier}
                    place |= {"preserve": preserve, "keys": 0 if used is None else used.keys, "targets": plan.targets}
                    with closing(run):
                        for step in run:
                            lines.append({"key": f"{key}/{step['edits']}", **place, **step})
                    timings.append(results.timing(editor, key, round(time.perf_counter() - begun, 3)))
            finished = read_sequences(lines.path, len(cases))
            results.write_in_order(lines.path, list(runs), finished)
    return Rows((line for key in runs for line in finished.get(key, ())), results.cell_columns)


def _entropy(editor: Editor, records: Sequence[Record]) -> Callable[[], float] | None:
    """What measures the mean n-gram entropy of the records' openings, continued by the model as it is."""
    if not records:
        return None
    check_generations(records)

    def measured() -> float:
        written = generate_records(editor.model, editor.tokenizer, records, seed=editor.seed)
        return math.fsum(each.ge for each in written) / len(written)

    return measured


def read_sequences(path: Path, batches: int) -> dict[str, list[dict[str, Any]]]:
    """The lines of the runs that have reached their last batch, by the run's name; errors as of `run_sequences`."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in results.read_results(path.parent, name=path.name).values():
        results.check_step(f"The step {line['key']!r:.80} of {str(path)!r}", line)
        found.setdefault(line["key"].rpartition("/")[0], []).append(line)
    return {key: lines for key, lines in found.items() if lines[-1]["edits"] == batches}


def run_sequential(
    editor: Editor,
    plan: Plan,
    preserve: bool,
    *,
    perplexity: Callable[[], float] | None = None,
    entropy: Callable[[], float] | None = None,
    unedited: Mapping[int, Mapping[str, Any]] | None = None,
    reads: ReadCache | None = None,
    progress: Callable[[int], None] | None = None,
) -> Generator[Step]:
    """Write a plan's batches one after the other, and yield a `Step` after every k-th and after the last.

    Target vectors are those of the model as it is when a batch is written, with the earlier edits in it, or, where the
    plan's `targets` are ``"unedited"``, those of the unedited model, which are the same for all methods that share
    them. Contexts are those of the unedited model. All edits are undone when the iterator ends, is closed or fails: the
    weights have their bits back, last edit first. For `reads` see `fastmemit.Editor.plan`.

    With `preserve` each batch preserves the keys of the earlier ones too, ``A = w C + ridge I + sum K_p K_p^T``.
    `perplexity` and `entropy` measure the model as it is; `unedited` are the unedited model's shares by case_id, if
    they were taken already; `progress` is called with the number of records written or scored since its last call.

    Raises:
        WrongModel: The model is edited already.
        BadConfig: `score_every` is below 1, or unedited targets are wanted for a method that has no target vectors.
        BadData: There is no batch, or an empty one.
        fastcov.FastcovError: No statistics of the edited layers were precomputed.
        BadRequest: A record cannot be edited, or two of a batch contradict each other.
        NonFinite: The first batch cannot be written, as for another `FastmemitError`; later ones are skipped.
        FastmemitError: See above.
    """
    if editor.edits:
        raise WrongModel(_EDITED)
    batches = plan.batches
    if plan.score_every < 1:
        raise BadConfig(f"Scores are taken after every {plan.score_every} batches; give 1 or more.")
    if not batches or not all(batches):
        raise BadData("A sequence needs batches with at least one record each; give some.")
    config = editor.config(plan.method, **as_published(plan.method, plan.settings))
    if plan.targets == "unedited" and not isinstance(config, TargetConfig):
        raise BadConfig(f"{config.method} has no target vectors; leave out targets='unedited' (--targets).")
    editor.store.needed(config)
    contexts = editor.contexts(config.method)  # written by the unedited model
    for batch in batches:  # refused now, not when it is their turn
        for request in check_batch([record.request for record in batch]):
            request_rows(editor.tokenizer, request, contexts)
    if unedited is None:
        records = [record for batch in batches for record in batch]
        unedited = {s.case_id: s.shares() for s in score_records(editor.adapter, editor.tokenizer, records)}
    given: dict[EditRequest, Target] | None = None
    if plan.targets == "unedited":
        given = {}
        for batch in batches:
            requests = [record.request for record in batch]
            given |= zip(requests, editor.targets(requests, config, together=True), strict=True)
    preserved = PreservedKeys() if preserve else None
    failed = 0
    try:
        for number, batch in enumerate(batches, 1):
            requests = [record.request for record in batch]
            # Without a word, some methods take all earlier keys.
            earlier = PreservedKeys() if preserved is None and config.method in PRESERVING else preserved
            try:
                # Their last bits depend on what vectors are optimised beside, so that a run that was interrupted may
                # not take some from the store and make the others.
                if given is None:
                    editor.targets(requests, config, together=True)
                editor.edit(requests, config, preserved=earlier, reads=reads, targets=given, verify=False)
            except (NonFinite, FastmemitError) as broken:
                # Requests were checked before, so that what is left of our own errors is a target whose loss is not
                # finite.
                if not editor.edits:
                    raise  # not the work of earlier edits
                log.warning("A batch was not written: %s", broken)
                failed += 1
            if progress is not None:
                progress(len(batch))
            if number % plan.score_every == 0 or number == len(batches):
                written = [(at, record) for at, batch in enumerate(batches[:number]) for record in batch]
                scores = scored_or_failed(editor, [record for _, record in written])
                scored = [
                    {
                        "case_id": record.case_id,
                        "batch": at,
                        "before": {name: unedited[record.case_id][name] for name in SHARES},
                        "after": {name: share for name, share in score.shares().items() if name in SHARES},
                    }
                    for (at, record), score in zip(written, scores, strict=True)
                ]
                cost = None
                if perplexity is not None:
                    try:
                        cost = perplexity()
                    except FastmemitError as broken:  # the model's output is not finite
                        log.warning("%s It counts as infinite.", broken)
                        cost = math.inf
                yield Step(
                    edits=number,
                    facts=len(written),
                    failed=failed,
                    preserved=0 if preserved is None else len(preserved),
                    scores=table_of(scored),
                    before=table_of(scored, "before"),
                    by_batch=[table_of([row for row in scored if row["batch"] == at]) for at in range(number)],
                    perplexity=cost,
                    entropy=None if entropy is None else entropy(),
                    records=scored,
                )
                if progress is not None:
                    progress(len(written))
    finally:
        for edit in reversed(editor.edits):
            edit.undo()
