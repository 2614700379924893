"""The report's tables: each multiplier in the paper's shape, the paper's own, and every cell.

The paper's shape is one table for each method and multiplier, one row for each batch size, and for each score a column
for the full precompute ("full") and one for few keys ("fast"). The paper has ES, PS, NS and S. A model that is broken
keeps half of these, so EA, PA, NA and perplexity stand beside them everywhere.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fastmemit.evaluation.perplexity import Perplexity
from fastmemit.experiments.comparison import KEPT, MARGIN, Against, Group, Measured, further_means
from fastmemit.experiments.folders import multiplier_text
from fastmemit.experiments.intervals import PERPLEXITY, SCORES, Estimate
from fastmemit.experiments.layout import Column, Table, slug, unique
from fastmemit.experiments.paper import NAMES, PaperRow, paper_rows, rows_for

_PAPER = ("es", "ps", "ns", "s")
_PRINTED = tuple(Column(side, score.upper()) for score in _PAPER for side in ("full", "fast"))
_COMPARED = tuple(Column(side, score.upper()) for score in SCORES for side in ("full", "fast"))
_PERPLEXITY = tuple(Column(name, "perplexity") for name in ("before", "full", "fast"))
_LEAST = "least share of full"
_PLACE = ("method", "settings", "bos", "seed", "multiplier", "batch_size", "batches")
#: What a spreadsheet begins a formula with, in every width; white space is dropped before it.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
_PPL = ("ppl_before", "ppl_full", "ppl_fast")
_DIFFERENCES = tuple(f"{score}_minus_full" for score in SCORES)
_LEAST_NOTE = (
    "Least share of full: the smallest of ES, PS, NS, EA, PA and NA over the full precompute's, "
    f"and of its perplexity over this one; {KEPT:g} counts as kept."
)


def comparison_tables(groups: Sequence[Group]) -> list[Table]:
    """Every group against its full precompute: a table a multiplier, with a row for each size.

    A group of one size alone is one table, with a row for each multiplier.
    """
    parts: list[tuple[str, list[tuple[str, Measured]], Group]] = []
    for group in groups:
        if len(group.cells) == 1:
            ((size, row),) = group.cells.items()
            rows = [(multiplier_text(m), row[m]) for m in group.multipliers]
            parts += [(f"{group.title}, {size}", rows, group)] if rows else []
            continue
        for multiplier in group.multipliers:
            rows = [(str(cell.size), cell) for cell in group.row(multiplier)]
            parts.append((f"{group.title}: multiplier {multiplier_text(multiplier)}", rows, group))
    names = unique(slug(title) for title, _, _ in parts)
    return [
        _comparison(name, f"{title} against the full precompute", rows, group)
        for name, (title, rows, group) in zip(names, parts, strict=True)
    ]


def paper_tables(groups: Sequence[Group]) -> list[Table]:
    """The paper's tables of the methods and multipliers that the groups have, one for each."""
    wanted = sorted({(group.method, m) for group in groups for m in group.multipliers})
    return [_paper(method, multiplier, rows) for method, multiplier in wanted if (rows := rows_for(method, multiplier))]


def cells_table(groups: Sequence[Group]) -> Table:
    """Every cell with the 95 % intervals of its scores, under the unedited model."""
    cells = _cells(groups)
    columns = [Column("cell", text=True), Column("keys"), Column("records")]
    columns += [Column(name.upper()) for name in SCORES]
    measured = any(cell.perplexity for cell in cells)
    columns += [Column("perplexity")] if measured else []
    columns += [Column(_LEAST)]
    rows: dict[tuple[str, ...], None] = {}
    for cell in cells:
        row = ["unedited", "-", str(len(cell.cell["records"]))]
        row += [_interval(cell.before[name]) for name in SCORES]
        row += [_ppl(cell, "before")] if measured else []
        rows[tuple([*row, "-"])] = None  # once for each set of records
    for cell in cells:
        row = [cell.cell["key"], f"{cell.cell['keys']:,}", str(len(cell.cell["records"]))]
        row += [_interval(cell.after[name]) for name in SCORES]
        row += [_ppl(cell, "after")] if measured else []
        rows[tuple([*row, _least(cell.full)])] = None
    note = "In brackets the 95 % bootstrap interval over records. keys: preserved keys a layer. "
    title = "Every cell, with intervals"
    return Table("cells", title, tuple(columns), tuple(rows), note + _LEAST_NOTE)


def difference_tables(groups: Sequence[Group]) -> list[Table]:
    """Cells minus the full precompute, and settings minus those of the preset, paired by case."""
    cells = _cells(groups)
    parts = [
        ("against-full", "Against the full precompute, paired", [(c, c.full) for c in cells]),
        ("against-preset", "Against the settings of the preset", [(c, c.plain) for c in cells]),
    ]
    return [
        _differences(name, title, [(cell, other) for cell, other in pairs if other is not None])
        for name, title, pairs in parts
        if any(other is not None for _, other in pairs)
    ]


