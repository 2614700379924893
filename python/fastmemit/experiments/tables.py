"""Cells put side by side, and a report's tables: each multiplier in the paper's shape, the paper's own, every cell.

A group is what one of the paper's figures shows: one method with its settings, over multipliers and batch sizes. Cells
are compared only where all but the multiplier is equal. The paper's shape is one table for each method and multiplier,
one row for each batch size, and for each score a column for the full precompute ("full") and one for few keys ("fast").
The paper has ES, PS, NS and S. A model that is broken keeps half of these, so EA, PA, NA and perplexity stand beside
them everywhere.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from itertools import groupby
from typing import Any, NamedTuple, cast

from fastmemit.errors import BadData, counted
from fastmemit.evaluation.scores import SCORES, SHARES, score_means
from fastmemit.experiments.intervals import (
    PERPLEXITY,
    RESAMPLES,
    Estimate,
    Kept,
    difference_intervals,
    kept_share,
    score_intervals,
)
from fastmemit.experiments.results import Cell, settings_name
from fastmemit.experiments.sweep import FULL, multiplier_name

#: Quality counts as kept from this share of the full precompute's on, as in the paper's figures, in each of ES, PS, NS,
#: EA, PA, NA and perplexity.
KEPT = 0.95
#: A cell is not worse than another where each score's interval of the difference ends above this many points below
#: zero. One of 64 facts is 1.6 points of EA.
MARGIN = 2.0
_LEAST = "least share of full"
_LEAST_NOTE = (
    "Least share of full: the smallest of ES, PS, NS, EA, PA and NA over the full precompute's, and of its perplexity "
    f"over this one; {KEPT:g} counts as kept."
)
_PRINTED = ("es", "ps", "ns", "s")  # the paper's scores
#: The columns of the paper's tables.
NAMES = tuple(f"{score}_{side}" for score in _PRINTED for side in ("full", "fast"))
_PLACE = ("method", "settings", "bos", "seed", "multiplier", "batch_size", "batches")
#: What a spreadsheet begins a formula with, in every width; white space is dropped before it.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
FIRST = 100  # facts whose fate a sequence's table follows
_NARROW = 9  # a table of more columns does not fit the width of a page

Estimates = Mapping[str, Estimate | None]


class Size(NamedTuple):
    """How many records were edited: batches of a size, each on the unedited weights."""

    batch_size: int
    batches: int

    def __str__(self) -> str:
        return f"{counted(self.batches, 'batch', 'batches')} of {self.batch_size}"


@dataclass(frozen=True)
class Against:
    """A cell compared with another one, paired by case."""

    other: str  # the name of the other cell
    kept: Kept | None  # the smallest share of the other's scores and perplexity
    differences: Estimates  # each score minus the other's, in points; None where one lacks it
    perplexity: float | None  # after the edits, divided by the other's. One text has no interval

    @property
    def verdict(self) -> str:
        """Which scores are worse by more than the margin, and for which that is open."""
        found = {name: d for name in SHARES if (d := self.differences.get(name)) is not None}
        worse = [name.upper() for name, d in found.items() if d.high < -MARGIN]
        unsure = [name.upper() for name, d in found.items() if d.low < -MARGIN <= d.high]
        if self.perplexity is not None and not self.perplexity * KEPT <= 1:
            worse.append(PERPLEXITY)
        parts = [f"worse: {', '.join(worse)}"] if worse else []
        parts += [f"open: {', '.join(unsure)}"] if unsure else []
        return "; ".join(parts) or ("not worse" if found else "-")


@dataclass(frozen=True)
class Measured:
    """A cell with intervals."""

    cell: Cell
    after: Estimates  # every score after the edits, in percent, and the perplexity, which has no interval
    before: Estimates  # the same of the unedited model
    full: Against | None = None  # against the full precompute; None for itself and where it was not run
    plain: Against | None = None  # against the same cell with the settings of the preset; None where there is none

    @property
    def size(self) -> Size:
        """Batch size and number of batches."""
        return Size(self.cell["batch_size"], self.cell["batches"])


@dataclass(frozen=True)
class Group:
    """One method with its settings."""

    method: str
    settings: str  # the overrides, as ``name=value``; "" where there are none
    bos: bool  # whether the first position of a document is a key
    seed: int  # seed for the order of the corpus
    cells: dict[Size, dict[float | None, Measured]] = field(default_factory=dict)  # None: the full precompute

    @property
    def title(self) -> str:
        """``MEMIT, relative_ridge=0.01, without BOS, seed 1``."""
        return ", ".join([method_title(self.method), *([self.variant] if self.variant else [])])

    @property
    def variant(self) -> str:
        """What tells the group from the plain one of its method; "" for that one."""
        parts = (self.settings, "" if self.bos else "without BOS", f"seed {self.seed}" if self.seed else "")
        return ", ".join(part for part in parts if part)

    @property
    def multipliers(self) -> list[float]:
        """The multipliers of any size, ascending, without the full precompute."""
        return sorted({m for row in self.cells.values() for m in row if m is not None})

    @property
    def has_full(self) -> bool:
        """Whether the full precompute was run for any size."""
        return any(None in row for row in self.cells.values())

    def row(self, multiplier: float | None) -> list[Measured]:
        """The cells of one multiplier, ordered by size."""
        return [row[multiplier] for _, row in sorted(self.cells.items()) if multiplier in row]


def group_cells(cells: Sequence[Cell], *, resamples: int = RESAMPLES) -> list[Group]:
    """Sort cells of one model into groups, in their order, with every interval; BadData for two in one place."""

    def place(cell: Mapping[str, Any], **other: Any) -> str:
        return json.dumps([{**cell, **other}[name] for name in _PLACE], sort_keys=True)

    known = {place(cell): cell for cell in cells}
    groups: dict[str, Group] = {}
    for cell in cells:
        multiplier, size = cell["multiplier"], Size(cell["batch_size"], cell["batches"])
        identity = place(cell, multiplier=None, batch_size=None, batches=None)
        fresh = Group(cell["method"], settings_name(cell["settings"]), cell["bos"], cell["seed"])
        row = groups.setdefault(identity, fresh).cells.setdefault(size, {})
        if multiplier in row:
            raise BadData(
                f"The cells {row[multiplier].cell['key']!r} and {cell['key']!r} have the same method, settings, "
                "batches and multiplier; remove one of them."
            )
        full = None if multiplier is None else known.get(place(cell, multiplier=None))
        plain = known.get(place(cell, settings={})) if cell["settings"] else None
        estimates = []
        for when in ("after", "before"):
            cost = cell["perplexity"] and Estimate(*[cast(Any, cell["perplexity"])[when]] * 3)
            scores = score_intervals(cell["records"], when=when, resamples=resamples)
            estimates.append({**scores, PERPLEXITY: cost})
        compared = [None if other is None else against(cell, other, resamples=resamples) for other in (full, plain)]
        row[multiplier] = Measured(cell, estimates[0], estimates[1], *compared)
    return list(groups.values())


def against(cell: Cell, other: Cell, *, resamples: int = RESAMPLES) -> Against:
    """Compare a cell with one that it shall not be worse than, on the cases that both have."""
    ours, theirs = cell["perplexity"], other["perplexity"]
    pair = None if ours is None or theirs is None else (ours["after"], theirs["after"])
    return Against(
        other["key"],
        kept_share(cell["records"], other["records"], pair, resamples=resamples),
        difference_intervals(cell["records"], other["records"], resamples=resamples),
        None if pair is None else pair[0] / pair[1],
    )


def further_means(cell: Cell) -> dict[str, float]:
    """Means over records of what was measured besides `SHARES`, as ``before NAME``; of the numbers among it."""
    means: dict[str, float] = {}
    for when in ("before", "after"):
        sides = [record[when] for record in cell["records"]]
        for name in sorted({name for side in sides for name in side} - {*SHARES}):
            numbers = [side[name] for side in sides if isinstance(side.get(name), (int, float))]
            if numbers:
                means[f"{when} {name}"] = math.fsum(numbers) / len(numbers)
    return means


@functools.cache
def paper_rows() -> tuple[dict[str, Any], ...]:
    """All 150 rows of Tables 2 to 31 of arXiv 2506.04226, in the order of the paper.

    Each is one batch size of one model, method and multiplier (d_m of the fast columns). ``paper.csv`` has the values
    as they are ``printed``, in percent. Some rows contradict themselves or one another: S is not the harmonic mean of
    its columns, or a baseline differs between tables that share it. Where the right value follows from the others it
    stands in ``corrected``, and is the value of its column here; where it does not, ``note`` says what is wrong.
    """
    rows: list[dict[str, Any]] = []
    text = (files("fastmemit.experiments") / "paper.csv").read_text(encoding="utf-8")
    for row in csv.DictReader(text.splitlines()):
        printed = {name: float(row[name]) for name in NAMES}
        corrected = {name: float(value) for name, value in re.findall(r"(\w+)=([\d.]+)", row["corrected"])}
        rows.append({**row, **printed, **corrected, "printed": printed, "corrected": corrected})
        rows[-1] |= {"multiplier": float(row["multiplier"])} | {n: int(row[n]) for n in ("table", "batch_size")}
    return tuple(rows)


def rows_for(method: str, multiplier: float) -> list[dict[str, Any]]:
    """The rows of one method and multiplier, of all three models; none where the paper has none."""
    return [row for row in paper_rows() if (row["method"], row["multiplier"]) == (method, multiplier)]


class Column(NamedTuple):
    """The head of a column."""

    name: str  # what stands directly above the values
    over: str = ""  # what stands above that, over all neighbours that share it ("ES" over full and fast)
    text: bool = False  # whether the column holds words, which are set to the left; numbers are to the right


@dataclass(frozen=True)
class Table:
    """A table with values that are already text."""

    name: str  # lower-case letters, digits and hyphens, unique in a report
    title: str
    columns: tuple[Column, ...]  # the first one names the row
    rows: tuple[tuple[str, ...], ...]  # as many values a row as columns; a value that does not exist is "-"
    note: str = ""  # a sentence under the table

    @property
    def spans(self) -> list[tuple[str, int, int]]:
        """The upper heads, where each begins (from 1), and how many columns it covers; empty where there are none."""
        found, at = [], 1
        for over, part in groupby(column.over for column in self.columns):
            found.append((over, at, len(list(part))))
            at += found[-1][2]
        return found if any(over for over, _, _ in found) else []

    @property
    def wide(self) -> bool:
        """Whether it does not fit a page."""
        return len(self.columns) > _NARROW


def method_title(method: str) -> str:
    """A method's name as it is written in titles."""
    return {"alphaedit": "AlphaEdit", "ultraedit": "UltraEdit", "rlsedit": "RLSEdit"}.get(method, method.upper())


