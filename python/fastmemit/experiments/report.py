"""From the folders of sweeps to a report: tables, figures and one page with all of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastcov.store import atomic_file
from fastmemit.errors import BadConfig
from fastmemit.experiments.comparison import Group, group_cells
from fastmemit.experiments.drawing import check_matplotlib
from fastmemit.experiments.folders import collect
from fastmemit.experiments.html import page
from fastmemit.experiments.intervals import RESAMPLES
from fastmemit.experiments.layout import latex, markdown, markdown_text
from fastmemit.experiments.plots import pictures
from fastmemit.experiments.tables import (
    cells_csv,
    cells_table,
    comparison_csv,
    comparison_tables,
    difference_tables,
    paper_tables,
)


@dataclass(frozen=True)
class Report:
    """What a report was made of and where it lies.

    Attributes:
        model: The model's name.
        groups: The cells with their intervals.
        files: What was written, in this order.
    """

    model: str
    groups: tuple[Group, ...]
    files: tuple[Path, ...]


def write_report(folders: Sequence[Path], out: Path | None = None, *, resamples: int = RESAMPLES) -> Report:
    """Read sweeps and write their report; the same results give the same bytes.

    Writes ``report.html``, ``tables.md``, ``tables.tex``, ``tables.csv`` (full against fast, the paper's numbers among
    them), ``cells.csv`` (every cell, unrounded, with intervals) and ``figures/NAME.svg`` and ``.png``.

    Args:
        folders: Of sweeps of one model.
        out: Where to; ``report`` in the first folder if it is None.
        resamples: Draws behind every interval.

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
    groups = group_cells(found.cells, resamples=resamples)
    drawn = pictures(groups, model)
    comparisons, differences = comparison_tables(groups), difference_tables(groups)
    paper, cells = paper_tables(groups), cells_table(groups)
    tables = [*comparisons, *differences, *paper, cells]
    texts = {
        "report.html": page(found, drawn, comparisons, differences, paper, cells),
        "tables.md": f"# {markdown_text(model)}\n\n{markdown(tables)}",
        "tables.tex": latex(tables),
        "tables.csv": comparison_csv(groups, model),
        "cells.csv": cells_csv(groups),
    }
    contents = {name: text.encode() for name, text in texts.items()}
    for picture in drawn:
        contents[f"figures/{picture.name}.svg"] = picture.svg
        contents[f"figures/{picture.name}.png"] = picture.png
    for name, content in contents.items():
        with atomic_file(target / name) as file:
            file.write(content)
    return Report(model, tuple(groups), tuple(target / name for name in contents))
