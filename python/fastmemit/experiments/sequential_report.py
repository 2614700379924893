"""What sequences found, for people: a table in Markdown, and scores against facts as a figure."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from fastmemit.experiments.drawing import COLOURS, MARKERS, log_heights, paper_style
from fastmemit.experiments.grid import multiplier_name
from fastmemit.experiments.intervals import SCORES, Estimate, score_intervals

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Line = Mapping[str, Any]

_PANELS = ("es", "ea", "ps", "pa", "ns", "na", "s", "perplexity")  # two columns
_PANEL = (4.2, 3.0)  # inches
_PNG_DPI = 150


def markdown(lines: Sequence[Line]) -> str:
    """A row for each step: the scores over all facts, of the oldest and of the newest batch.

    Scores have their 95 % intervals where a line has its records, as lines of this version have.

    Args:
        lines: As `run_sequences` gives them, at least one.
    """
    measured = any(line["perplexity"] is not None for line in lines)
    lines = _with_intervals(lines)
    names = ["multiplier", "edit keys", "facts", *(name.upper() for name in SCORES)]
    names += [f"{name} {batch}" for batch in ("oldest", "newest") for name in ("S", "EA")]
    names += ["perplexity"] if measured else []
    rows = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for line in lines:
        cells = [
            multiplier_name(line["multiplier"]),
            "preserved" if line["preserve"] else "not preserved",
            str(line["facts"]),
            *(_shown(line, name) for name in SCORES),
            *(_number(line["by_batch"][at].get(name)) for at in (0, -1) for name in ("s", "ea")),
            *([_number(line["perplexity"])] if measured else []),
        ]
        rows.append("| " + " | ".join(cells) + " |")
    last = max(lines, key=lambda line: line["facts"])
    before = ", ".join(f"{name.upper()} {_number(last['before'].get(name))}" for name in SCORES)
    failed = sum(line["failed"] for line in lines if line["edits"] == last["edits"])
    note = f"The unedited model on the same {last['facts']} facts: {before}."
    if any("records" in line for line in lines):
        note += " In brackets the 95 % bootstrap interval over records."
    if failed:
        note += f" {failed} batches could not be written, because the model had broken down."
    return "\n".join([*rows, "", note, ""])


def figure(lines: Sequence[Line], title: str) -> tuple[bytes, bytes]:
    """Scores and perplexity against the number of facts written; as SVG and as PNG.

    A colour and marker for each multiplier; solid where the keys of earlier edits are preserved,
    dashed where they are not.  Bands are 95 % intervals over records; a score that no line has gets
    no panel.  The same lines give the same bytes.

    Args:
        lines: As `run_sequences` gives them, at least one.
        title: Above the panels.
    """
    from matplotlib.figure import Figure

    lines = _with_intervals(lines)
    panels = [p for p in _PANELS if any(_value(line, p) is not None for line in lines)]
    rows = math.ceil(len(panels) / 2)
    multipliers = list(dict.fromkeys(line["multiplier"] for line in lines))
    with paper_style():
        made = Figure(figsize=(2 * _PANEL[0], rows * _PANEL[1] + 0.8), layout="constrained")
        made.suptitle(title, fontsize=11)
        grid = list(made.subplots(rows, 2, squeeze=False).flat)
        for panel, axes in zip(panels, grid, strict=False):
            _draw(axes, panel, lines, multipliers)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        handles, labels = grid[0].get_legend_handles_labels()
        made.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=min(4, max(len(multipliers), 2)),
            handlelength=3,
            frameon=False,
            fontsize=8,
        )
        svg, png = io.BytesIO(), io.BytesIO()
        made.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        made.savefig(png, format="png", dpi=_PNG_DPI, metadata={"Software": None})
    return svg.getvalue(), png.getvalue()


def _draw(axes: Axes, panel: str, lines: Sequence[Line], multipliers: Sequence[float | None]) -> None:
    drawn: list[float] = []
    for preserve in (True, False):
        for number, multiplier in enumerate(multipliers):
            points = [
                (line["facts"], value, interval.low, interval.high)
                for line in lines
                if (line["multiplier"], line["preserve"]) == (multiplier, preserve)
                and (value := _value(line, panel)) is not None
                and math.isfinite(value)
                and (interval := line["intervals"].get(panel) or Estimate(value, value, value))
            ]
            if not points:
                continue
            name = multiplier_name(multiplier)
            facts, values, lows, highs = zip(*points, strict=True)
            colour = COLOURS[number % len(COLOURS)]
            axes.fill_between(facts, lows, highs, color=colour, alpha=0.12, lw=0)
            axes.plot(
                facts,
                values,
                color=colour,
                marker=MARKERS[number % len(MARKERS)],
                ls="-" if preserve else "--",
                mfc=None if preserve else "white",
                ms=4,
                lw=1.3,
                label=f"{name}, edit keys {'preserved' if preserve else 'not preserved'}",
            )
            drawn += [*lows, *highs]
    axes.set_xlabel("facts written")
    axes.set_xlim(left=0)
    if panel == "perplexity":
        axes.set_title("Perplexity")
        if drawn and max(drawn) > 5 * min(drawn):
            log_heights(axes)
        return
    axes.set_title(panel.upper())
    axes.set_ylabel("%")
    if drawn:
        room = max(0.06 * (max(drawn) - min(drawn)), 1.0)
        axes.set_ylim(max(-1.5, min(drawn) - room), min(101.5, max(drawn) + room))


def _value(line: Line, panel: str) -> float | None:
    if panel == "perplexity":
        return cast("float | None", line["perplexity"])
    return cast("float | None", line["scores"].get(panel))


def _with_intervals(lines: Sequence[Line]) -> list[Line]:
    """The lines, and what their records say of how sure each score is."""
    return [{**line, "intervals": score_intervals(line["records"]) if line.get("records") else {}} for line in lines]


def _shown(line: Line, name: str) -> str:
    """A score, with its interval where the records are there."""
    found = line["intervals"].get(name)
    ends = "" if found is None else f" [{found.low:.2f}, {found.high:.2f}]"
    return _number(line["scores"].get(name)) + ends


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if abs(value) < 1e5 else f"{value:.3g}"
