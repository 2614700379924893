"""The figures of a report: scores and perplexity against the multiplier, as the paper's are, or against facts written.

A score and what it misses stand side by side: ES, PS and NS ask which of two answers is more probable, EA, PA and NA
what the model says; S is beside perplexity. The full precompute is at infinity. Dashed lines stand at 95 % of what it
reaches, and at its perplexity over that share; 95 % intervals are bars or bands. Colours are those of Okabe and Ito,
which readers with any colour vision can tell apart; markers differ as well. The same cells give the same bytes: no date
is written, identifiers are salted with a constant, and the font comes with matplotlib.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastmemit.errors import BadConfig
from fastmemit.experiments.frame import KEPT, SIZE, head, multiplier_text
from fastmemit.experiments.intervals import PERPLEXITY, Estimate
from fastmemit.experiments.results import method_title
from fastmemit.experiments.tables import slug, unique

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^DvPX"
PANELS = ("es", "ea", "ps", "pa", "ns", "na", "s", PERPLEXITY)  # two columns
_SIZE = (4.6, 3.1)  # of a panel, in inches
_PNG_DPI = 150
# What each format would say of the day and of versions: the same results give the same bytes.
_UNDATED = {"svg": ("Date", "Creator"), "pdf": ("CreationDate", "Creator", "Producer"), "png": ("Software",)}
_KEPT_AS_IT_IS = ("ns", "na")  # what an edit should leave where it was: the unedited level is always in sight
_EVENLY = 6  # above this many multipliers, or with one below 1, the axis is logarithmic, else evenly spaced
_DECADES = 1e3  # up to this ratio of the ends of a logarithmic axis there is room between decades
_LABEL = 0.085  # the least distance of two labels, as a share of the axis
_STYLE: dict[str, Any] = {
    "svg.hashsalt": "fastmemit",
    "svg.fonttype": "path",
    "pdf.fonttype": 42,  # text that can be searched and edited
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
class Picture:
    """A figure as files."""

    name: str  # lower-case letters, digits and hyphens, unique in a report
    title: str  # what it shows, for its caption
    alt: str  # the same in words and numbers, for those who do not see it
    files: Mapping[str, bytes]  # its ending -> content: svg, pdf and png


@dataclass(frozen=True)
class Line:
    """One line, in every panel."""

    label: str
    #: Multiplier (infinity: full) or facts -> panel -> value; "unedited PANEL" is the value before the edits.
    points: Mapping[float, Mapping[str, Estimate | None]]
    colour: int  # which colour and marker it has, counted from 0
    dashed: bool = False
    kept: bool = True  # whether a dashed line stands at 95 % of its full precompute

    @property
    def look(self) -> dict[str, Any]:
        """Colour, marker and dash; another marker with the same colour in the second round."""
        marker = MARKERS[(self.colour + self.colour // len(COLOURS)) % len(MARKERS)]
        return {"color": COLOURS[self.colour % len(COLOURS)], "marker": marker, "ls": "--" if self.dashed else "-"}


@dataclass(frozen=True)
class Drawing:
    """A figure before it is drawn: panels with the same lines, from left to right, then down."""

    title: str
    lines: tuple[Line, ...]  # in the order of the legend
    facts: bool = False  # whether lines are over facts written, and not over multipliers

    @property
    def panels(self) -> list[str]:
        """What any point has."""
        points = [point for line in self.lines for point in line.points.values()]
        return [panel for panel in PANELS if any(point.get(panel) for point in points)]


def check_matplotlib() -> None:
    """Refuse to begin (BadConfig) without the library that draws."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise BadConfig('Figures need the package matplotlib; pip install "fastmemit[report]".') from None


def pictures(cells: pandas.DataFrame, model: str) -> list[Picture]:
    """Every figure of a report on the cells of a model, as `frame.measure` has them.

    For each method, with the settings of its preset, a line for each size; for each size of a method with several
    groups, a line for each group. Every figure has all scores and perplexity, as far as a cell has them. A figure
    without a line, because every multiplier is alone, is left out.
    """
    found: list[tuple[str, str, list[Line]]] = []
    bare = set(cells["method"][cells["settings"] == "{}"])
    for _, group in cells.groupby("group"):
        method, settings, title = group[["method", "settings", "title"]].iloc[0]
        if settings == "{}" or method not in bare:  # overrides alone, or the preset's settings
            sizes = [part for _, part in group.groupby(SIZE)]
            lines = [Line(part["size"].iat[0], _points(part), index) for index, part in enumerate(sizes)]
            found.append((slug(title), title, lines))
    for method, mine in cells.groupby("method", sort=False):
        for _, chosen in mine.groupby(SIZE):
            # A colour for each of the settings, broken without BOS; 95 % of the first one alone.
            looks = list(dict.fromkeys(zip(chosen["settings"], chosen["seed"], strict=True)))
            lines = []
            for _, part in chosen.groupby("group"):
                first = part.iloc[0]
                look = looks.index((first["settings"], first["seed"]))
                label = first["variant"] or "settings of the preset"
                lines.append(Line(label, _points(part), look, dashed=not first["bos"], kept=not lines))
            if len(lines) > 1:
                size = chosen["size"].iat[0]
                title = f"{method_title(method)}, {size}: settings compared"
                found.append((slug(f"{method} {size} settings"), title, lines))
    found = [each for each in found if any(len(line.points) > 1 for line in each[2])]
    drawings = [Drawing(f"{model}: {title}", tuple(lines)) for _, title, lines in found]
    names = unique(name for name, _, _ in found)
    return [
        Picture(name, title, _alt(drawing), render(drawing))
        for name, (_, title, _), drawing in zip(names, found, drawings, strict=True)
    ]


