"""How one figure is drawn: panels of lines over multipliers, the full precompute at infinity.

Dashed lines stand at 95 % of what the full precompute reaches, and at its perplexity over that share; 95 % intervals
are bars. Colours are those of Okabe and Ito, which readers with any colour vision can tell apart; markers differ as
well. The same cells give the same bytes: no date is written, identifiers are salted with a constant, and the font comes
with matplotlib.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastmemit.errors import BadConfig
from fastmemit.experiments.comparison import KEPT, Measured
from fastmemit.experiments.folders import multiplier_text
from fastmemit.experiments.intervals import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^DvPX"
_PANEL = (4.6, 3.1)  # inches
_PNG_DPI = 150
#: Above this many multipliers, or with one below 1, the axis is logarithmic, else evenly spaced.
_EVENLY = 6
_DECADES = 1e3  # up to this ratio of the ends of a logarithmic axis there is room between decades
_LABEL = 0.085  # the least distance of two labels, as a share of the axis
_STYLE: dict[str, Any] = {
    "svg.hashsalt": "fastmemit",
    "svg.fonttype": "path",
    "text.parse_math": False,  # a name may hold a dollar sign
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
}


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        name: Its title.
        read: The value of a cell.
        perplexity: Whether the value is a perplexity, which has no interval and no upper end, and not a score in
            percent.
    """

    name: str
    read: Callable[[Measured], Estimate | None]
    perplexity: bool = False


@dataclass(frozen=True)
class Line:
    """One line, in every panel.

    Attributes:
        label: In the legend.
        cells: By multiplier; None is the full precompute.
        colour: Which colour and marker it has, counted from 0.
        dashed: Whether the line is broken.
        kept: Whether a dashed line stands at 95 % of its full precompute.
    """

    label: str
    cells: dict[float | None, Measured]
    colour: int
    dashed: bool = False
    kept: bool = True


@dataclass(frozen=True)
class Drawing:
    """A figure before it is drawn: panels with the same lines.

    Attributes:
        name: For a file; not yet unique.
        title: Above the panels.
        panels: From left to right, then down.
        lines: In the order of the legend.
    """

    name: str
    title: str
    panels: tuple[Panel, ...]
    lines: tuple[Line, ...]