def _differences(name: str, title: str, pairs: Sequence[tuple[Measured, Against]]) -> Table:
    measured = any(other.perplexity is not None for _, other in pairs)
    columns = [Column("cell", text=True), Column("minus", text=True)]
    columns += [Column(score.upper()) for score in SCORES]
    columns += [Column("perplexity, times")] if measured else []
    columns += [Column("verdict", text=True)]
    rows = []
    for cell, other in pairs:
        row = [cell.cell["key"], other.other]
        row += [_interval(other.differences[score], 1, "+") for score in SCORES]
        if measured:
            row.append("-" if other.perplexity is None else f"{other.perplexity:,.2f}")
        rows.append((*row, other.verdict))
    note = (
        "Differences in points, with the 95 % bootstrap interval over the records that both cells "
        f"have. Not worse: no interval ends lower than {MARGIN:g} points below zero, and "
        f"perplexity is at most {1 / KEPT:.2f} times the other's. Worse: an interval lies lower "
        "than that as a whole. Open: it reaches to both sides. S is not judged, its parts are."
    )
    return Table(name, title, tuple(columns), tuple(rows), note)


def summary(groups: Sequence[Group]) -> str:
    """Cells for a terminal: S, EA and the least share of full, a line for each group and size."""
    order = sorted({m for group in groups for m in group.multipliers})
    multipliers: list[float | None] = [*order]
    multipliers += [None] if any(group.has_full for group in groups) else []
    shown: list[tuple[str, Callable[[Measured], str]]] = [
        ("S", lambda cell: _value(cell.after["s"])),
        ("EA", lambda cell: _value(cell.after["ea"])),
    ]
    if any(cell.full for cell in _cells(groups)):
        shown.append((f"{_LEAST}, %", lambda cell: _percent(cell.full)))
    lines = []
    for name, text in shown:
        lines.append([f"{name}, at multiplier", *(multiplier_text(m) for m in multipliers)])
        for group in groups:
            for size, row in sorted(group.cells.items()):
                values = [text(row[m]) if m in row else "" for m in multipliers]
                lines.append([f"{group.title}, {size}", *values])
    width = max(len(line[0]) for line in lines)
    return "\n".join((f"{line[0]:<{width}}" + "".join(f"{text:>8}" for text in line[1:])).rstrip() for line in lines)


def comparison_csv(groups: Sequence[Group], model: str) -> str:
    """All comparisons, measured and the paper's, one row each, with every number unrounded.

    Args:
        groups: What was measured.
        model: The name of the model it was measured on.
    """
    wanted = {(group.method, m) for group in groups for m in group.multipliers}
    rows: list[dict[str, Any]] = []
    for group in groups:
        for multiplier in group.multipliers:
            rows += [{"model": model} | _flat(group, fast) for fast in group.row(multiplier)]
    for row in paper_rows():
        if (row.method, row.multiplier) in wanted:
            rows.append(
                {"source": f"paper, table {row.table}", "model": row.model, "method": row.method}
                | {"multiplier": multiplier_text(row.multiplier), "batch_size": row.batch_size}
                | {name: row.value(name) for name in NAMES}
                | {"note": _marks(row)}
            )
    values = [f"{score}_{side}" for score in SCORES for side in ("full", "fast")]
    names = ["source", "model", *_PLACE, *values, *_names("kept"), "kept_by", *_PPL, "note"]
    return _csv(names, rows)


def cells_csv(groups: Sequence[Group]) -> str:
    """Every cell with its intervals and the means of everything that was measured, unrounded."""
    rows: list[dict[str, Any]] = []
    further: dict[str, None] = {}
    for measured in _cells(groups):
        cell = measured.cell
        row: dict[str, Any] = {name: cell[name] for name in ("key", "method", "bos", "seed")}
        row |= {"settings": json.dumps(cell["settings"], sort_keys=True), "keys": cell["keys"]}
        row |= {"multiplier": multiplier_text(cell["multiplier"])}
        row |= {"batch_size": cell["batch_size"], "batches": cell["batches"]}
        row |= {"records": len(cell["records"])}
        for name in SCORES:
            row |= _ends(name, measured.after[name]) | _ends(f"{name}_before", measured.before[name])
        row |= _kept(measured.full)
        if measured.full:
            for score, column in zip(SCORES, _DIFFERENCES, strict=True):
                row |= _ends(column, measured.full.differences[score])
        perplexity = measured.perplexity
        if perplexity:
            row |= {"ppl_before": perplexity["before"], "ppl_after": perplexity["after"]}
        row |= {"jitter": max(cell["jitter"].values(), default=0.0) if "jitter" in cell else None}
        means = further_means(cell)
        further |= dict.fromkeys(means)
        rows.append(row | means)
    scores = [*SCORES, *(f"{score}_before" for score in SCORES), "kept", *_DIFFERENCES]
    ends = [name for score in scores for name in _names(score)]
    names = ["key", *_PLACE, "keys", "records", *ends, "kept_by", "ppl_before", "ppl_after"]
    names += ["jitter"]
    return _csv([*names, *further], rows)


