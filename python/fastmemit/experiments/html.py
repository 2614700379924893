"""The report as one page that needs nothing else: no network, no script, no file beside it.

Figures are images inside the page, so that their identifiers do not meet and nothing in them can run. A
Content-Security-Policy forbids the browser to load anything. The template escapes all text that came from files.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

from fastmemit.experiments.folders import Collected
from fastmemit.experiments.layout import Table
from fastmemit.experiments.plots import Picture
from fastmemit.experiments.schema import Timing


class Facts(NamedTuple):
    """Names and values under a title."""

    title: str
    facts: tuple[tuple[str, str], ...]


def page(
    found: Collected,
    pictures: Sequence[Picture],
    comparisons: Sequence[Table],
    differences: Sequence[Table],
    paper: Sequence[Table],
    cells: Table,
) -> str:
    """The page.

    Args:
        found: What the report is about: its sweeps, and their timings.
        pictures: The figures.
        comparisons: Tables of full against fast.
        differences: Tables of paired differences.
        paper: The paper's tables that belong to them.
        cells: The table of every cell.
    """
    # torch needs jinja2, so it is there wherever fastmemit is.
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = (files("fastmemit.experiments") / "report.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        model=found.sweeps[0]["model"],
        cells=len(found.cells),
        pictures=[
            {
                "name": picture.name,
                "title": picture.title,
                "alt": picture.alt,
                "base64": base64.b64encode(picture.svg).decode(),
            }
            for picture in pictures
        ],
        comparisons=comparisons,
        differences=differences,
        paper=paper,
        all=cells,
        runs=runs(found),
    )


def runs(found: Collected) -> list[Facts]:
    """What was run: ``sweep.json`` of each folder, then machines, versions and seconds."""
    parts = [
        Facts(str(folder), tuple(_facts(sweep))) for folder, sweep in zip(found.folders, found.sweeps, strict=True)
    ]
    if found.timings:
        parts.append(Facts("Machines and time", tuple(_costs(found.timings))))
    return parts


def _facts(sweep: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every field in its order; the settings of each method on a line of its own."""
    rows = []
    for name, value in sweep.items():
        if name == "methods" and isinstance(value, Mapping):
            rows += [(f"settings of {method}", _text(settings)) for method, settings in value.items()]
        elif value is not None:
            rows.append((name.replace("_", " "), _text(value)))
    return rows


def _costs(timings: Sequence[Timing]) -> list[tuple[str, str]]:
    rows = []
    for hardware, cells in _counted(timing["hardware"] for timing in timings).items():
        rows.append(("hardware", f"{hardware} ({cells} cells)"))
    for versions, cells in _counted(_text(timing["versions"]) for timing in timings).items():
        rows.append(("versions", f"{versions} ({cells} cells)"))
    stages: dict[str, float] = {}
    for timing in timings:
        for stage, seconds in timing["seconds"].items():
            stages[stage] = stages.get(stage, 0.0) + seconds
    rows += [(f"seconds: {stage}", f"{seconds:,.1f}") for stage, seconds in stages.items()]
    return [*rows, ("seconds: all", f"{sum(stages.values()):,.1f}")]


def _counted(values: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return counts


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_text(part)}" for name, part in value.items())
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
