"""Cells as a data frame, a row each: where it stands, its scores with intervals, and what it is compared with.

A group is what one of the paper's figures shows: one method with its settings, over multipliers and batch sizes. A cell
is compared with the full precompute of its place, and one with settings with that of the preset, where all else is
equal, paired by case. So is the last step of a sequence with the first sequence's after as many facts.

Columns are those of `Cell` or `Step`, its scores and perplexity as `Estimate` (``es``, and ``es_before`` of the
unedited model), and further:

* ``title`` of the group, and ``variant``, what tells it from the plain one of its method; ``size``, in words.
* ``run`` of a sequence, ``title``, what of it is not about earlier keys, and ``key``, its name after so many facts.
* ``full``, ``preset`` and ``first``, the keys of the other ones; with each, as with ``full``, the other's scores
  ``es_full``, and ``es_minus_full``, ``perplexity_over_full`` and ``verdict_full``.
* ``kept``, the least share of the full precompute's scores and perplexity, and ``kept_by``, whose it is.

The full precompute has the multiplier infinity. What does not exist is None.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas

from fastmemit.errors import BadData, counted
from fastmemit.evaluation.scores import SCORES, SHARES
from fastmemit.experiments.intervals import (
    PERPLEXITY,
    RESAMPLES,
    Estimate,
    difference_intervals,
    kept_share,
    score_intervals,
)
from fastmemit.experiments.results import Cell, Step, method_title, settings_name
from fastmemit.experiments.sweep import FULL, multiplier_name

#: Quality counts as kept from this share of the full precompute's on, as in the paper's figures, in each of ES, PS, NS,
#: EA, PA, NA and perplexity.
KEPT = 0.95
#: A cell is not worse than another where each score's interval of the difference ends above this many points below
#: zero. One of 64 facts is 1.6 points of EA.
MARGIN = 2.0
#: What tells groups from one another, and in a group the records.
GROUP, SIZE = ["method", "settings", "bos", "seed"], ["batch_size", "batches"]
PLACE = [*GROUP, "multiplier", *SIZE]
#: What a row takes over from a line, beside its scores; what else is there may have the name of another column.
FIELDS = {*Cell.__annotations__, *Step.__annotations__, "preserve", "targets"} - {"scores", "before"}
#: All that is measured of a cell, in the order in which it is shown.
MEASURED = (*SCORES, PERPLEXITY)

Row = dict[str, Any]


def measure(cells: Sequence[Cell], *, resamples: int = RESAMPLES) -> pandas.DataFrame:
    """Cells of one model, those of a group together and ordered by size; for the columns see above.

    Raises:
        BadData: Two cells stand in one place.
    """
    rows: dict[tuple[Any, ...], Row] = {}
    for cell in cells:
        settings = settings_name(cell["settings"])
        parts = (settings, "" if cell["bos"] else "without BOS", f"seed {cell['seed']}" if cell["seed"] else "")
        variant = ", ".join(filter(None, parts))
        row = {
            **_scored(cell, resamples),
            "settings_name": settings,
            "settings": json.dumps(cell["settings"], sort_keys=True),
            "multiplier": math.inf if cell["multiplier"] is None else cell["multiplier"],
            "title": ", ".join(filter(None, (method_title(cell["method"]), variant))),
            "variant": variant,
            "jitter": max(cell["jitter"].values(), default=0.0) if "jitter" in cell else None,
            "kept": None,
            "kept_by": None,
            "size": f"{counted(cell['batches'], 'batch', 'batches')} of {cell['batch_size']}",
        }
        other = rows.setdefault(_place(row), row)
        if other is not row:
            raise BadData(
                f"The cells {other['key']!r} and {cell['key']!r} have the same method, settings, batches and "
                "multiplier; remove one of them."
            )
    for row in rows.values():
        full, plain = rows.get(_place(row, multiplier=math.inf)), rows.get(_place(row, settings="{}"))
        compare(row, "full", None if full is row else full, resamples)
        compare(row, "preset", None if plain is row else plain, resamples)
    frame = _frame(rows.values())
    order = frame.groupby(GROUP, sort=False).ngroup()
    return frame.assign(group=order).sort_values(["group", *SIZE], kind="stable", ignore_index=True)


def measure_steps(lines: Sequence[Mapping[str, Any]], *, resamples: int = RESAMPLES) -> pandas.DataFrame:
    """Steps of sequences (`Step`), in their order; the last of each run is compared with the first run's.

    A run's name is ``run`` of its lines, or what tells it from the others: method, settings, multiplier, whether the
    keys of earlier edits are preserved, batches and targets, as far as they differ.

    Raises:
        BadData: Two runs have the same name.
    """
    names = ("method", "multiplier", "batch_size")
    several = {name for name in names if len({line.get(name) for line in lines}) > 1}
    # Once for each kind of targets that a method has.
    methods = [method for method, _ in {(line.get("method"), line.get("targets")) for line in lines}]
    rows: dict[tuple[str, int], Row] = {}
    for line in lines:
        alone, method, preserve = "method" not in several, line.get("method"), line["preserve"]
        parts = [
            "" if alone else method_title(method or ""),
            settings_name(line.get("settings", {})),
            multiplier_name(line["multiplier"]) if line.get("keys", 1) and (alone or "multiplier" in several) else "",
            f"batches of {size}" if (size := line.get("batch_size")) and "batch_size" in several else "",
            f"targets of the {source} model" if (source := line.get("targets")) and methods.count(method) > 1 else "",
        ]
        title = line.get("run") or ", ".join(filter(None, parts))
        keys = f"edit keys {'' if preserve else 'not '}preserved" if alone or preserve else ""
        run = line.get("run") or ", ".join(filter(None, (title, keys)))
        row = {
            **_scored(line, resamples),
            "run": run,
            "title": title,
            "key": f"{run}, {counted(line['facts'], 'fact')}",
        }
        row["settings"] = json.dumps(line.get("settings", {}), sort_keys=True)
        if rows.setdefault((run, line["facts"]), row) is not row:
            raise BadData(
                f"There are two sequences of {row['key']}, with the same settings; delete the lines of one of them, or "
                "report on them apart."
            )
    first = next(iter(rows))[0]
    last = {run: facts for run, facts in rows if (first, facts) in rows}
    for (run, facts), row in rows.items():
        compare(row, "first", rows[first, facts] if run != first and facts == last.get(run) else None, resamples)
    return _frame(rows.values())


def compare(row: Row, side: str, other: Row | None, resamples: int) -> None:
    """Give a row its columns of one that it shall not be worse than, on the cases that both have."""
    row[side] = None
    if other is None:
        return
    found = difference_intervals(row["records"], other["records"], resamples=resamples)
    costs = [each[PERPLEXITY] and each[PERPLEXITY].value for each in (row, other)]
    times = None if None in costs else costs[0] / costs[1]
    row |= {side: other["key"], **{f"{name}_{side}": other[name] for name in MEASURED}}
    row |= {f"{name}_minus_{side}": difference for name, difference in found.items()}
    row |= {f"{PERPLEXITY}_over_{side}": times, f"verdict_{side}": verdict(found, times)}
    if side == FULL:
        pair = None if times is None else (costs[0], costs[1])
        kept = kept_share(row["records"], other["records"], pair, resamples=resamples)
        row["kept"], row["kept_by"] = kept or (None, None)


def verdict(differences: Mapping[str, Estimate | None], perplexity: float | None) -> str:
    """Which scores are worse by more than the margin, and for which that is open.

    `perplexity` is after the edits, divided by the other's; one text has no interval.
    """
    found = {name: d for name in SHARES if (d := differences.get(name)) is not None}
    worse = [name.upper() for name, d in found.items() if d.high < -MARGIN]
    unsure = [name.upper() for name, d in found.items() if d.low < -MARGIN <= d.high]
    if perplexity is not None and not perplexity * KEPT <= 1:
        worse.append(PERPLEXITY)
    parts = [f"worse: {', '.join(worse)}"] if worse else []
    parts += [f"open: {', '.join(unsure)}"] if unsure else []
    return "; ".join(parts) or ("not worse" if found else "-")


def _scored(line: Mapping[str, Any], resamples: int) -> Row:
    """A cell or step with its scores, those before the edits, and its perplexity as estimates."""
    row = {name: value for name, value in line.items() if name in FIELDS}
    cost = line[PERPLEXITY]
    costs = {"": cost["after"], "_before": cost["before"]} if isinstance(cost, Mapping) else {"": cost}
    for end, when, scores in (("", "after", "scores"), ("_before", "before", "before")):
        values = {**line[scores], PERPLEXITY: costs.get(end)}
        sure = score_intervals(line["records"], when=when, resamples=resamples) if line.get("records") else {}
        for name in MEASURED:  # lines of earlier versions have no records, and so no intervals
            value = values.get(name)
            row[name + end] = sure[name] if name in sure else None if value is None else Estimate(*[value] * 3)
    return {"records": [], **row}


def _place(row: Mapping[str, Any], **other: Any) -> tuple[Any, ...]:
    return tuple({**row, **other}[name] for name in PLACE)


def _frame(rows: Iterable[Row]) -> pandas.DataFrame:
    """Rows with the columns of any of them; values stay what they are, and None where a row has none."""
    found = list(rows)
    names = dict.fromkeys(name for row in found for name in row)
    return pandas.DataFrame([{**dict.fromkeys(names), **row} for row in found], dtype=object)


def answers(cells: pandas.DataFrame) -> list[str]:
    """What a sweep says, in sentences: the unedited levels, and from which multiplier on the full precompute is kept.

    One for each size, whose records are others, and one for each group and size. Where full was not run, the scores at
    the largest multiplier. Of sequences, the scores after the last step of each.
    """
    if "run" in cells:
        most = cells.loc[cells["facts"].astype(int).idxmax()]
        ended = cells.drop_duplicates("run", keep="last").to_dict("records")
        level = f"Unedited, {counted(most['facts'], 'fact')}: {_said(most, '_before')}."
        return [level, *(f"{row['key']}: {_said(row)}." for row in ended)]
    unedited, found = {}, []
    for (_, *size), part in cells.groupby(["group", *SIZE]):
        part = part.sort_values("multiplier", kind="stable")
        most = part.iloc[-1]
        unedited[tuple(size)] = f"Unedited, {most['size']}: {_said(most, '_before')}."
        part = part[part["kept"].notna()]
        shares = [share.value for share in part["kept"]]
        texts = part["multiplier"].map(multiplier_text).tolist()
        # The multipliers above the last one that does not keep enough.
        enough = 1 + max((at for at, share in enumerate(shares) if share < KEPT), default=-1)
        if not shares:
            text = f"at {multiplier_text(most['multiplier'])} {_said(most)}"
        elif enough < len(shares):
            text = f"from {texts[enough]} on (of {', '.join(texts)}) at least {100 * KEPT:g} % of every score of full"
        else:
            text = (
                f"no multiplier of {', '.join(texts)} keeps {100 * KEPT:g} % of every score of full; {texts[-1]} keeps "
                f"{100 * shares[-1]:.1f} % of {head(part['kept_by'].iat[-1])}"
            )
        found.append(f"{most['title']}, {most['size']}: {text}.")
    return [*(unedited[size] for size in sorted(unedited)), *found]


def _said(row: Mapping[str, Any], end: str = "") -> str:
    names = ("s", "ea", "pa", "na", PERPLEXITY)
    shown = [f"{head(name)} {found.value:.1f}" for name in names if (found := row[name + end]) is not None]
    return ", ".join(shown) or "no score"


def summary(cells: pandas.DataFrame) -> list[list[str]]:
    """Cells for a terminal: S, EA and the least share of full, a line for each group and size under heads.

    Of sequences, the scores after the last step of each.
    """
    if "run" in cells:
        ended = cells.drop_duplicates("run", keep="last").to_dict("records")
        scores = [[f"{found.value:.2f}" if (found := row[name]) else "-" for name in MEASURED] for row in ended]
        rows = [[row["key"], *texts] for row, texts in zip(ended, scores, strict=True)]
        return [["after the last batch", *map(head, MEASURED)], *rows]
    shown = {"S": ("s", 1, 2), "EA": ("ea", 1, 2)}
    if cells[FULL].notna().any():
        shown["least share of full, %"] = ("kept", 100, 1)
    multipliers = sorted(set(cells["multiplier"]))
    lines = []
    for name, (column, times, digits) in shown.items():
        lines.append([f"{name}, at multiplier", *map(multiplier_text, multipliers)])
        for _, part in cells.groupby(["group", *SIZE]):
            values = dict(zip(part["multiplier"], part[column], strict=True))
            texts = [f"{times * found.value:.{digits}f}" if (found := values.get(m)) else "" for m in multipliers]
            lines.append([f"{part['title'].iat[0]}, {part['size'].iat[0]}", *texts])
    return lines


def further_means(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over records of what was measured besides `SHARES`, as ``before NAME``; of the numbers among it."""
    means: dict[str, float] = {}
    for when in ("before", "after"):
        sides = [record[when] for record in records]
        for name in sorted({name for side in sides for name in side} - {*SHARES}):
            numbers = [side[name] for side in sides if isinstance(side.get(name), (int, float))]
            if numbers:
                means[f"{when} {name}"] = math.fsum(numbers) / len(numbers)
    return means


def multiplier_text(multiplier: float | None) -> str:
    """``2``, ``0.5``, or ``full`` for the full precompute."""
    return FULL if multiplier in (None, math.inf) else f"{multiplier:g}"


def head(name: str) -> str:
    """A score as it is written: ``EA``, or ``perplexity``."""
    return name if name == PERPLEXITY else name.upper()
