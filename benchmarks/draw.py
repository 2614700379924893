"""Draws recorded runs of `python -m fastcov.bench` as SVG files, one for each suite.

    python benchmarks/draw.py benchmarks/results/bench-2core.json

writes docs/figures/bench-2core-rank_k.svg and so on. Every case is a panel, every contender a bar; what failed or could
not run has no bar. Text stays text, so that the same run gives the same bytes and a change of figures can be read in a
diff.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "python"):
    sys.path.insert(0, str(folder))

from benchmarks.recorded import load  # noqa: E402
from fastcov.bench.report import Row, Run, number  # noqa: E402
from fastcov.errors import BadInput  # noqa: E402
from fastmemit.experiments.plots import COLOURS, paper_style  # noqa: E402

_KINDS = {"ours": COLOURS[0], "library": "#a0aec0", "released": "#a0aec0"}
_BAR = 0.22  # inches
# By suite: what the length of a bar says, and of which row.
MEASURES: dict[str, tuple[str, Callable[[Row], float]]] = {
    "rank_k": ("useful GFLOP/s, longer is faster", lambda row: row.gflops or 0.0),
    "factor": ("milliseconds of one call, shorter is faster", lambda row: 1e3 * (row.p50 or 0)),
    "collect": ("tokens a second, longer is faster", lambda row: row.tokens_per_second or 0.0),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="files that --json wrote")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures")
    given = parser.parse_args(arguments)
    try:
        given.out.mkdir(parents=True, exist_ok=True)
        for path in given.runs:
            run = load(path)
            for suite in MEASURES:
                with paper_style():
                    import matplotlib

                    matplotlib.rcParams["svg.fonttype"] = "none"
                    if (figure := draw(run, suite)) is not None:
                        target = given.out / f"{path.stem}-{suite}.svg"
                        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
                        print(target)
    except (BadInput, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def draw(run: Run, suite: str) -> Any:
    """The figure of a suite, a panel a case; None where no row of it was timed."""
    from matplotlib.figure import Figure

    cases: dict[str, list[Row]] = {}
    for row in run.rows:
        if row.suite == suite and row.p50 is not None:
            cases.setdefault(row.case, []).append(row)
    if not cases:
        return None
    # "C += X^T X, float32 keys, n 4096, d 1536" is the column d 1536 of its row.
    table: dict[str, list[str]] = {}
    for case in cases:
        table.setdefault(case.rpartition(", ")[0], []).append(case)
    if len({len(row) for row in table.values()}) > 1:
        table = {case: [case] for case in cases}
    columns = len(next(iter(table.values())))
    heights = [max(len(cases[case]) for case in row) + 3 for row in table.values()]
    figure = Figure(figsize=(6.2 + 2.4 * (columns - 1), _BAR * sum(heights) + 0.6), layout="constrained")
    place = run.machine.gpu or f"{run.machine.cpu}, {run.threads} threads"
    figure.suptitle(f"{place}; torch {run.versions.get('torch', '?')}\n{MEASURES[suite][0]}", fontsize=10)
    panels = figure.subplots(len(table), columns, squeeze=False, height_ratios=heights)
    for line, row in zip(panels, table.values(), strict=True):
        for axes, case in zip(line, row, strict=True):
            first = case == row[0]
            named = first or [r.contender for r in cases[case]] != [r.contender for r in cases[row[0]]]
            _panel(axes, cases[case], MEASURES[suite][1], peak=suite == "rank_k", named=named)
            axes.set_title(case if first else case.rpartition(", ")[2], loc="left", fontsize=9)
    return figure


def _panel(axes: Any, rows: Sequence[Row], measure: Callable[[Row], float], *, peak: bool, named: bool) -> None:
    values = [measure(row) for row in rows]
    names = [f"{row.contender} ~" if row.inexact else row.contender for row in rows]
    measured = max(max(row.peak_before or 0.0, row.peak_after or 0.0) for row in rows) if peak else 0.0
    bars = axes.barh(range(len(rows)), values, color=[_KINDS[row.kind] for row in rows], height=0.7)
    ratios = ["" if row.ratio is None or row.ratio == 1 else f"  ({row.ratio:.2f}x)" for row in rows]
    texts = [f"{number(v)}{ratio}" for v, ratio in zip(values, ratios, strict=True)]
    # White behind the words: the line of the peak goes on under them.
    under = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.bar_label(bars, texts, padding=4, fontsize=8, bbox=under)
    end = 1.45 * max(values)
    if measured > 2 * end:  # the bars would be too short to compare
        axes.text(end, len(rows) - 0.1, f"peak {number(measured)}, off the scale", fontsize=7, ha="right", va="center")
    elif measured:
        end = max(end, 1.2 * measured)
        axes.axvline(measured, color=COLOURS[1], ls=(0, (4, 3)), lw=1, zorder=0)
        text = f"peak {number(measured)}"
        axes.text(measured, len(rows) - 0.1, text, fontsize=7, ha="center", va="center", bbox=under)
    axes.set_yticks(range(len(rows)), names if named else [""] * len(rows))
    axes.set_ylim(len(rows) + (0.3 if measured else -0.4), -0.6)
    axes.grid(False)
    axes.set_xlim(0, end)
    axes.set_xticks([])


if __name__ == "__main__":
    raise SystemExit(main())