def slug(text: str) -> str:
    """`text` as a name for files and anchors: ``MEMIT, ridge=0.1`` becomes ``memit-ridge-0.1``."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "unnamed"


def unique(names: Iterable[str]) -> list[str]:
    """`names` with a number behind each that was there before."""
    found: list[str] = []
    for name in names:
        candidate, number = name, 1
        while candidate in found:
            number += 1
            candidate = f"{name}-{number}"
        found.append(candidate)
    return found


def markdown(tables: Sequence[Table]) -> str:
    """The tables, each under a heading of its own."""
    parts = []
    for table in tables:
        heads = [f"{column.over} {column.name}".strip() for column in table.columns]
        shown = ["| " + " | ".join(map(markdown_text, line)) + " |" for line in (heads, *table.rows)]
        shown.insert(1, "| " + " | ".join("---" if column.text else "---:" for column in table.columns) + " |")
        note = [markdown_text(table.note), ""] if table.note else []
        parts += [f"## {markdown_text(table.title)}", "", *shown, "", *note]
    return "\n".join(parts)


def markdown_text(text: str) -> str:
    """Text for a heading, a cell or a paragraph: it stays text, on one line."""
    # What would end a cell, begin a tag or a link, or set text in another way. The underscores of names are left:
    # inside a word Markdown takes them as they are. So are brackets that no link follows.
    return re.sub(r"([\\|<>*`]|(?<=\])\()", r"\\\1", " ".join(text.split()))


def latex(tables: Sequence[Table]) -> str:
    r"""The tables as floats that need ``booktabs``, and ``graphicx`` where they are wide."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment("<%", "%>", "<<", ">>", undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["tex"] = _tex
    template = (files("fastmemit.experiments") / "tables.tex").read_text(encoding="utf-8")
    return environment.from_string(template).render(tables=tables, wide=any(table.wide for table in tables))


