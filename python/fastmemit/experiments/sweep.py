"""A sweep over multipliers, methods and batch sizes: everything is paid for once, nothing is lost.

The protocol is Table 1's of arXiv 2506.04226: batches of records with distinct subjects, each edited into the unedited
weights, scored, and taken out again bit for bit. Statistics of all multipliers come from one pass, target vectors from
one optimisation for every multiplier, batch size and method that can share them, and the unedited scores are taken
once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from fastcov.store import atomic_file
from fastmemit.data import Record, batches
from fastmemit.editor import Editor
from fastmemit.errors import WrongModel
from fastmemit.evaluation.perplexity import perplexity
from fastmemit.evaluation.scores import count_questions, score_records
from fastmemit.experiments.cell import SweepInputs, SweepRun, run_cell
from fastmemit.experiments.grid import Grid, Place
from fastmemit.experiments.header import check_header
from fastmemit.experiments.results import ResultsFile, gather, locked, read_results, read_unedited
from fastmemit.experiments.schema import Cell
from fastmemit.experiments.statistics import precompute_multipliers
from fastmemit.methods import EditConfig
from fastmemit.progress import bar
from fastmemit.statistics import Statistics

_TARGETS_TOGETHER = 64  # requests between two times that target vectors are stored


def run_sweep(
    editor: Editor, grid: Grid, inputs: SweepInputs, *, shard: tuple[int, int] = (1, 1), progress: bool = False
) -> list[Cell]:
    """Run the cells of a grid that are not finished yet, and append each one when it is.

    Killed at any moment and started again it goes on where it was, and gives the same lines.

    Args:
        editor: Of the unedited model.
        grid: Which cells.
        inputs: What to run them on.
        shard: (i, n): every n-th cell from the i-th on, into a file of its own. The whole sweep, run afterwards, finds
            them finished and puts all into one file.
        progress: Show bars.

    Returns:
        All finished cells of the grid, in its order; of a shard those that are finished so far.

    Raises:
        WrongModel: The model is edited already.
        BadData: There are too few records; the folder holds the results of another sweep, or a damaged line; or another
            process is writing there.
        FastcovError, FastmemitError: What can go wrong with statistics, targets and edits.
    """
    if editor.edits:
        raise WrongModel("The model is edited already; undo its edits before a sweep.")
    grid = grid.of_model(editor.config)
    places = grid.places()
    dealt = {size: batches(inputs.records, size, count, seed=editor.seed) for size, count in grid.batches.items()}
    folder = inputs.folder
    folder.mkdir(parents=True, exist_ok=True)
    number, of = shard
    suffix = "" if of == 1 else f"-{number}of{of}"
    results = ResultsFile(folder / f"results{suffix}.jsonl")
    timings = ResultsFile(folder / f"timings{suffix}.jsonl")
    with locked(results.path):
        check_header(folder, inputs.header)
        for file in (results, timings):
            file.repair()
        finished = read_results(folder)
        todo = [p for p in places[number - 1 :: of] if p.key not in finished]
        if todo:
            run = _prepared(editor, grid, inputs, dealt, todo, progress)
            with bar("records", sum(map(_size, todo)), progress) as advance:
                for place, used in _with_statistics(run, grid, todo):
                    advance.note(place.key)
                    cell, timing = run_cell(run, place, used, advance)
                    timings.append(timing)
                    results.append(cell)
        if of == 1:
            gather(folder, [place.key for place in places])
        finished = read_results(folder)
    return [cast(Cell, finished[place.key]) for place in places if place.key in finished]


def _size(place: Place) -> int:
    return place.batch_size * place.batches


def _config(editor: Editor, place: Place) -> EditConfig:
    return editor.config(place.method, **dict(place.settings))


def _distinct(dealt: Iterable[Sequence[Sequence[Record]]]) -> list[Record]:
    """The records of some batches, each once, in the order in which they come."""
    return list({r.case_id: r for sets in dealt for batch in sets for r in batch}.values())


def _prepared(
    editor: Editor,
    grid: Grid,
    inputs: SweepInputs,
    dealt: dict[int, list[list[Record]]],
    todo: Sequence[Place],
    progress: bool,
) -> SweepRun:
    """Unedited scores and target vectors, for the records of the whole grid.

    Not only for what is left to do: rows of a batch differ in their last bits with what stands beside them, so the same
    records are always run together.
    """
    records = _distinct(dealt.values())
    run = SweepRun(editor, inputs, dealt, _unedited(editor, inputs.folder, records, progress))
    if inputs.text is not None:
        run.unedited = perplexity(editor.adapter, inputs.text)
    for settings in dict.fromkeys(_config(editor, place).targets() for place in todo):
        # The batch sizes of the whole grid: ROME, for one, edits no batches but those of one.
        using = [place for place in grid.places() if _config(editor, place).targets() == settings]
        sizes = {place.batch_size for place in using}
        wanted = _distinct(sets for size, sets in dealt.items() if size in sizes)
        for start in range(0, len(wanted), _TARGETS_TOGETHER):
            requests = [record.request for record in wanted[start : start + _TARGETS_TOGETHER]]
            editor.sources.targets(requests, _config(editor, using[0]), together=True)
    return run


def _unedited(editor: Editor, folder: Path, records: Sequence[Record], progress: bool) -> dict[int, dict[str, Any]]:
    """The unedited model's scores, from the folder where they are there."""
    path = folder / "unedited.json"
    cases = [record.case_id for record in records]
    stored = read_unedited(path, editor.fingerprint, cases)
    if stored is not None:
        return stored
    with bar("unedited scores", count_questions(records), progress) as advance:
        scored = score_records(editor.adapter, editor.tokenizer, records, progress=advance)
    scores = [score.as_dict() for score in scored]
    content = {"fingerprint": editor.fingerprint, "cases": cases, "scores": scores}
    with atomic_file(path) as file:
        file.write((json.dumps(content) + "\n").encode())
    return {score["case_id"]: score for score in scores}


def _with_statistics(run: SweepRun, grid: Grid, todo: Sequence[Place]) -> Iterator[tuple[Place, Statistics]]:
    """The cells with their statistics in use, collected no further than the next cell needs."""
    editor = run.editor
    layers = sorted({i for place in grid.places() for i in _config(editor, place).layers})
    now: tuple[int, bool, float | None] | None = None
    used: Statistics | None = None
    for place in todo:
        if used is None or now != (place.seed, place.bos, place.multiplier):
            now = (place.seed, place.bos, place.multiplier)
            used = precompute_multipliers(
                editor,
                run.inputs.corpus,
                grid.way(place.multiplier),
                layers,
                full_keys=run.inputs.full_keys,
                max_length=run.inputs.max_length,
                bos=place.bos,
                seed=place.seed,
            )[place.multiplier]
            editor.use(used)
        yield place, used
