"""What sequences found, for people: a table in Markdown, and scores against facts as a figure."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastmemit.experiments.drawing import COLOURS, MARKERS, log_heights, paper_style
from fastmemit.experiments.grid import multiplier_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Line = Mapping[str, Any]

_SCORES = ("s", "es", "ps", "ns")
_PANEL = (4.2, 3.0)  # inches
_PNG_DPI = 150


def markdown(lines: Sequence[Line]) -> str:
    """A row for each step: the scores over all facts, of the oldest and of the newest batch.

    Args:
        lines: As `run_sequences` gives them, at least one.
    """
    measured = any(line["perplexity"] is not None for line in lines)
    names = ["multiplier", "edit keys", "facts", "ES", "PS", "NS", "S", "S oldest", "S newest"]
    names += ["perplexity"] if measured else []
    rows = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for line in lines:
        cells = [
            multiplier_name(line["multiplier"]),
            "preserved" if line["preserve"] else "not preserved",
            str(line["facts"]),
            *(_number(line["scores"][name]) for name in ("es", "ps", "ns", "s")),
            _number(line["by_batch"][0]["s"]),
            _number(line["by_batch"][-1]["s"]),
            *([_number(line["perplexity"])] if measured else []),
        ]
        rows.append("| " + " | ".join(cells) + " |")
    last = max(lines, key=lambda line: line["facts"])
    before = ", ".join(f"{name.upper()} {_number(last['before'][name])}" for name in _SCORES)
    failed = sum(line["failed"] for line in lines if line["edits"] == last["edits"])
    note = f"The unedited model on the same {last['facts']} facts: {before}."
    if failed:
        note += f" {failed} batches could not be written, because the model had broken down."
    return "\n".join([*rows, "", note, ""])


def figure(lines: Sequence[Line], title: str) -> tuple[bytes, bytes]:
    """Scores and perplexity against the number of facts written; as SVG and as PNG.

    A colour and marker for each multiplier; solid where the keys of earlier edits are preserved,
    dashed where they are not.  The same lines give the same bytes.

    Args:
        lines: As `run_sequences` gives them, at least one.
        title: Above the panels.
    """
    from matplotlib.figure import Figure

    measured = any(line["perplexity"] is not None for line in lines)
    panels = [*_SCORES, *(["perplexity"] if measured else [])]
    columns = 2 if len(panels) == 4 else 3
    multipliers = list(dict.fromkeys(line["multiplier"] for line in lines))
    with paper_style():
        made = Figure(figsize=(columns * _PANEL[0], 2 * _PANEL[1] + 0.8), layout="constrained")
        made.suptitle(title, fontsize=11)
        grid = list(made.subplots(2, columns, squeeze=False).flat)
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


def _draw(
    axes: Axes, panel: str, lines: Sequence[Line], multipliers: Sequence[float | None]
) -> None:
    drawn: list[float] = []
    for preserve in (True, False):
        for number, multiplier in enumerate(multipliers):
            points = [
                (line["facts"], value)
                for line in lines
                if (line["multiplier"], line["preserve"]) == (multiplier, preserve)
                and (value := _value(line, panel)) is not None
                and math.isfinite(value)
            ]
            if not points:
                continue
            name = multiplier_name(multiplier)
            axes.plot(
                *zip(*points, strict=True),
                color=COLOURS[number % len(COLOURS)],
                marker=MARKERS[number % len(MARKERS)],
                ls="-" if preserve else "--",
                mfc=None if preserve else "white",
                ms=4,
                lw=1.3,
                label=f"{name}, edit keys {'preserved' if preserve else 'not preserved'}",
            )
            drawn += [value for _, value in points]
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
    found: float | None = line["perplexity"] if panel == "perplexity" else line["scores"][panel]
    return found


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if abs(value) < 1e5 else f"{value:.3g}"