def _points(cells: pandas.DataFrame, over: str = "multiplier") -> dict[float, Mapping[str, Estimate | None]]:
    ends = {"": "", "unedited ": "_before"}
    return {
        row[over]: {f"{when}{panel}": row[panel + end] for when, end in ends.items() for panel in PANELS}
        for row in cells.to_dict("records")
    }


def _alt(drawing: Drawing) -> str:
    """The figure in words: its panels, and the numbers of S, EA and perplexity."""
    sentences = [
        f"{', '.join(map(head, drawing.panels))} against {'facts written' if drawing.facts else 'the multiplier'}."
    ]
    for panel in (panel for panel in drawing.panels if panel in ("s", "ea", PERPLEXITY)):
        parts = []
        for line in drawing.lines:
            values = [
                f"{found.value:.1f} at {multiplier_text(m)}"
                for m, point in line.points.items()
                if (found := point.get(panel)) is not None
            ]
            parts.append(f"{line.label}: {', '.join(values) or 'none'}")
        sentences.append(f"{head(panel)} of {'; '.join(parts)}.")
    return " ".join(sentences)


def sequence_picture(steps: pandas.DataFrame, title: str) -> Picture:
    """Scores and perplexity of sequences, as `frame.measure_steps` has them, against the number of facts written.

    A line for each run, solid where the keys of earlier edits are preserved, else dashed; what is the same otherwise
    has one colour and marker. Dotted is the unedited model on all facts. A score that no step has gets no panel.
    """
    lines: list[Line] = []
    titles, end = list(steps["title"].unique()), steps["facts"].max()
    for run, part in steps.groupby("run", sort=False):
        points = _points(part, "facts")
        for facts in points.keys() - {end}:  # the level of all facts alone is drawn
            points[facts] = {panel: points[facts][panel] for panel in PANELS}
        first = part.iloc[0]
        lines.append(Line(run, points, titles.index(first["title"]), dashed=not first["preserve"]))
    drawing = Drawing(title, tuple(lines), facts=True)
    return Picture("sequences", title, _alt(drawing), render(drawing))


def render(drawing: Drawing) -> dict[str, bytes]:
    """Draw a figure, as svg, pdf and png."""
    with paper_style():
        figure = _draw(drawing)
        figure.draw_without_rendering()  # lays everything out, once for both files
        figure.set_layout_engine("none")
        found = {}
        for ending, without in _UNDATED.items():
            file = io.BytesIO()
            figure.savefig(file, format=ending, dpi=_PNG_DPI, metadata=dict.fromkeys(without))
            found[ending] = file.getvalue()
    return found


@contextmanager
def paper_style() -> Iterator[None]:
    """The library's defaults and ours, whatever the user's matplotlibrc says."""
    import matplotlib.style

    with matplotlib.style.context(["default", _STYLE]):
        yield


def _draw(drawing: Drawing) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = min(2, len(drawing.panels))
    rows = math.ceil(len(drawing.panels) / columns)
    height = rows * _SIZE[1] + 0.5 + 0.25 * math.ceil((len(drawing.lines) + 1) / 3)
    figure = Figure(figsize=(columns * _SIZE[0], height), layout="constrained")
    figure.suptitle(drawing.title, fontsize=11)
    axis = _Axis(drawing)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, axes in zip(drawing.panels, grid, strict=False):
        _draw_panel(axes, panel, drawing.lines, axis)
    for axes in grid[len(drawing.panels) :]:
        axes.set_axis_off()
    handles = [Line2D([], [], **line.look, label=line.label) for line in drawing.lines]
    if axis.has_full:
        label = f"{100 * KEPT:g} % of the full precompute"
        handles.append(Line2D([], [], color="#555555", ls=(0, (5, 3)), lw=0.9, label=label))
    short = all(len(line.label) < 28 for line in drawing.lines)
    figure.legend(
        handles=handles, loc="outside lower center", ncols=4 if short else 3, handlelength=3, frameon=False, fontsize=8
    )
    return figure