_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    # A line that begins with a bracket would be read as an option of the \\ before it.
    "[": "{[}",
    "]": "{]}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def _tex(text: str) -> str:
    """Text as LaTeX that shows it; of no value a dash."""
    return "--" if text == "-" else "".join(_TEX.get(character, character) for character in " ".join(text.split()))


def _table(name: str, title: str, rows: Sequence[Mapping[Column, str]], note: str) -> Table:
    """A table of rows with the same columns; without those of perplexity where none was measured."""
    costs = [column for column in rows[0] if column.over == PERPLEXITY or column.name.startswith(PERPLEXITY)]
    unmeasured = costs if all(row[column] == "-" for row in rows for column in costs) else []
    columns = tuple(column for column in rows[0] if column not in unmeasured)
    return Table(name, title, columns, tuple(tuple(row[column] for column in columns) for row in rows), note)


def comparison_tables(groups: Sequence[Group]) -> list[Table]:
    """Every group against its full precompute: a table a multiplier, with a row for each size.

    A group of one size alone is one table, with a row for each multiplier.
    """
    titles, tables = [], []
    for group in groups:
        alone = len(group.cells) == 1
        if alone:
            ((size, found),) = group.cells.items()
            sets = [(f", {size}", [(multiplier_text(m), found[m]) for m in group.multipliers])]
        else:
            rows = [(multiplier_text(m), group.row(m)) for m in group.multipliers]
            sets = [(f": multiplier {m}", [(str(cell.size), cell) for cell in cells]) for m, cells in rows]
        for text, cells in sets:
            # Without a full precompute there are no columns for it, which would hold nothing but dashes.
            compared = any(None in group.cells[fast.size] for _, fast in cells)
            body = []
            for label, fast in cells:
                full = group.cells[fast.size].get(None)
                row = {Column("multiplier" if alone else "batches", text=True): label}
                for score in (*SCORES, PERPLEXITY):
                    over = score if score == PERPLEXITY else score.upper()
                    if score == PERPLEXITY:
                        row[Column("before", over)] = _value(fast.before[score])
                    if compared:
                        row[Column(FULL, over)] = _value(full.after[score] if full else None)
                    row[Column("fast", over)] = _value(fast.after[score])
                row |= {Column(_LEAST): _least(fast.full)} if compared else {}
                body.append({**row, Column("keys"): f"{fast.cell['keys']:,}"})
            if body:
                titles.append(group.title + text)
                title = f"{titles[-1]} against the full precompute" if compared else titles[-1]
                note = _LEAST_NOTE if compared else "The full precompute has not been run."
                tables.append(_table("", title, body, f"Scores in percent; keys: preserved keys a layer. {note}"))
    return [replace(table, name=name) for name, table in zip(unique(map(slug, titles)), tables, strict=True)]