def _comparison(name: str, title: str, rows: Sequence[tuple[str, Measured]], group: Group) -> Table:
    body = []
    ppl = any(fast.perplexity for _, fast in rows)
    for label, fast in rows:
        full = group.cells[fast.size].get(None)
        row = [label]
        for score in SCORES:
            row += [_value(full.after[score] if full else None), _value(fast.after[score])]
        if ppl:
            row += [_ppl(fast, "before"), _ppl(full, "after"), _ppl(fast, "after")]
        body.append((*row, _least(fast.full), f"{fast.cell['keys']:,}"))
    note = f"Scores in percent; keys: preserved keys a layer. {_LEAST_NOTE}"
    if not group.has_full:
        note += " The full precompute has not been run."
    first = Column("multiplier" if len(group.cells) == 1 else "batches", text=True)
    columns = (first, *_COMPARED, *(_PERPLEXITY if ppl else ()), Column(_LEAST), Column("keys"))
    return Table(name, title, columns, tuple(body), note)


def _paper(method: str, multiplier: float, rows: Sequence[PaperRow]) -> Table:
    def text(row: PaperRow, name: str) -> str:
        return f"{row.value(name):.2f}{'*' if name in row.corrected else ''}"

    body = tuple(
        (
            row.model,
            str(row.table),
            f"{row.batch_size}",
            *(text(row, name) for name in NAMES),
            f"{row.value('s_fast') / row.value('s_full'):.3f}",
        )
        for row in rows
    )
    note = "From arXiv 2506.04226."
    if any(row.corrected for row in rows):
        note += " * misprinted there, corrected from its other columns and tables."
    for doubt in dict.fromkeys(row.note for row in rows if row.note):
        note += f" {doubt}."
    heads = (Column("model", text=True), Column("table"), Column("batch size"), *_PRINTED)
    heads += (Column("fast / full", "S"),)
    title = f"The paper's {method.upper()}: multiplier {multiplier:g}"
    return Table(slug(f"paper {method} x{multiplier:g}"), title, heads, body, note)


def _cells(groups: Sequence[Group]) -> list[Measured]:
    return [cell for group in groups for _, row in sorted(group.cells.items()) for cell in row.values()]


def _flat(group: Group, fast: Measured) -> dict[str, Any]:
    full = group.cells[fast.size].get(None)
    row: dict[str, Any] = {
        "source": "measured",
        "method": group.method,
        "settings": group.settings,
        "bos": group.bos,
        "seed": group.seed,
        "multiplier": multiplier_text(fast.cell["multiplier"]),
        "batch_size": fast.size.batch_size,
        "batches": fast.size.batches,
    }
    for score in SCORES:
        for side, cell in (("full", full), ("fast", fast)):
            found = cell.after[score] if cell else None
            row[f"{score}_{side}"] = found.value if found else None
    row |= _kept(fast.full)
    if fast.perplexity:
        row |= {"ppl_before": fast.perplexity["before"], "ppl_fast": fast.perplexity["after"]}
    if full and full.perplexity:
        row["ppl_full"] = full.perplexity["after"]
    return row


def _marks(row: PaperRow) -> str:
    parts = [f"{name} printed as {row.printed[name]:.2f}" for name in row.corrected]
    return "; ".join([*parts, *([row.note] if row.note else [])])


def _names(name: str) -> tuple[str, str, str]:
    return name, f"{name}_low", f"{name}_high"


def _ends(name: str, found: Estimate | None) -> dict[str, float]:
    if found is None:
        return {}
    return dict(zip(_names(name), (found.value, found.low, found.high), strict=True))


def _csv(names: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _csv_cell(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def _csv_cell(value: Any) -> Any:
    """A value that a spreadsheet takes for text or a number, and never for a formula.

    Text that begins as a formula gets an apostrophe before it, as a spreadsheet itself marks text.
    """
    if not isinstance(value, str) or not value.startswith(_FORMULA):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def _value(found: Estimate | None) -> str:
    return "-" if found is None else f"{found.value:.2f}"


def _interval(found: Estimate | None, digits: int = 2, sign: str = "") -> str:
    if found is None:
        return "-"
    ends = (found.value, found.low, found.high)
    numbers = (f"{round(end, digits) + 0.0:{sign}.{digits}f}" for end in ends)  # no -0.0
    return "{} [{}, {}]".format(*numbers)


def _least(found: Against | None) -> str:
    """``0.62 (EA) [0.55, 0.69]``: which score it is, and the interval."""
    if found is None or found.kept is None:
        return "-"
    share, by = found.kept.share, found.kept.by
    name = by if by == PERPLEXITY else by.upper()
    return f"{share.value:.3f} ({name}) [{share.low:.3f}, {share.high:.3f}]"


def _percent(found: Against | None) -> str:
    return "" if found is None or found.kept is None else f"{100 * found.kept.share.value:.1f}"


def _kept(found: Against | None) -> dict[str, Any]:
    if found is None or found.kept is None:
        return {}
    return {**_ends("kept", found.kept.share), "kept_by": found.kept.by}


def _ppl(measured: Measured | None, when: str) -> str:
    found: Perplexity | None = measured.perplexity if measured else None
    return "-" if found is None else f"{found['before' if when == 'before' else 'after']:,.2f}"
