"""A report's tables and how they are written: each multiplier in the paper's shape, the paper's own, cells and steps.

The paper's shape is one table for each method and multiplier, one row for each batch size, and for each score a column
for the full precompute ("full") and one for few keys ("fast"). The paper has ES, PS, NS and S. A model that is broken
keeps half of these, so EA, PA, NA and perplexity stand beside them everywhere. Cells come as `frame.measure` has them.
"""

from __future__ import annotations

import csv
import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import groupby
from typing import Any, NamedTuple

import pandas

from fastmemit.errors import counted
from fastmemit.evaluation.scores import SCORES, score_means
from fastmemit.experiments.frame import KEPT, MARGIN, MEASURED, PLACE, further_means, head, multiplier_text
from fastmemit.experiments.intervals import PERPLEXITY, Estimate
from fastmemit.experiments.sweep import FULL

_LEAST = "least share of full"
_LEAST_NOTE = (
    "Least share of full: the smallest of ES, PS, NS, EA, PA and NA over the full precompute's, and of its perplexity "
    f"over this one; {KEPT:g} counts as kept."
)
_PRINTED = ("es", "ps", "ns", "s")  # the paper's scores
#: The columns of the paper's tables.
NAMES = tuple(f"{score}_{side}" for score in _PRINTED for side in ("full", "fast"))
#: What a spreadsheet begins a formula with, in every width; white space is dropped before it.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
FIRST = 100  # facts whose fate a sequence's table follows
_NARROW = 9  # a table of more columns does not fit the width of a page


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

    @classmethod
    def of(cls, name: str, title: str, columns: Mapping[Column, Iterable[str]], note: str) -> Table:
        """A table by its columns; without those of perplexity where none was measured."""
        texts = {column: tuple(values) for column, values in columns.items()}
        costs = [column for column in texts if column.over == PERPLEXITY or column.name.startswith(PERPLEXITY)]
        if all(text == "-" for column in costs for text in texts[column]):
            texts = {column: values for column, values in texts.items() if column not in costs}
        return cls(name, title, tuple(texts), tuple(zip(*texts.values(), strict=True)), note)

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


def comparison_tables(cells: pandas.DataFrame) -> list[Table]:
    """Every group against its full precompute: a table a multiplier, with a row for each size.

    A group of one size alone is one table, with a row for each multiplier.
    """
    titles, tables = [], []
    for _, group in cells.groupby("group"):
        alone = group["size"].nunique() == 1
        few = group[group["multiplier"] < math.inf]
        for _, part in few.groupby("group" if alone else "multiplier"):
            part = part.sort_values("multiplier", kind="stable")
            at, size = multiplier_text(part["multiplier"].iat[0]), part["size"].iat[0]
            titles.append(part["title"].iat[0] + (f", {size}" if alone else f": multiplier {at}"))
            columns = {Column("batches", text=True): part["size"]}
            if alone:
                columns = {Column("multiplier", text=True): part["multiplier"].map(multiplier_text)}
            # Without a full precompute there are no columns for it, which would hold nothing but dashes.
            compared = part[FULL].notna().any()
            for name in MEASURED:
                ends = {"before": "_before"} if name == PERPLEXITY else {}
                ends |= {FULL: "_full"} if compared else {}
                for side, end in {**ends, "fast": ""}.items():
                    columns[Column(side, head(name))] = part[name + end].map(_value)
            columns |= {Column(_LEAST): _least(part)} if compared else {}
            columns[Column("keys")] = part["keys"].map("{:,}".format)
            title = f"{titles[-1]} against the full precompute" if compared else titles[-1]
            note = _LEAST_NOTE if compared else "The full precompute has not been run."
            tables.append(Table.of("", title, columns, f"Scores in percent; keys: preserved keys a layer. {note}"))
    return [replace(table, name=name) for name, table in zip(unique(map(slug, titles)), tables, strict=True)]


def paper_tables(cells: pandas.DataFrame) -> list[Table]:
    """The paper's tables of the methods and multipliers that the cells have, one for each."""
    tables = []
    for method, multiplier in sorted(set(zip(cells["method"], cells["multiplier"], strict=True))):
        rows = rows_for(method, multiplier)
        if not rows:
            continue
        columns = {Column("model", text=True): [row["model"] for row in rows]}
        columns |= {
            Column(name.replace("_", " ")): [str(row[name]) for row in rows] for name in ("table", "batch_size")
        }
        for name in NAMES:
            score, side = name.split("_")
            marked = [f"{row[name]:.2f}{'*' if name in row['corrected'] else ''}" for row in rows]
            columns[Column(side, score.upper())] = marked
        columns[Column("fast / full", "S")] = [f"{row['s_fast'] / row['s_full']:.3f}" for row in rows]
        note = "From arXiv 2506.04226."
        if any(row["corrected"] for row in rows):
            note += " * misprinted there, corrected from its other columns and tables."
        note += "".join(f" {doubt}." for doubt in dict.fromkeys(row["note"] for row in rows if row["note"]))
        title = f"The paper's {method.upper()}: multiplier {multiplier:g}"
        tables.append(Table.of(slug(f"paper {method} x{multiplier:g}"), title, columns, note))
    return tables