def paper_tables(groups: Sequence[Group]) -> list[Table]:
    """The paper's tables of the methods and multipliers that the groups have, one for each."""
    tables = []
    for method, multiplier in sorted({(group.method, m) for group in groups for m in group.multipliers}):
        rows = rows_for(method, multiplier)
        if not rows:
            continue
        body = []
        for row in rows:
            shown = {Column("model", text=True): row["model"], Column("table"): str(row["table"])}
            shown[Column("batch size")] = str(row["batch_size"])
            for name in NAMES:
                score, side = name.split("_")
                shown[Column(side, score.upper())] = f"{row[name]:.2f}{'*' if name in row['corrected'] else ''}"
            body.append({**shown, Column("fast / full", "S"): f"{row['s_fast'] / row['s_full']:.3f}"})
        note = "From arXiv 2506.04226."
        if any(row["corrected"] for row in rows):
            note += " * misprinted there, corrected from its other columns and tables."
        note += "".join(f" {doubt}." for doubt in dict.fromkeys(row["note"] for row in rows if row["note"]))
        title = f"The paper's {method.upper()}: multiplier {multiplier:g}"
        tables.append(_table(slug(f"paper {method} x{multiplier:g}"), title, body, note))
    return tables


def cells_table(groups: Sequence[Group]) -> Table:
    """Every cell with the 95 % intervals of its scores, under the unedited model."""
    before: list[dict[Column, str]] = []
    after: list[dict[Column, str]] = []
    compared = any(measured.full for measured in _cells(groups))
    for measured in _cells(groups):
        cell, count = measured.cell, str(len(measured.cell["records"]))
        for rows, name, keys, found, least in (
            (before, "unedited", "-", measured.before, "-"),
            (after, cell["key"], f"{cell['keys']:,}", measured.after, _least(measured.full)),
        ):
            row = {Column("cell", text=True): name, Column("keys"): keys, Column("records"): count}
            row |= {Column(score.upper()): _interval(found[score]) for score in SCORES}
            row |= {Column(PERPLEXITY): _value(found[PERPLEXITY])} | ({Column(_LEAST): least} if compared else {})
            if rows is after or row not in rows:  # the unedited model once for each set of records
                rows.append(row)
    note = "In brackets the 95 % bootstrap interval over records. keys: preserved keys a layer."
    note += f" {_LEAST_NOTE}" if compared else ""
    return _table("cells", "Every cell, with intervals", before + after, note)


