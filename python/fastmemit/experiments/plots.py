"""Which figures a report has: scores and perplexity against the multiplier, as the paper's are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastmemit.experiments.comparison import Group, Measured, Size
from fastmemit.experiments.drawing import Drawing, Line, Panel, check_matplotlib, render
from fastmemit.experiments.folders import multiplier_text
from fastmemit.experiments.intervals import Estimate
from fastmemit.experiments.layout import method_title, slug, unique


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

    For each method, with the settings of its preset: ES, PS, NS and S, a line for each size. For
    each method with several groups, or with perplexity: S and perplexity, a line for each group
    (one figure a size), or for each size where there is one group. A figure without a line, because
    every multiplier is alone, is left out.

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
    panels = tuple(Panel(name.upper(), _score(name)) for name in ("es", "ps", "ns", "s"))
    return Drawing(slug(group.title), group.title, panels, _size_lines(group))


def _studies(groups: Sequence[Group]) -> list[Drawing]:
    found = []
    for method in dict.fromkeys(group.method for group in groups):
        mine = [group for group in groups if group.method == method]
        if len(mine) == 1:
            lines, title = _size_lines(mine[0]), f"{mine[0].title}: score and perplexity"
            panels = _study_panels(lines)
            if len(panels) == 2:
                name = slug(f"{mine[0].title} perplexity")
                found.append(Drawing(name, title, panels, lines))
            continue
        for size in sorted({size for group in mine for size in group.cells}):
            chosen = [group for group in mine if size in group.cells]
            lines, title = (
                _variant_lines(chosen, size),
                f"{method_title(method)}, {size}: settings compared",
            )
            panels = _study_panels(lines)
            if len(chosen) > 1 or len(panels) == 2:
                name = slug(f"{method} {size} settings")
                found.append(Drawing(name, title, panels, lines))
    return found


def _study_panels(lines: Sequence[Line]) -> tuple[Panel, ...]:
    panels = (Panel("S", _score("s")),)
    if any(cell.perplexity for line in lines for cell in line.cells.values()):
        return (*panels, Panel("perplexity", _perplexity, perplexity=True))
    return panels


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
    """The figure in words: its panels, and the numbers of the last score."""
    panel = next(panel for panel in reversed(drawing.panels) if not panel.perplexity)
    parts = []
    for line in drawing.lines:
        values = [
            f"{found.value:.1f} at {multiplier_text(multiplier)}"
            for multiplier, cell in line.cells.items()
            if (found := panel.read(cell)) is not None
        ]
        parts.append(f"{line.label}: {', '.join(values) or 'none'}")
    names = ", ".join(each.name for each in drawing.panels)
    return f"{names} against the multiplier. {panel.name} of {'; '.join(parts)}."


def _score(name: str) -> Callable[[Measured], Estimate | None]:
    return lambda cell: cell.after[name]


def _perplexity(cell: Measured) -> Estimate | None:
    after = cell.perplexity["after"] if cell.perplexity else None
    return None if after is None else Estimate(after, after, after)