def cells_table(cells: pandas.DataFrame) -> Table:
    """Every cell with the 95 % intervals of its scores, under the unedited model."""
    rows: dict[tuple[str, ...], None] = {}  # the unedited model once for each set of records
    columns: dict[Column, Iterable[str]] = {}
    compared = cells[FULL].notna().any()
    for end in ("_before", ""):
        nothing = ["-"] * len(cells) if end else []
        columns = {Column("cell", text=True): ["unedited"] * len(cells) if end else cells["key"]}
        columns[Column("keys")] = nothing or cells["keys"].map("{:,}".format)
        columns[Column("records")] = cells["records"].map(len).map(str)
        columns |= {Column(head(score)): cells[score + end].map(_interval) for score in SCORES}
        columns[Column(PERPLEXITY)] = cells[PERPLEXITY + end].map(_value)
        columns |= {Column(_LEAST): nothing or _least(cells)} if compared else {}
        rows |= dict.fromkeys(zip(*columns.values(), strict=True))
    note = "In brackets the 95 % bootstrap interval over records. keys: preserved keys a layer."
    note += f" {_LEAST_NOTE}" if compared else ""
    texts = dict(zip(columns, zip(*rows, strict=True), strict=True))
    return Table.of("cells", "Every cell, with intervals", texts, note)


def difference_tables(cells: pandas.DataFrame) -> list[Table]:
    """Cells minus the full precompute, settings minus those of the preset, runs minus the first one; paired by case."""
    note = (
        "Differences in points, with the 95 % bootstrap interval over the records that both cells have. Not worse: no "
        f"interval ends lower than {MARGIN:g} points below zero, and perplexity is at most {1 / KEPT:.2f} times the "
        "other's. Worse: an interval lies lower than that as a whole. Open: it reaches to both sides. S is not judged, "
        "its parts are."
    )
    titles = {FULL: "Against the full precompute, paired", "preset": "Against the settings of the preset"}
    titles["first"] = "Against the first sequence, paired"
    tables = []
    for side, title in titles.items():
        part = cells[cells[side].notna()] if side in cells else cells[:0]
        if len(part):
            columns = {Column("cell", text=True): part["key"], Column("minus", text=True): part[side]}
            for score in SCORES:
                columns[Column(head(score))] = [_interval(found, 1, "+") for found in part[f"{score}_minus_{side}"]]
            times = part[f"{PERPLEXITY}_over_{side}"]
            columns[Column(f"{PERPLEXITY}, times")] = ["-" if cost is None else f"{cost:,.2f}" for cost in times]
            columns[Column("verdict", text=True)] = part[f"verdict_{side}"]
            tables.append(Table.of(f"against-{side}", title, columns, note))
    return tables


def step_tables(steps: pandas.DataFrame) -> list[Table]:
    """Sequences: a row for each step, and what becomes of the oldest facts, a row for each run.

    The steps, at least one, have the scores over all facts, of the first hundred and of the newest batch.
    """
    rows = steps.to_dict("records")
    columns = {Column("run", text=True): steps["run"], Column("facts"): steps["facts"].map("{:,}".format)}
    for score in SCORES:  # lines of earlier versions have no records, and no intervals
        columns[Column(head(score))] = [(_interval if row["records"] else _value)(row[score]) for row in rows]
    for age, parts in (("first", map(_first_facts, rows)), ("newest", (row["by_batch"][-1] for row in rows))):
        scores = list(parts)
        columns |= {Column(f"{head(name)} {age}"): [_plain(part.get(name)) for part in scores] for name in ("s", "ea")}
    columns[Column(PERPLEXITY)] = steps[PERPLEXITY].map(_value)
    if any(row.get("entropy") is not None for row in rows):
        columns[Column("entropy, bits")] = [_plain(row.get("entropy")) for row in rows]
    last = max(rows, key=lambda row: row["facts"])
    before = ", ".join(f"{head(name)} {_value(last[f'{name}_before'])}" for name in SCORES)
    note = f"The unedited model on the same {counted(last['facts'], 'fact')}: {before}. "
    note += f"first: the first {FIRST} facts or batch."
    if len(multipliers := set(map(multiplier_text, steps["multiplier"]))) == 1:
        note += f" The multiplier is {multipliers.pop()}."  # not in a name where methods are
    if any(row["records"] for row in rows):
        note += " In brackets the 95 % bootstrap interval over records."
    if failed := sum(row["failed"] for row in rows if row["edits"] == last["edits"]):
        note += f" {counted(failed, 'batch', 'batches')} could not be written, because the model had broken down."

    def matches(scores: Iterable[Mapping[str, Any]]) -> str:
        return " ".join(_plain(one.get("ea"), 0) for one in scores)

    batches = {run: part["by_batch"].tolist() for run, part in steps.groupby("run", sort=False)}
    ages: dict[Column, Iterable[str]] = {
        Column("run", text=True): batches,
        Column("EA of each batch at the end, the oldest first", text=True): [matches(b[-1]) for b in batches.values()],
        Column("EA of the first batch, step by step", text=True): [
            matches(at_step[0] for at_step in b) for b in batches.values()
        ],
    }
    return [
        Table.of("steps", "Every step, with intervals", columns, note),
        Table.of("ages", "What becomes of the oldest facts", ages, "In percent."),
    ]


