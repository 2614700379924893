"""Scores as a table that a person reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmemit.experiments.intervals import Estimate

#: S beside what it is made of, and beside what a broken model cannot have.
SCORES = ("es", "ps", "ns", "s", "ea", "pa", "na")
MEANING = """\
ES, PS, NS: the wanted answer is more probable than one other, at the fact's own prompt, in other
words, and for its neighbours. S: their harmonic mean; a coin has 50. EA, PA, NA: the wanted
answer is what the model says. In percent; in brackets the 95 % interval over records, that of
"change" paired."""


def score_table(rows: Mapping[str, Mapping[str, Any]], names: Sequence[str] = SCORES) -> str:
    """One line per row with the scores that are named; a dash where a score does not exist."""
    width = max(len(name) for name in rows)
    columns = {name: max(8, len(name) + 2) for name in names}
    lines = [" " * width + "".join(f"{_title(n):>{size}}" for n, size in columns.items())]
    for label, scores in rows.items():
        cells = (f"{_number(scores.get(name)):>{size}}" for name, size in columns.items())
        lines.append(f"{label:<{width}}" + "".join(cells))
    return "\n".join(lines)


def interval_table(columns: Mapping[str, Mapping[str, Estimate | float | None]]) -> str:
    """One line per score, with its interval; a column for each time, and one for the change.

    Args:
        columns: Title -> score -> value; the first one says which scores there are. Without an interval a value stands
            alone.
    """
    names = list(next(iter(columns.values())))
    cells = [["", *columns]]
    cells += [[_title(name), *(_cell(values.get(name), title) for title, values in columns.items())] for name in names]
    widths = [max(len(row[at]) for row in cells) for at in range(len(cells[0]))]
    return "\n".join(
        "  ".join(f"{text:<{size}}" for text, size in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def _cell(found: Estimate | float | None, title: str) -> str:
    sign = "+" if title == "change" else ""
    if found is None or isinstance(found, (int, float)):
        return _number(found, sign)
    low, high = (f"{round(end, 1) + 0.0:.1f}" for end in (found.low, found.high))
    return f"{_number(found.value, sign):>7} [{low}, {high}]"


def _number(value: float | None, sign: str = "") -> str:
    if value is None:
        return "-"
    return f"{round(value, 2) + 0.0:{sign}.2f}" if abs(value) < 1e5 else f"{value:{sign}.3g}"


def _title(name: str) -> str:
    return name.upper() if len(name) <= 2 else name
