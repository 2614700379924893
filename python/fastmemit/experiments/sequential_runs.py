"""Sequences for every multiplier, with and without preserved edit keys: a file that grows by steps.

``sequential.jsonl`` has a line for each step of each run, and nothing that differs from time to
time; ``sequential-timings.jsonl`` says how long each run took, and where.  A sequence cannot be
taken up in its middle, since its weights are gone, so a run that was killed begins again; those that were finished
stay.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fastcov.parsing import parse_json
from fastcov.store import atomic_file
from fastmemit.data import Corpus, Record
from fastmemit.editor import Editor
from fastmemit.errors import BadData, WrongModel
from fastmemit.evaluation.perplexity import PerplexityText, perplexity
from fastmemit.evaluation.scores import RecordScore, count_questions, score_records
from fastmemit.experiments.grid import multiplier_name
from fastmemit.experiments.header import as_published, hardware, make_header, with_defaults
from fastmemit.experiments.results import ResultsFile, line_of, locked, read_lines
from fastmemit.experiments.sequential import check_step, run_sequential
from fastmemit.experiments.statistics import FULL_KEYS, precompute_multipliers
from fastmemit.methods import ReadCache
from fastmemit.progress import bar
from fastmemit.statistics import versions

STEPS, TIMINGS, HEADER = "sequential.jsonl", "sequential-timings.jsonl", "sequential.json"


@dataclass(frozen=True)
class Plan:
    """Which sequences are run.

    Attributes:
        batches: Records to be edited together, in the order in which they are written.
        method: One of `fastmemit.methods.METHODS`.
        settings: What replaces the preset's settings.
        multipliers: In ascending order; None, which comes last, is the full precompute.
        preserve: With the keys of earlier edits among the preserved ones, without, or both.
        score_every: After how many batches scores are taken.
    """

    batches: Sequence[Sequence[Record]]
    method: str
    settings: Mapping[str, Any]
    multipliers: Sequence[float | None]
    preserve: Sequence[bool] = (True, False)
    score_every: int = 1

    def runs(self) -> list[tuple[float | None, bool]]:
        """Multiplier, and whether edit keys are preserved, of each run in order."""
        return [(m, preserve) for m in self.multipliers for preserve in self.preserve]

    def key(self, multiplier: float | None, preserve: bool) -> str:
        """A run's name, such as ``memit/b16x10/x2/preserved``."""
        size = f"b{max(map(len, self.batches))}x{len(self.batches)}"
        kind = "preserved" if preserve else "plain"
        return f"{self.method}/{size}/{multiplier_name(multiplier)}/{kind}"

    def scored(self) -> int:
        """How many records one run writes and scores."""
        sizes = [len(batch) for batch in self.batches]
        ends = [*range(self.score_every, len(sizes), self.score_every), len(sizes)]
        return sum(sizes) + sum(sum(sizes[:end]) for end in ends)


@dataclass(frozen=True)
class Inputs:
    """What the sequences run on.

    Attributes:
        corpus: Where the statistics come from.
        folder: Where the results go.
        data: Name and sha256 of the records.
        full_keys: Of the full precompute, if the corpus has so many.
        max_length: Cut documents at so many tokens.
        text: What perplexity is measured on; None measures none.
    """

    corpus: Corpus
    folder: Path
    data: Mapping[str, Any]
    full_keys: int = FULL_KEYS
    max_length: int | None = None
    text: PerplexityText | None = None


def run_sequences(editor: Editor, plan: Plan, inputs: Inputs, *, progress: bool = False) -> list[dict[str, Any]]:
    """Run what is not finished, and append each step when it is done.

    Args:
        editor: Of the unedited model.
        plan: Which sequences.
        inputs: What to run them on.
        progress: Show bars.

    Returns:
        The lines of all runs of the plan, in its order: a `Step` each, with ``key``, ``method``, ``batch_size``,
        ``multiplier``, ``preserve`` and ``keys`` (of the corpus, a layer).

    Raises:
        WrongModel: The model is edited already.
        BadData: The folder holds sequences of something else, or a line that is not JSON; or another process is writing
            there.
        DamagedFile: A line is not what a run writes.
        FastcovError, FastmemitError: What can go wrong with statistics, targets and edits.
    """
    if editor.edits:
        raise WrongModel("The model is edited already; undo its edits before a sequence.")
    inputs.folder.mkdir(parents=True, exist_ok=True)
    steps = ResultsFile(inputs.folder / STEPS)
    timings = ResultsFile(inputs.folder / TIMINGS)
    with locked(steps.path):
        _check_header(inputs.folder / HEADER, _header(editor, plan, inputs))
        for file in (steps, timings):
            file.repair()
        finished = _finished(steps.path, len(plan.batches))
        _write(steps.path, plan, finished)  # without the steps of a run that was killed
        todo = [run for run in plan.runs() if plan.key(*run) not in finished]
        if todo:
            _run_all(editor, plan, inputs, todo, steps, timings, progress)
            finished = _finished(steps.path, len(plan.batches))
            _write(steps.path, plan, finished)
    return [line for run in plan.runs() for line in finished.get(plan.key(*run), ())]