def difference_tables(groups: Sequence[Group]) -> list[Table]:
    """Cells minus the full precompute, and settings minus those of the preset, paired by case."""
    against_full: list[dict[Column, str]] = []
    against_preset: list[dict[Column, str]] = []
    for cell in _cells(groups):
        for rows, other in ((against_full, cell.full), (against_preset, cell.plain)):
            if other is not None:
                row = {Column("cell", text=True): cell.cell["key"], Column("minus", text=True): other.other}
                row |= {Column(score.upper()): _interval(other.differences[score], 1, "+") for score in SCORES}
                cost = other.perplexity
                row[Column(f"{PERPLEXITY}, times")] = "-" if cost is None else f"{cost:,.2f}"
                rows.append({**row, Column("verdict", text=True): other.verdict})
    note = (
        "Differences in points, with the 95 % bootstrap interval over the records that both cells have. Not worse: no "
        f"interval ends lower than {MARGIN:g} points below zero, and perplexity is at most {1 / KEPT:.2f} times the "
        "other's. Worse: an interval lies lower than that as a whole. Open: it reaches to both sides. S is not judged, "
        "its parts are."
    )
    titles = {
        "against-full": ("Against the full precompute, paired", against_full),
        "against-preset": ("Against the settings of the preset", against_preset),
    }
    return [_table(name, title, rows, note) for name, (title, rows) in titles.items() if rows]