class _Axis:
    """Where multipliers or numbers of facts stand; the full precompute is the right end."""

    def __init__(self, drawing: Drawing) -> None:
        found = {place for line in drawing.lines for place in line.points}
        self.facts, self.has_full = drawing.facts, math.inf in found
        self.values = values = sorted(found - {math.inf})
        self.logarithmic = bool(values) and (len(values) > _EVENLY or values[0] < 1) and not self.facts
        self.even = not self.facts and not self.logarithmic
        places = range(len(values)) if self.even else values if self.facts else [math.log10(each) for each in values]
        self.first, last = (places[0], places[-1]) if values else (0.0, -1.0)
        end = last + max(0.14 * (last - self.first), 0.25) if self.logarithmic else last + 1
        self.at: dict[float, float] = {**dict(zip(values, places, strict=True)), math.inf: end}
        self.last = end if self.has_full else last
        self.width = max(self.last - self.first, 1e-9)

    def label(self, axes: Axes) -> None:
        """Ticks for all multipliers, labels for those that have room."""
        if self.facts:
            axes.set_xlabel("facts written")
            if len(self.values) <= _EVENLY:  # whole numbers of facts, where something was measured
                axes.set_xticks(self.values)
            else:
                axes.set_xlim(left=0)
            return
        ticks = [*self.values, *([math.inf] if self.has_full else [])]
        labels, kept = [], math.inf
        for tick in reversed(ticks):  # from the right, where the full precompute has its label
            roomy = kept - self.at[tick] >= _LABEL * self.width or not self.logarithmic
            labels.append(("\u221e" if tick == math.inf else multiplier_text(tick)) if roomy else "")
            kept = self.at[tick] if roomy else kept
        axes.set_xticks([self.at[tick] for tick in ticks], labels[::-1])
        margin = 0.05 * self.width + (0 if self.logarithmic else 0.1)
        axes.set_xlim(self.first - margin, self.last + margin)
        if self.has_full and self.values:
            axes.axvline((self.at[self.values[-1]] + self.at[math.inf]) / 2, color="#bbbbbb", lw=0.8, ls=":")
        axes.set_xlabel("multiplier" + (" (\u221e: full precompute)" if self.has_full else ""))


def _draw_panel(axes: Axes, panel: str, lines: Sequence[Line], axis: _Axis) -> None:
    heights: list[float] = []
    # On an even axis the bars of lines that meet are set beside one another. Elsewhere a multiplier stands where it
    # stands, and intervals are bands.
    step = 0.012 * axis.width if axis.even else 0.0
    for index, line in enumerate(lines):
        shift = step * (index - (len(lines) - 1) / 2)
        drawn = sorted(
            (axis.at[place] + shift, found.value, found.low, found.high)
            for place, point in line.points.items()
            if (found := point.get(panel)) is not None and math.isfinite(found.value)
        )
        places, values, lows, highs = zip(*drawn, strict=True) if drawn else ((), (), (), ())
        axes.plot(places, values, **line.look, ms=4, lw=1.3, zorder=3)
        if axis.even:
            axes.vlines(places, lows, highs, color=line.look["color"], lw=0.8)
        else:
            axes.fill_between(places, lows, highs, color=line.look["color"], alpha=0.12, lw=0)
        heights += [*lows, *highs]
        full = line.points.get(math.inf, {}).get(panel)
        if line.kept and full is not None and math.isfinite(full.value):
            kept = full.value / KEPT if panel == PERPLEXITY else KEPT * full.value
            axes.axhline(kept, color=line.look["color"], ls=(0, (5, 3)), lw=0.7)
            heights.append(kept)
    axes.set_title(head(panel))
    axis.label(axes)
    points = [point for line in lines for point in line.points.values()]
    unedited = {found.value for point in points if (found := point.get(f"unedited {panel}")) is not None}
    for value in sorted(filter(math.isfinite, unedited)):
        axes.axhline(value, color="#555555", ls=":", lw=1)
        if panel in _KEPT_AS_IT_IS:
            heights.append(value)
    if panel == PERPLEXITY:
        if heights and max(heights) > 5 * min(heights):
            log_heights(axes)
        axes.set_ylabel(f"{PERPLEXITY} (dotted: unedited)" if unedited else PERPLEXITY)
    elif heights:
        low, high = min(heights), max(heights)
        room = max(0.06 * (high - low), 1.0)
        axes.set_ylim(max(-1.5, low - room), min(101.5, high + room))
        axes.set_ylabel("% (dotted: unedited)" if unedited and low - room <= max(unedited) else "%")


def log_heights(axes: Axes) -> None:
    """Make an axis of heights logarithmic, with plain numbers at it: mathematics is not parsed."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0) if high < _DECADES * low else ()))
    for place in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        place(FuncFormatter(lambda value, _: f"{value:g}"))
