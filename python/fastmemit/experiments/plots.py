"""Which figures a report has: scores and perplexity against the multiplier, as the paper's are.

A score and what it misses stand side by side: ES, PS and NS ask which of two answers is more probable, EA, PA and NA
what the model says; S is beside perplexity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastmemit.experiments.comparison import Group, Measured, Size
from fastmemit.experiments.drawing import Drawing, Line, Panel, check_matplotlib, render
from fastmemit.experiments.folders import multiplier_text
from fastmemit.experiments.intervals import Estimate
from fastmemit.experiments.layout import method_title, slug, unique

_PANELS = ("es", "ea", "ps", "pa", "ns", "na", "s")  # two columns


@dataclass(frozen=True)
class Picture:
    """A figure as files.

    Attributes:
        name: Of lower-case letters, digits and hyphens, unique in a report.
        title: What it shows, for its caption.
        alt: The same in words and numbers, for those who do not see it.
        svg: The drawing.
        png: The same in pixels.
    """

    name: str
    title: str
    alt: str
    svg: bytes
    png: bytes


def pictures(groups: Sequence[Group], model: str) -> list[Picture]:
    """Every figure of a report.

    For each method, with the settings of its preset, a line for each size; for each size of a method with several
    groups, a line for each group. Every figure has all scores and perplexity, as far as a cell has them. A figure
    without a line, because every multiplier is alone, is left out.

    Args:
        groups: As ``comparison.group_cells`` gives them.
        model: Its name, for the titles.

    Raises:
        BadConfig: matplotlib is not installed.
    """
    check_matplotlib()
    drawings = [_scores(group) for group in _plain(groups)] + _studies(groups)
    drawings = [d for d in drawings if any(len(line.cells) > 1 for line in d.lines)]
    names = unique(drawing.name for drawing in drawings)
    return [
        Picture(name, drawing.title, _alt(drawing), *render(drawing, model))
        for name, drawing in zip(names, drawings, strict=True)
    ]


def _scores(group: Group) -> Drawing:
    lines = _size_lines(group)
    return Drawing(slug(group.title), group.title, _panels(lines), lines)


def _studies(groups: Sequence[Group]) -> list[Drawing]:
    found = []
    for method in dict.fromkeys(group.method for group in groups):
        mine = [group for group in groups if group.method == method]
        for size in sorted({size for group in mine for size in group.cells}):
            chosen = [group for group in mine if size in group.cells]
            if len(chosen) > 1:
                lines = _variant_lines(chosen, size)
                title = f"{method_title(method)}, {size}: settings compared"
                name = slug(f"{method} {size} settings")
                found.append(Drawing(name, title, _panels(lines), lines))
    return found


def _panels(lines: Sequence[Line]) -> tuple[Panel, ...]:
    """From left to right, then down; without what no cell has."""
    wanted = [Panel(name.upper(), _score(name)) for name in _PANELS]
    wanted.append(Panel("perplexity", _perplexity, perplexity=True))
    cells = [cell for line in lines for cell in line.cells.values()]
    return tuple(panel for panel in wanted if any(panel.read(cell) for cell in cells))


def _size_lines(group: Group) -> tuple[Line, ...]:
    sizes = sorted(group.cells.items())
    return tuple(Line(str(size), cells, index) for index, (size, cells) in enumerate(sizes))


def _variant_lines(groups: Sequence[Group], size: Size) -> tuple[Line, ...]:
    """A colour for each of the settings, broken without BOS; 95 % of the first one alone."""
    colours = {name: index for index, name in enumerate(dict.fromkeys(map(_colouring, groups)))}
    return tuple(
        Line(
            group.variant or "settings of the preset",
            group.cells[size],
            colours[_colouring(group)],
            dashed=not group.bos,
            kept=index == 0,
        )
        for index, group in enumerate(groups)
    )


def _colouring(group: Group) -> tuple[str, int]:
    return group.settings, group.seed


def _plain(groups: Sequence[Group]) -> list[Group]:
    """Of each method the groups without overrides of its settings, or all where there is none."""
    bare = {group.method for group in groups if not group.settings}
    return [group for group in groups if not group.settings or group.method not in bare]


def _alt(drawing: Drawing) -> str:
    """The figure in words: its panels, and the numbers of S, EA and perplexity."""
    names = ", ".join(each.name for each in drawing.panels)
    sentences = [f"{names} against the multiplier."]
    for panel in drawing.panels:
        if panel.name not in ("S", "EA") and not panel.perplexity:
            continue
        parts = []
        for line in drawing.lines:
            values = [
                f"{found.value:.1f} at {multiplier_text(multiplier)}"
                for multiplier, cell in line.cells.items()
                if (found := panel.read(cell)) is not None
            ]
            parts.append(f"{line.label}: {', '.join(values) or 'none'}")
        sentences.append(f"{panel.name} of {'; '.join(parts)}.")
    return " ".join(sentences)


def _score(name: str) -> Callable[[Measured], Estimate | None]:
    return lambda cell: cell.after[name]


def _perplexity(cell: Measured) -> Estimate | None:
    after = cell.perplexity["after"] if cell.perplexity else None
    return None if after is None else Estimate(after, after, after)