def sequence_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Sequences in Markdown, a row for each step: the scores over all facts, of the first hundred and the newest batch.

    Scores have their 95 % intervals where a line has its records, as lines of this version have. The lines are those of
    `run_sequences`, at least one.
    """
    measured = any(line["perplexity"] is not None for line in lines)
    written = any(line.get("entropy") is not None for line in lines)
    methods = list(dict.fromkeys(str(line["method"]) for line in lines if "method" in line))
    names = [*(["method"] if len(methods) > 1 else []), "multiplier", "edit keys", "facts"]
    names += [name.upper() for name in SCORES]
    names += [f"{name} {batch}" for batch in ("first", "newest") for name in ("S", "EA")]
    names += [*([PERPLEXITY] if measured else []), *(["entropy, bits"] if written else [])]
    rows = ["| " + " | ".join(names) + " |"]
    rows.append("|" + "---|" * (rows[0].count("|") - 1))
    for line in lines:
        sure = score_intervals(line["records"]) if line.get("records") else {}
        ends = {name: f" [{found.low:.2f}, {found.high:.2f}]" for name, found in sure.items() if found}
        cells = [method_title(line["method"])] if len(methods) > 1 else []
        cells += [multiplier_name(line["multiplier"]) if line.get("keys", 1) else "-"]
        cells += ["preserved" if line["preserve"] else "not preserved"]
        cells += [str(line["facts"]), *(_plain(line["scores"].get(name)) + ends.get(name, "") for name in SCORES)]
        cells += [
            _plain(scores.get(name)) for scores in (first_facts(line), line["by_batch"][-1]) for name in ("s", "ea")
        ]
        cells += [_plain(line["perplexity"])] if measured else []
        cells += [_plain(line.get("entropy"))] if written else []
        rows.append("| " + " | ".join(cells) + " |")
    last = max(lines, key=lambda line: line["facts"])
    before = ", ".join(f"{name.upper()} {_plain(last['before'].get(name))}" for name in SCORES)
    failed = sum(line["failed"] for line in lines if line["edits"] == last["edits"])
    note = f"The unedited model on the same {counted(last['facts'], 'fact')}: {before}. "
    note += f"first: the first {FIRST} facts or batch."
    if any("records" in line for line in lines):
        note += " In brackets the 95 % bootstrap interval over records."
    if failed:
        note += f" {counted(failed, 'batch', 'batches')} could not be written, because the model had broken down."
    return "\n".join([*rows, "", note, ""])


def answers(groups: Sequence[Group]) -> list[str]:
    """What a sweep says, in sentences: the unedited levels, and from which multiplier on the full precompute is kept.

    One for each size, whose records are others, and one for each group and size. Where full was not run, the scores at
    the largest multiplier.
    """
    found: list[str] = []
    unedited: dict[Size, str] = {}
    for group in groups:
        for size, row in sorted(group.cells.items()):
            most = row[None] if None in row else row[max(m for m in row if m is not None)]
            unedited[size] = f"Unedited, {size}: {_scores(most.before)}."
            shares: dict[float, Kept] = {}
            for m in sorted(m for m in row if m is not None):
                full = row[m].full
                if full is not None and full.kept is not None:
                    shares[m] = full.kept
            tried = ", ".join(map(multiplier_text, shares))
            enough = [m for m in shares if all(shares[n].share.value >= KEPT for n in shares if n >= m)]
            if not shares:
                at = multiplier_text(most.cell["multiplier"])
                text = f"at {at} {_scores(most.after)}"
            elif enough:
                first = multiplier_text(enough[0])
                text = f"from {first} on (of {tried}) at least {100 * KEPT:g} % of every score of full"
            else:
                last = shares[max(shares)]
                name = last.by if last.by == PERPLEXITY else last.by.upper()
                text = (
                    f"no multiplier of {tried} keeps {100 * KEPT:g} % of every score of full; "
                    f"{multiplier_text(max(shares))} keeps {100 * last.share.value:.1f} % of {name}"
                )
            found.append(f"{group.title}, {size}: {text}.")
    return [*(unedited[size] for size in sorted(unedited)), *found]


def _scores(values: Estimates) -> str:
    shown = [f"{name if name == PERPLEXITY else name.upper()} {found.value:.1f}"
             for name in (*("s", "ea", "pa", "na"), PERPLEXITY) if (found := values.get(name)) is not None]  # fmt: skip
    return ", ".join(shown) or "no score"


def first_facts(line: Mapping[str, Any]) -> Mapping[str, Any]:
    """Scores of the first `FIRST` facts of a step, or of the first batch where that is longer or alone on record."""
    size = max(FIRST, sum(row["batch"] == 0 for row in line.get("records", ())))
    return score_means([row["after"] for row in line["records"][:size]]) if line.get("records") else line["by_batch"][0]


def summary(groups: Sequence[Group]) -> str:
    """Cells for a terminal: S, EA and the least share of full, a line for each group and size."""
    multipliers: list[float | None] = [*sorted({m for group in groups for m in group.multipliers})]
    multipliers += [None] if any(group.has_full for group in groups) else []
    shown: list[tuple[str, Callable[[Measured], str]]] = [
        ("S", lambda cell: _value(cell.after["s"])),
        ("EA", lambda cell: _value(cell.after["ea"])),
    ]
    if any(cell.full for cell in _cells(groups)):
        shown.append((
            f"{_LEAST}, %",
            lambda cell: f"{100 * cell.full.kept.share.value:.1f}" if cell.full and cell.full.kept else "",
        ))  # fmt: skip
    lines = []
    for name, text in shown:
        lines.append([f"{name}, at multiplier", *map(multiplier_text, multipliers)])
        for group in groups:
            for size, row in sorted(group.cells.items()):
                values = [text(row[m]) if m in row else "" for m in multipliers]
                lines.append([f"{group.title}, {size}", *values])
    width = max(len(line[0]) for line in lines)
    return "\n".join((f"{line[0]:<{width}}" + "".join(f"{text:>8}" for text in line[1:])).rstrip() for line in lines)


def comparison_csv(groups: Sequence[Group], model: str) -> str:
    """All comparisons, measured on a model and the paper's, one row each, with every number unrounded."""
    rows: list[dict[str, Any]] = []
    for group in groups:
        for multiplier in group.multipliers:
            for fast in group.row(multiplier):
                full = group.cells[fast.size].get(None)
                row = {"source": "measured", "model": model, **_place_of(fast.cell), "settings": group.settings}
                for side, found in (("full", full and full.after), ("fast", fast.after), ("before", fast.before)):
                    for score in (*SCORES, PERPLEXITY):
                        if found and (estimate := found[score]) is not None:
                            row[f"{'ppl' if score == PERPLEXITY else score}_{side}"] = estimate.value
                rows.append(row | _kept(fast.full))
    wanted = {(group.method, m) for group in groups for m in group.multipliers}
    for row in paper_rows():
        if (row["method"], row["multiplier"]) in wanted:
            marks = [f"{name} printed as {row['printed'][name]:.2f}" for name in row["corrected"]]
            shown = {"source": f"paper, table {row['table']}", "multiplier": multiplier_text(row["multiplier"])}
            rows.append({**row, **shown, "note": "; ".join([*marks, *([row["note"]] if row["note"] else [])])})
    values = [f"{score}_{side}" for score in SCORES for side in ("full", "fast")]
    ends = ["kept", "kept_low", "kept_high", "kept_by", "ppl_before", "ppl_full", "ppl_fast"]
    return _csv(["source", "model", *_PLACE, *values, *ends, "note"], rows)