def check_matplotlib() -> None:
    """Refuse to begin without the library that draws.

    Raises:
        BadConfig: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise BadConfig('Figures need the package matplotlib; pip install "fastmemit[report]".') from None


def render(drawing: Drawing, model: str) -> tuple[bytes, bytes]:
    """Draw a figure.

    Args:
        drawing: What it shows.
        model: The model's name, for the title.

    Returns:
        The figure as SVG and as PNG.
    """
    with paper_style():
        figure = _draw(drawing, model)
        figure.draw_without_rendering()  # lays everything out, once for both files
        figure.set_layout_engine("none")
        svg, png = io.BytesIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(png, format="png", dpi=_PNG_DPI, metadata={"Software": None})
    return svg.getvalue(), png.getvalue()


@contextmanager
def paper_style() -> Iterator[None]:
    """The library's defaults and ours, whatever the user's matplotlibrc says."""
    import matplotlib.style

    with matplotlib.style.context(["default", _STYLE]):
        yield


def _draw(drawing: Drawing, model: str) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = min(2, len(drawing.panels))
    rows = math.ceil(len(drawing.panels) / columns)
    lines_of_legend = math.ceil((len(drawing.lines) + 1) / 3)
    size = (columns * _PANEL[0], rows * _PANEL[1] + 0.5 + 0.25 * lines_of_legend)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(f"{model}: {drawing.title}", fontsize=11)
    axis = _Multipliers(drawing.lines)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, axes in zip(drawing.panels, grid, strict=False):
        _draw_panel(axes, panel, drawing.lines, axis)
    for axes in grid[len(drawing.panels) :]:
        axes.set_axis_off()
    handles = [
        Line2D([], [], color=_colour(line), marker=_marker(line), ls=_dash(line), label=line.label)
        for line in drawing.lines
    ]
    if axis.has_full:
        label = f"{100 * KEPT:g} % of the full precompute"
        handles.append(Line2D([], [], color="#555555", ls=(0, (5, 3)), lw=0.9, label=label))
    short = all(len(line.label) < 28 for line in drawing.lines)
    figure.legend(
        handles=handles, loc="outside lower center", ncols=4 if short else 3, handlelength=3, frameon=False, fontsize=8
    )
    return figure


class _Multipliers:
    """Where multipliers stand on the axis; the full precompute is its right end."""

    def __init__(self, lines: Sequence[Line]) -> None:
        found = {multiplier for line in lines for multiplier in line.cells}
        self.has_full = None in found
        self.values = sorted(m for m in found if m is not None)
        self.logarithmic = bool(self.values) and (len(self.values) > _EVENLY or self.values[0] < 1)
        places = [self._finite(m) for m in self.values]
        self.first = places[0] if places else 0.0
        last = places[-1] if places else -1.0
        self.end = last + max(0.14 * (last - self.first), 0.25) if self.logarithmic else last + 1
        self.last = self.end if self.has_full else last
        self.width = max(self.last - self.first, 1e-9)

    def _finite(self, multiplier: float) -> float:
        return math.log10(multiplier) if self.logarithmic else self.values.index(multiplier)

    def at(self, multiplier: float | None) -> float:
        return self.end if multiplier is None else self._finite(multiplier)

    def label(self, axes: Axes) -> None:
        """Ticks for all, labels for those that have room."""
        ticks: list[float | None] = [*self.values, *([None] if self.has_full else [])]
        labels, kept = [], math.inf
        for tick in reversed(ticks):  # from the right, where the full precompute has its label
            roomy = kept - self.at(tick) >= _LABEL * self.width or not self.logarithmic
            labels.append(("\u221e" if tick is None else multiplier_text(tick)) if roomy else "")
            kept = self.at(tick) if roomy else kept
        axes.set_xticks([self.at(tick) for tick in ticks], labels[::-1])
        margin = 0.05 * self.width + (0 if self.logarithmic else 0.1)
        axes.set_xlim(self.first - margin, self.last + margin)
        if self.has_full and self.values:
            middle = (self.at(self.values[-1]) + self.end) / 2
            axes.axvline(middle, color="#bbbbbb", lw=0.8, ls=":")
        axes.set_xlabel("multiplier" + (" (\u221e: full precompute)" if self.has_full else ""))


def _draw_panel(axes: Axes, panel: Panel, lines: Sequence[Line], multipliers: _Multipliers) -> None:
    heights: list[float] = []
    # On an even axis the bars of lines that meet are set beside one another. On a logarithmic one
    # a multiplier stands where it stands, and intervals are bands.
    step = 0.0 if multipliers.logarithmic else 0.012 * multipliers.width
    for index, line in enumerate(lines):
        shift = step * (index - (len(lines) - 1) / 2)
        points = [
            (multipliers.at(multiplier) + shift, found)
            for multiplier, cell in line.cells.items()
            if (found := panel.read(cell)) is not None and math.isfinite(found.value)
        ]
        points.sort(key=lambda point: point[0])
        _draw_line(axes, line, points, bars=not multipliers.logarithmic)
        heights += [end for _, found in points for end in (found.low, found.high)]
        full = panel.read(line.cells[None]) if None in line.cells else None
        if line.kept and full is not None and math.isfinite(full.value):
            kept = full.value / KEPT if panel.perplexity else KEPT * full.value
            axes.axhline(kept, color=_colour(line), ls=(0, (5, 3)), lw=0.7)
            heights.append(kept)
    axes.set_title(panel.name)
    multipliers.label(axes)
    if panel.perplexity:
        _perplexity_axis(axes, lines, heights)
    elif heights:
        low, high = min(heights), max(heights)
        room = max(0.06 * (high - low), 1.0)
        axes.set_ylim(max(-1.5, low - room), min(101.5, high + room))
        axes.set_ylabel("%")


def _draw_line(axes: Axes, line: Line, points: Sequence[tuple[float, Estimate]], *, bars: bool) -> None:
    places = [x for x, _ in points]
    values = [found.value for _, found in points]
    lows, highs = [found.low for _, found in points], [found.high for _, found in points]
    colour, dash = _colour(line), _dash(line)
    axes.plot(places, values, color=colour, ls=dash, marker=_marker(line), ms=4, lw=1.3, zorder=3)
    if bars:
        axes.vlines(places, lows, highs, color=colour, lw=0.8)
    else:
        axes.fill_between(places, lows, highs, color=colour, alpha=0.12, lw=0)


def _perplexity_axis(axes: Axes, lines: Sequence[Line], heights: Sequence[float]) -> None:
    before = {c.perplexity["before"] for line in lines for c in line.cells.values() if c.perplexity}
    for value in sorted(v for v in before if math.isfinite(v)):
        axes.axhline(value, color="#555555", ls=":", lw=1)
    if heights and max(heights) > 5 * min(heights):
        log_heights(axes)
    axes.set_ylabel("perplexity (dotted: unedited)")


def log_heights(axes: Axes) -> None:
    """Make an axis of heights logarithmic, with plain numbers at it: mathematics is not parsed."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    roomy = high < _DECADES * low
    axes.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0) if roomy else ()))
    for place in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        place(FuncFormatter(lambda value, _: f"{value:g}"))


def _colour(line: Line) -> str:
    return COLOURS[line.colour % len(COLOURS)]


def _marker(line: Line) -> str:
    # Another marker with the same colour in the second round.
    return MARKERS[(line.colour + line.colour // len(COLOURS)) % len(MARKERS)]


def _dash(line: Line) -> str:
    return "--" if line.dashed else "-"
