"""From the folders of sweeps or sequences to a report: tables, figures and one page with all of it.

The page needs nothing else: no network, no script, no file beside it. Figures are images inside it, so that their
identifiers do not meet and nothing in them can run. A Content-Security-Policy forbids the browser to load anything. The
template escapes all text that came from files.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas

from fastcov.files import StrPath, atomic_file
from fastmemit.errors import BadConfig, counted
from fastmemit.evaluation.changes import render
from fastmemit.experiments import tables
from fastmemit.experiments.frame import answers, measure, measure_steps
from fastmemit.experiments.intervals import RESAMPLES
from fastmemit.experiments.plots import Picture, check_matplotlib, pictures, sequence_picture
from fastmemit.experiments.results import Collected, collect, line_of
from fastmemit.experiments.tables import Table, markdown_text


@dataclass(frozen=True)
class Report:
    """What a report was made of and where it lies."""

    model: str
    cells: pandas.DataFrame  # a row each, with intervals; for the columns see `fastmemit.experiments.frame`
    files: tuple[Path, ...]  # what was written, in this order


def write_report(
    folders: StrPath | Sequence[StrPath], out: StrPath | None = None, *, resamples: int = RESAMPLES
) -> Report:
    """Read sweeps, or sequences, and write their report; the same results give the same bytes.

    Writes ``report.html``, ``tables.md``, ``tables.tex``, ``cells.csv`` (every cell or step, unrounded, with intervals)
    and ``figures/NAME.svg``, ``.pdf`` and ``.png`` into `out`, or into ``report`` in the first folder; of sweeps
    ``tables.csv`` (full against fast, the paper's numbers among them), of sequences ``sequential.jsonl``, all steps
    with the names of their runs. Behind every interval are `resamples` draws.

    Raises:
        BadData: A folder holds no results, or results that contradict one another or cannot be compared.
        DamagedFile: A file is not what a sweep or a sequence writes.
        WrongModel: The folders are of different models.
        BadConfig: matplotlib is not installed, or `out` is a file or a folder of sequences that it reports on.
        OSError: A file cannot be written.
    """
    found = collect(folders)
    target = found.folders[0] / "report" if out is None else Path(out)
    if target.exists() and not target.is_dir():
        raise BadConfig(f"{str(target)!r} is a file; name a folder with --out.")
    if found.sequential and target.resolve() in {folder.resolve() for folder in found.folders}:
        raise BadConfig(f"{str(target)!r} holds the sequences, and their steps would be replaced; name another --out.")
    check_matplotlib()
    model = found.headers[0]["model"]
    if found.sequential:
        cells = measure_steps(found.cells, resamples=resamples)
        drawn = [sequence_picture(cells, f"{model}: facts written in sequence")]
        comparisons, paper, every = [], [], tables.step_tables(cells)
        lines = [{**line, "run": run} for line, run in zip(found.cells, cells["run"], strict=True)]
        more = {"sequential.jsonl": b"".join(map(line_of, lines))}
    else:
        cells = measure(found.cells, resamples=resamples)
        drawn = pictures(cells, model)
        comparisons, paper = tables.comparison_tables(cells), tables.paper_tables(cells)
        every, more = [tables.cells_table(cells)], {"tables.csv": tables.comparison_csv(cells, model).encode()}
    parts = {"comparisons": comparisons, "differences": tables.difference_tables(cells), "paper": paper, "all": every}
    shown = [table for part in parts.values() for table in part]
    contents = {
        "report.html": page(found, drawn, parts, answers(cells)).encode(),
        "tables.md": f"# {markdown_text(model)}\n\n{tables.markdown(shown)}".encode(),
        "tables.tex": tables.latex(shown).encode(),
        **more,
        "cells.csv": tables.cells_csv(cells).encode(),
    }
    for picture in drawn:
        contents |= {f"figures/{picture.name}.{ending}": content for ending, content in picture.files.items()}
    for name, content in contents.items():
        with atomic_file(target / name) as file:
            file.write(content)
    return Report(model, cells, tuple(target / name for name in contents))


def page(
    found: Collected, drawn: Sequence[Picture], parts: Mapping[str, Sequence[Table]], answers: Sequence[str] = ()
) -> str:
    """The page of some sweeps with their figures, and their tables as ``report.html`` names them."""
    return render(
        "experiments/report.html",
        {"base64": lambda content: base64.b64encode(content).decode()},
        model=found.headers[0]["model"],
        sequential=found.sequential,
        cells=counted(len(found.cells), "step" if found.sequential else "cell"),
        answers=answers,
        pictures=drawn,
        runs=runs(found),
        **parts,
    )


def runs(found: Collected) -> list[tuple[str, list[tuple[str, str]]]]:
    """What was run, as names and values under titles: each ``sweep.json``, then machines, versions and seconds."""
    parts = []
    for folder, sweep in zip(found.folders, found.headers, strict=True):
        rows = [(name.replace("_", " "), _text(value)) for name, value in sweep.items()
                if name != "methods" and value is not None]  # fmt: skip
        rows += [(f"settings of {method}", _text(settings)) for method, settings in sweep["methods"].items()]
        parts.append((str(folder), rows))
    if found.timings:
        rows = []
        for name in ("hardware", "versions"):
            counts = Counter(_text(timing[name]) for timing in found.timings)
            rows += [(name, f"{value} ({counted(cells, 'cell')})") for value, cells in counts.items()]
        stages: dict[str, float] = {}
        for timing in found.timings:
            for stage, seconds in timing["seconds"].items():
                stages[stage] = stages.get(stage, 0.0) + seconds
        rows += [(f"seconds: {stage}", f"{seconds:,.1f}") for stage, seconds in stages.items()]
        parts.append(("Machines and time", [*rows, ("seconds: all", f"{sum(stages.values()):,.1f}")]))
    return parts


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_text(part)}" for name, part in value.items())
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
