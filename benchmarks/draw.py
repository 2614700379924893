"""Draws recorded runs of `python -m fastcov.bench` as SVG files, one for each suite.

    python benchmarks/draw.py benchmarks/results/bench-2core.json

writes docs/figures/bench-2core-rank_k.svg and so on. Every case is a panel, every contender a bar; what failed or could
not run has no bar. The files hold text and rectangles only, so that the same run gives the same bytes and a change of
figures can be read in a diff.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fastcov.bench.schema import BadInput, Row, Run, load  # noqa: E402

WIDTH, LABELS, VALUES = 820, 190, 150  # of the picture, of the names, of the numbers; pixels
LINE, TITLE, GAP = 20, 24, 14
COLOURS = {"ours": "#2b6cb0", "library": "#a0aec0", "released": "#a0aec0"}


@dataclass(frozen=True)
class Measure:
    """What the length of a bar says.

    Attributes:
        unit: As printed above the bars.
        value: Of a row that was timed.
        peak: Whether the measured peak is drawn as a line.
    """

    unit: str
    value: Callable[[Row], float]
    peak: bool = False


MEASURES = {
    "rank_k": Measure("useful GFLOP/s, longer is faster", lambda row: row.gflops or 0.0, True),
    "factor": Measure("milliseconds of one call, shorter is faster", lambda r: 1e3 * (r.p50 or 0)),
    "collect": Measure("tokens a second, longer is faster", lambda r: r.tokens_per_second or 0.0),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="files that --json wrote")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures")
    given = parser.parse_args(arguments)
    try:
        given.out.mkdir(parents=True, exist_ok=True)
        for path in given.runs:
            for suite, picture in pictures(load(path)).items():
                target = given.out / f"{path.stem}-{suite}.svg"
                target.write_text(picture, encoding="utf-8")
                print(target)
    except (BadInput, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def pictures(run: Run) -> dict[str, str]:
    """An SVG for each suite that has at least one timed row."""
    found = {}
    for suite, measure in MEASURES.items():
        rows = [row for row in run.rows if row.suite == suite and row.p50 is not None]
        if rows:
            found[suite] = _picture(run, rows, measure)
    return found


def _picture(run: Run, rows: Sequence[Row], measure: Measure) -> str:
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row.case, []).append(row)
    parts, y = [], GAP + 12
    place = run.machine.gpu or f"{run.machine.cpu}, {run.threads} threads"
    parts.append(_text(GAP, y, f"{place}; torch {run.versions.get('torch', '?')}", "bold"))
    parts.append(_text(GAP, y + 18, measure.unit))
    y += 18 + GAP
    for case, members in cases.items():
        panel, y = _panel(case, members, measure, y)
        parts += panel
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" '
        f'viewBox="0 0 {WIDTH} {y}" font-family="sans-serif" font-size="12">\n'
        f'<rect width="{WIDTH}" height="{y}" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


def _panel(case: str, rows: Sequence[Row], measure: Measure, y: int) -> tuple[list[str], int]:
    """The bars of one case, and where the next one begins."""
    peak = max((_peak(row) for row in rows), default=0.0) if measure.peak else 0.0
    longest = max([peak, *(measure.value(row) for row in rows)]) or 1.0
    scale = (WIDTH - LABELS - VALUES) / longest
    parts = [_text(GAP, y + 16, case, "bold")]
    y += TITLE
    if peak:  # beneath the numbers, which may reach over it
        x, bottom = LABELS + peak * scale, y + LINE * len(rows)
        parts.append(
            f'<line x1="{x:.1f}" y1="{y}" x2="{x:.1f}" y2="{bottom}" stroke="#c53030" stroke-dasharray="4 3"/>'
        )
        parts.append(_text(x + 4, bottom + 11, f"measured peak {_number(peak)}"))
    for row in rows:
        value = measure.value(row)
        name = f"{row.contender} ~" if row.inexact else row.contender
        ratio = "" if row.ratio is None or row.ratio == 1 else f"  ({row.ratio:.2f}x)"
        parts += [
            _text(LABELS - 6, y + 14, name, anchor="end"),
            f'<rect x="{LABELS}" y="{y + 3}" width="{max(1.0, value * scale):.1f}" '
            f'height="{LINE - 6}" fill="{COLOURS[row.kind]}"/>',
            _text(LABELS + value * scale + 6, y + 14, f"{_number(value)}{ratio}"),
        ]
        y += LINE
    if peak:
        y += LINE - 6
    return parts, y + GAP


def _peak(row: Row) -> float:
    if row.peak_before is None or row.peak_after is None:
        return 0.0
    return max(row.peak_before, row.peak_after)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _text(x: float, y: float, text: str, weight: str = "normal", anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-weight="{weight}" text-anchor="{anchor}" '
        'fill="#1a202c" stroke="#ffffff" stroke-width="3" paint-order="stroke">'
        f"{escape(text)}</text>"
    )


if __name__ == "__main__":
    raise SystemExit(main())
