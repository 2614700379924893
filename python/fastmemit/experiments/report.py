"""From the folders of sweeps to a report: tables, figures and one page with all of it.

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

from fastcov.files import atomic_file
from fastmemit.errors import BadConfig, counted
from fastmemit.evaluation.changes import render
from fastmemit.experiments import tables
from fastmemit.experiments.frame import answers, measure
from fastmemit.experiments.intervals import RESAMPLES
from fastmemit.experiments.plots import Picture, check_matplotlib, pictures
from fastmemit.experiments.results import Collected, collect
from fastmemit.experiments.tables import Table, markdown_text


@dataclass(frozen=True)
class Report:
    """What a report was made of and where it lies."""

    model: str
    cells: pandas.DataFrame  # a row each, with intervals; for the columns see `fastmemit.experiments.frame`
    files: tuple[Path, ...]  # what was written, in this order


def write_report(folders: Sequence[Path], out: Path | None = None, *, resamples: int = RESAMPLES) -> Report:
    """Read sweeps and write their report; the same results give the same bytes.

    Writes ``report.html``, ``tables.md``, ``tables.tex``, ``tables.csv`` (full against fast, the paper's numbers among
    them), ``cells.csv`` (every cell, unrounded, with intervals) and ``figures/NAME.svg``, ``.pdf`` and ``.png`` into
    `out`, or into ``report`` in the first folder. Behind every interval are `resamples` draws.

    Raises:
        BadData: A folder holds no results, or results that contradict one another.
        DamagedFile: A file is not what a sweep writes.
        WrongModel: The folders are of different models.
        BadConfig: matplotlib is not installed, or `out` is a file.
        OSError: A file cannot be written.
    """
    found = collect(folders)
    target = folders[0] / "report" if out is None else out
    if target.exists() and not target.is_dir():
        raise BadConfig(f"{str(target)!r} is a file; name a folder with --out.")
    check_matplotlib()
    model = found.sweeps[0]["model"]
    cells = measure(found.cells, resamples=resamples)
    drawn = pictures(cells, model)
    parts = {
        "comparisons": tables.comparison_tables(cells),
        "differences": tables.difference_tables(cells),
        "paper": tables.paper_tables(cells),
        "all": [tables.cells_table(cells)],
    }
    shown = [table for part in parts.values() for table in part]
    contents = {
        "report.html": page(found, drawn, parts, answers(cells)).encode(),
        "tables.md": f"# {markdown_text(model)}\n\n{tables.markdown(shown)}".encode(),
        "tables.tex": tables.latex(shown).encode(),
        "tables.csv": tables.comparison_csv(cells, model).encode(),
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
        model=found.sweeps[0]["model"],
        cells=len(found.cells),
        answers=answers,
        pictures=drawn,
        runs=runs(found),
        **parts,
    )


def runs(found: Collected) -> list[tuple[str, list[tuple[str, str]]]]:
    """What was run, as names and values under titles: each ``sweep.json``, then machines, versions and seconds."""
    parts = []
    for folder, sweep in zip(found.folders, found.sweeps, strict=True):
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