def _first_facts(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Scores of the first `FIRST` facts of a step, or of the first batch where that is longer or alone on record."""
    size = max(FIRST, sum(record.get("batch") == 0 for record in row["records"]))
    return score_means([record["after"] for record in row["records"][:size]]) if row["records"] else row["by_batch"][0]


def comparison_csv(cells: pandas.DataFrame, model: str) -> str:
    """All comparisons, measured on a model and the paper's, one row each, with every number unrounded."""
    ends = {"before": "_before", "full": "_full", "fast": ""}
    rows = []
    for row in _spread(cells[cells["multiplier"] < math.inf].sort_values(["group", "multiplier"], kind="stable")):
        row |= {f"{score}_{side}": row.get(score + ends[side]) for score in SCORES for side in ("full", "fast")}
        row |= {f"ppl_{side}": row.get(PERPLEXITY + end) for side, end in ends.items()}
        rows.append({**row, "source": "measured", "model": model, "settings": row["settings_name"]})
    wanted = set(zip(cells["method"], cells["multiplier"], strict=True))
    for row in paper_rows():
        if (row["method"], row["multiplier"]) in wanted:
            marks = [f"{name} printed as {row['printed'][name]:.2f}" for name in row["corrected"]]
            shown = {"source": f"paper, table {row['table']}", "multiplier": multiplier_text(row["multiplier"])}
            rows.append({**row, **shown, "note": "; ".join([*marks, *([row["note"]] if row["note"] else [])])})
    values = [f"{score}_{side}" for score in SCORES for side in ("full", "fast")]
    last = ["kept", "kept_low", "kept_high", "kept_by", "ppl_before", "ppl_full", "ppl_fast", "note"]
    return _csv(["source", "model", *PLACE, *values, *last], rows)


def cells_csv(cells: pandas.DataFrame) -> str:
    """Every cell with its intervals and the means of everything that was measured, unrounded."""
    rows, further = [], dict[str, None]()
    for row in _spread(cells):
        means = further_means(row["records"])
        further |= dict.fromkeys(means)
        costs = {"ppl_before": row[f"{PERPLEXITY}_before"], "ppl_after": row[PERPLEXITY]}
        rows.append({**row, **means, **costs, "records": len(row["records"])})
    other = "first" if "run" in cells else FULL
    scores = [score + end for end in ("", "_before") for score in SCORES]
    scores += ["kept", *(f"{score}_minus_{other}" for score in SCORES)]
    names = ["key", *PLACE, "keys", "records", *(f"{score}{end}" for score in scores for end in ("", "_low", "_high"))]
    return _csv([*names, "kept_by", "ppl_before", "ppl_after", "jitter", *further], rows)


def _spread(cells: pandas.DataFrame) -> list[dict[str, Any]]:
    """Cells with each estimate as three numbers, and multipliers in words."""
    rows = []
    for cell in cells.to_dict("records"):
        row: dict[str, Any] = {"multiplier": multiplier_text(cell.pop("multiplier"))}
        for name, value in cell.items():
            if isinstance(value, Estimate):
                row |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
            else:
                row[name] = value
        rows.append(row)
    return rows


def _csv(names: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    values = [[_csv_cell(row.get(name)) for name in names] for row in rows]
    return pandas.DataFrame(values, columns=names, dtype=object).to_csv(index=False, lineterminator="\n")


def _csv_cell(value: Any) -> Any:
    """A value that no spreadsheet takes for a formula: text that begins like one has an apostrophe before it."""
    if not isinstance(value, str) or not value.startswith(_FORMULA):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def _value(found: Estimate | None) -> str:
    return "-" if found is None else _plain(found.value)


def _plain(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _interval(found: Estimate | None, digits: int = 2, sign: str = "") -> str:
    if found is None:
        return "-"
    ends = (round(end, digits) + 0.0 for end in (found.value, found.low, found.high))  # no -0.0
    return "{} [{}, {}]".format(*(f"{end:{sign}.{digits}f}" for end in ends))


def _least(cells: pandas.DataFrame) -> list[str]:
    """``0.62 (EA) [0.55, 0.69]``: which score it is, and the interval."""
    return [
        "-" if share is None else f"{share.value:.3f} ({head(by)}) [{share.low:.3f}, {share.high:.3f}]"
        for share, by in zip(cells["kept"], cells["kept_by"], strict=True)
    ]
