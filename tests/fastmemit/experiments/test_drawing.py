"""What stands where in a figure, asked of matplotlib's own objects."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest

from fastmemit.experiments import plots as module
from fastmemit.experiments.frame import measure
from fastmemit.experiments.intervals import Estimate
from fastmemit.experiments.plots import COLOURS, MARKERS, Drawing, Line
from tiny_sweeps import cell

pytest.importorskip("matplotlib")


def line(*multipliers: float | None, label: str = "a", colour: int = 0, worse: bool = False, **more: Any) -> Line:
    cells = [cell(multiplier=m, size=(4, 4), perplexity=worse) for m in multipliers]
    return Line(label, module._points(measure(cells, resamples=20)), colour, **more)


def drawn(*lines: Line, panels: tuple[str, ...] = ("s",)) -> Any:
    with module.paper_style():
        return module._draw(drawing(*lines, panels=panels))


def drawing(*lines: Line, panels: tuple[str, ...] = ("s",)) -> Drawing:
    """A drawing of lines that have no other panels."""
    names = (*panels, *(f"unedited {panel}" for panel in panels))
    shown = [
        dataclasses.replace(one, points={m: {n: point[n] for n in names} for m, point in one.points.items()})
        for one in lines
    ]
    return Drawing("title", tuple(shown))


def estimate(found: Line, multiplier: float, panel: str = "s") -> Estimate:
    value = found.points[multiplier][panel]
    assert value is not None
    return value


def ticks(axes: Any) -> dict[str, float]:
    names = [label.get_text() for label in axes.get_xticklabels()]
    return dict(zip(names, axes.get_xticks(), strict=True))


def test_few_multipliers_are_evenly_spaced_and_full_is_at_the_right_end() -> None:
    axes = drawn(line(1.0, 2.0, 3.0, 4.0, 10.0, None)).axes[0]
    assert ticks(axes) == {"1": 0, "2": 1, "3": 2, "4": 3, "10": 4, "\u221e": 5}
    assert axes.get_xlim()[0] < 0 and axes.get_xlim()[1] > 5
    assert "full precompute" in axes.get_xlabel()
    assert "full" not in drawn(line(1.0, 2.0)).axes[0].get_xlabel()


def test_the_points_are_the_scores_and_dashes_are_at_95_percent() -> None:
    found = line(1.0, 2.0, None)
    axes = drawn(found).axes[0]
    plotted, dashed = axes.lines[0], axes.lines[1]
    values = [estimate(found, m).value for m in (1.0, 2.0, math.inf)]
    assert list(plotted.get_ydata()) == pytest.approx(values)
    assert list(plotted.get_xdata()) == [0, 1, 2]
    assert list(dashed.get_ydata()) == pytest.approx([0.95 * values[-1]] * 2)
    (bars,) = axes.collections
    for path, multiplier in zip(bars.get_paths(), (1.0, 2.0, math.inf), strict=True):
        ends = estimate(found, multiplier)
        assert list(path.vertices[:, 1]) == pytest.approx([ends.low, ends.high])
    low, high = axes.get_ylim()
    assert low < min(values) and max(values) < high <= 101.5


def test_the_line_at_95_percent_can_be_left_out_and_needs_a_full_precompute() -> None:
    for found in (line(1.0, 2.0, None, kept=False), line(1.0, 2.0)):
        # The line itself, the unedited level and, where there is a full precompute, the divider before infinity.
        assert len(drawn(found).axes[0].lines) == 2 + (math.inf in found.points)


def test_what_an_edit_should_leave_as_it_was_has_the_unedited_level_in_sight() -> None:
    edited, level = Estimate(90.0, 88.0, 92.0), 12.0
    for panel, in_sight in (("na", True), ("ea", False)):
        point = {panel: edited, f"unedited {panel}": Estimate(level, level, level)}
        axes = drawn(Line("a", {1.0: point, 2.0: point}, 0), panels=(panel,)).axes[0]
        assert any(list(each.get_ydata()) == [level, level] for each in axes.lines)
        assert bool(axes.get_ylim()[0] <= level <= axes.get_ylim()[1]) is in_sight
        assert axes.get_ylabel() == ("% (dotted: unedited)" if in_sight else "%")


def test_many_multipliers_are_on_a_logarithmic_axis_with_room_between_labels() -> None:
    multipliers = (0.02, 0.1, 0.5, 0.8, 1.0, 1.2, 1.5, 2.0, 4.0, 10.0, None)
    figure = drawn(line(*multipliers), line(*multipliers, label="b", colour=1))
    axes = figure.axes[0]
    places = list(axes.get_xticks())
    assert places[:-1] == pytest.approx([math.log10(m) for m in multipliers if m is not None])
    assert places[-1] > 1.1
    for plotted in (axes.lines[0], axes.lines[2]):
        assert list(plotted.get_xdata()) == pytest.approx(places), "not moved aside"
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text() != ""]
    assert len(boxes) >= 6
    for left, right in itertools.pairwise(boxes):
        assert left.x1 < right.x0, "two labels overlap"


def test_perplexity_has_the_unedited_model_and_a_logarithmic_axis_where_it_explodes() -> None:
    def times(factor: float) -> Line:
        after = factor * estimate(found, 1.0, "perplexity").value
        point = {**found.points[1.0], "perplexity": Estimate(after, after, after)}
        return dataclasses.replace(found, points={**found.points, 1.0: point})

    found = line(1.0, 2.0, None, worse=True)
    panels = ("s", "perplexity")
    axes = drawn(found, panels=panels).axes[1]
    assert axes.get_yscale() == "linear"
    assert any(list(each.get_ydata()) == [36.5, 36.5] for each in axes.lines)
    kept = estimate(found, math.inf, "perplexity").value / 0.95
    assert any(list(each.get_ydata()) == pytest.approx([kept, kept]) for each in axes.lines)
    assert drawn(times(100.0), panels=panels).axes[1].get_yscale() == "log"
    infinite = drawn(times(math.inf), panels=panels).axes[1]
    assert len(infinite.lines[0].get_xdata()) == 2, "what is not finite has no point"


def test_a_score_that_does_not_exist_has_no_point() -> None:
    lacking = Line("b", {m: {"s": None, "unedited s": None} for m in (1.0, 2.0)}, 1)
    axes = drawn(line(1.0, 2.0, None), lacking).axes[0]
    assert [len(each.get_xdata()) for each in axes.lines if each.get_color() == COLOURS[1]] == [0]


def test_lines_differ_in_colour_or_marker_or_dash() -> None:
    lines = [line(1.0, 2.0, label=str(index), colour=index) for index in range(9)]
    lines.append(line(1.0, 2.0, label="broken", colour=0, dashed=True))
    figure = drawn(*lines)
    entries = figure.legends[0].legend_handles
    looks = {(each.get_color(), each.get_marker(), each.get_linestyle()) for each in entries}
    assert len(looks) == len(entries) == 10
    assert len(set(COLOURS)) == len(COLOURS) == len(set(MARKERS)) == 7
    assert [text.get_text() for text in figure.legends[0].get_texts()][-1] == "broken"


def test_the_legend_has_the_dashes_where_there_is_a_full_precompute() -> None:
    legend = drawn(line(1.0, None)).legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["a", "95 % of the full precompute"]


def test_a_user_s_own_style_changes_nothing() -> None:
    import matplotlib

    subject = drawing(line(1.0, 2.0, None))
    plain = module.render(subject)
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "black", "svg.fonttype": "none"}):
        assert module.render(subject) == plain


def test_numbers_at_a_logarithmic_axis_are_plain() -> None:
    import io

    import matplotlib.figure

    with module.paper_style():
        figure = matplotlib.figure.Figure()
        axes = figure.subplots()
        axes.plot([1, 2, 3], [20.4, 36.0, 283.5])
        module.log_heights(axes)
        made = io.BytesIO()
        figure.savefig(made, format="svg")
    text = made.getvalue().decode()
    # Letters are drawn as paths; each text is a comment beside its own.
    assert "mathdefault" not in text
    assert all(f"<!-- {number} -->" in text for number in (20, 50, 100, 200))


def test_a_logarithmic_axis_of_many_decades_has_no_labels_between_them() -> None:
    import matplotlib.figure

    with module.paper_style():
        axes = matplotlib.figure.Figure().subplots()
        axes.plot([1, 2], [20.4, 8.46e6])
        module.log_heights(axes)
        axes.figure.draw_without_rendering()
    assert [label.get_text() for label in axes.get_yticklabels(minor=True)] == []
    assert "1e+06" in [label.get_text() for label in axes.get_yticklabels()]