def cells_csv(groups: Sequence[Group]) -> str:
    """Every cell with its intervals and the means of everything that was measured, unrounded."""
    rows: list[dict[str, Any]] = []
    further: dict[str, None] = {}
    for measured in _cells(groups):
        cell = measured.cell
        settings = json.dumps(cell["settings"], sort_keys=True)
        row = {"key": cell["key"], **_place_of(cell), "settings": settings, "keys": cell["keys"]}
        row["records"] = len(cell["records"])
        for name in SCORES:
            row |= _ends(name, measured.after[name]) | _ends(f"{name}_before", measured.before[name])
            if measured.full:
                row |= _ends(f"{name}_minus_full", measured.full.differences[name])
        row |= _kept(measured.full)
        if cell["perplexity"]:
            row |= {"ppl_before": cell["perplexity"]["before"], "ppl_after": cell["perplexity"]["after"]}
        row["jitter"] = max(cell["jitter"].values(), default=0.0) if "jitter" in cell else None
        means = further_means(cell)
        further |= dict.fromkeys(means)
        rows.append(row | means)
    scores = [*SCORES, *(f"{score}_before" for score in SCORES), "kept", *(f"{score}_minus_full" for score in SCORES)]
    names = ["key", *_PLACE, "keys", "records", *(f"{score}{end}" for score in scores for end in ("", "_low", "_high"))]
    return _csv([*names, "kept_by", "ppl_before", "ppl_after", "jitter", *further], rows)


def _csv(names: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _csv_cell(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def _csv_cell(value: Any) -> Any:
    """A value that no spreadsheet takes for a formula: text that begins like one has an apostrophe before it."""
    if not isinstance(value, str) or not value.startswith(_FORMULA):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def multiplier_text(multiplier: float | None) -> str:
    """``2``, ``0.5``, or ``full`` for the full precompute."""
    return FULL if multiplier is None else f"{multiplier:g}"


def _cells(groups: Sequence[Group]) -> list[Measured]:
    return [cell for group in groups for _, row in sorted(group.cells.items()) for cell in row.values()]


def _place_of(cell: Cell) -> dict[str, Any]:
    place = {name: cast(Any, cell)[name] for name in _PLACE}
    return {**place, "multiplier": multiplier_text(cell["multiplier"])}


def _ends(name: str, found: Estimate | None) -> dict[str, float]:
    return {} if found is None else {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


def _kept(found: Against | None) -> dict[str, Any]:
    return {} if found is None or found.kept is None else {**_ends("kept", found.kept.share), "kept_by": found.kept.by}


def _value(found: Estimate | None) -> str:
    return "-" if found is None else f"{found.value:,.2f}"


def _plain(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if abs(value) < 1e5 else f"{value:.3g}"


def _interval(found: Estimate | None, digits: int = 2, sign: str = "") -> str:
    if found is None:
        return "-"
    numbers = (
        f"{round(end, digits) + 0.0:{sign}.{digits}f}" for end in (found.value, found.low, found.high)
    )  # no -0.0
    return "{} [{}, {}]".format(*numbers)


def _least(found: Against | None) -> str:
    """``0.62 (EA) [0.55, 0.69]``: which score it is, and the interval."""
    if found is None or found.kept is None:
        return "-"
    share, by = found.kept.share, found.kept.by
    return f"{share.value:.3f} ({by if by == PERPLEXITY else by.upper()}) [{share.low:.3f}, {share.high:.3f}]"