def _run_all(
    editor: Editor,
    plan: Plan,
    inputs: Inputs,
    todo: Sequence[tuple[float | None, bool]],
    steps: ResultsFile,
    timings: ResultsFile,
    progress: bool,
) -> None:
    layers = editor.config(plan.method, **plan.settings).layers
    statistics = precompute_multipliers(
        editor, inputs.corpus, plan.multipliers, layers, full_keys=inputs.full_keys, max_length=inputs.max_length
    )
    records = [record for batch in plan.batches for record in batch]
    unedited = _unedited(editor, records, progress)
    reads = ReadCache()  # the first batch is written into the unedited model, every time
    text = inputs.text
    measure = None if text is None else lambda: perplexity(editor.adapter, text).perplexity
    with bar("records", plan.scored() * len(todo), progress) as advance:
        for multiplier, preserve in todo:
            key = plan.key(multiplier, preserve)
            advance.note(key)
            used = statistics[multiplier]
            editor.use(used)
            begun = time.perf_counter()
            run = run_sequential(
                editor,
                plan.batches,
                plan.method,
                plan.settings,
                preserve=preserve,
                score_every=plan.score_every,
                perplexity=measure,
                unedited=unedited,
                reads=reads,
                progress=advance,
            )
            with closing(run):
                for step in run:
                    place = {
                        "key": f"{key}/{step['edits']}",
                        "method": plan.method,
                        "batch_size": max(map(len, plan.batches)),
                        "multiplier": multiplier,
                        "preserve": preserve,
                        "keys": used.keys,
                    }
                    steps.append({**place, **step})
            timings.append(
                {
                    "key": key,
                    "seconds": round(time.perf_counter() - begun, 3),
                    "hardware": hardware(editor.adapter.device),
                    "versions": versions(),
                    "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                }
            )


def _unedited(editor: Editor, records: Sequence[Record], progress: bool) -> dict[int, RecordScore]:
    with bar("unedited scores", count_questions(records), progress) as advance:
        scores = score_records(editor.adapter, editor.tokenizer, records, progress=advance)
    return {score.case_id: score for score in scores}


def _finished(path: Path, batches: int) -> dict[str, list[dict[str, Any]]]:
    """The lines of the runs that have reached their last batch, by the run's name."""
    if not path.is_file():
        return {}
    found: dict[str, list[dict[str, Any]]] = {}
    for line in read_lines(path):
        check_step(f"The step {line['key']!r:.80} of {str(path)!r}", line)
        found.setdefault(line["key"].rpartition("/")[0], []).append(line)
    return {key: lines for key, lines in found.items() if lines[-1]["edits"] == batches}


def _write(path: Path, plan: Plan, finished: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """The runs of the plan in its order, and behind them those that were asked for before."""
    order = [key for run in plan.runs() if (key := plan.key(*run)) in finished]
    order += [key for key in finished if key not in set(order)]
    with atomic_file(path) as file:
        for key in order:
            for line in finished[key]:
                file.write(line_of(line))


def _header(editor: Editor, plan: Plan, inputs: Inputs) -> dict[str, Any]:
    text = inputs.text
    shared = make_header(
        editor,
        inputs.data,
        inputs.corpus,
        [],
        max_length=inputs.max_length,
        full_keys=inputs.full_keys,
        perplexity=None if text is None else {"name": text.name, "sha256": text.sha256, "tokens": len(text.ids)},
    )
    config = editor.config(plan.method, **as_published(plan.method, plan.settings)).as_dict()
    own = {
        "methods": {plan.method: config},
        "batches": [[record.case_id for record in batch] for batch in plan.batches],
        "score_every": plan.score_every,
    }
    return {**shared, **own}


def _check_header(path: Path, header: Mapping[str, Any]) -> None:
    """Write the header of a new folder, or see that it is that of the sequences in it."""
    wanted = json.loads(json.dumps(header))
    if not path.is_file():
        with atomic_file(path) as file:
            file.write((json.dumps(wanted, indent=1, ensure_ascii=False) + "\n").encode())
        return
    try:
        stored = dict(parse_json(path.read_bytes()))
        methods = dict(stored.get("methods", {}))
        stored["methods"] = {name: with_defaults(name, values) for name, values in methods.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise BadData(f"{str(path)!r} is not the header of sequences ({error}); name another folder.") from error
    for name in wanted:
        if stored.get(name) != wanted[name]:
            raise BadData(
                f"{str(path.parent)!r} holds sequences with another {name}; name another folder, or give the same."
            )
