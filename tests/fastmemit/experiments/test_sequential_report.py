"""The table and the figure of sequences."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fastmemit.experiments import plots
from fastmemit.experiments.plots import Drawing, sequence_figure
from fastmemit.experiments.tables import sequence_table
from tiny_sweeps import record


def line(multiplier: float | None = 2.0, preserve: bool = True, edits: int = 1, **more: Any) -> dict[str, Any]:
    es = 90.0 - 10 * edits * (not preserve)
    scores = {"es": es, "ps": 80.0, "ns": 70.0, "s": 79.0 - edits, "ea": 50.0, "pa": 40.0}
    return {
        "multiplier": multiplier,
        "preserve": preserve,
        "edits": edits,
        "facts": 16 * edits,
        "failed": 0,
        "scores": scores,
        "before": {"es": 10.0, "ps": 11.0, "ns": 77.0, "s": 14.0},
        "by_batch": [{**scores, "s": 60.5, "ea": 33.0}, {**scores, "s": 99.25}][:edits],
        "perplexity": None,
        **more,
    }


def test_a_row_for_each_step() -> None:
    found = sequence_table([line(), line(edits=2), line(None, False, 2)]).splitlines()
    assert found[0].startswith("| multiplier | edit keys | facts | ES | PS | NS | S | EA | PA | NA")
    assert found[0].count("|") == found[1].count("|") == found[2].count("|") == 15
    assert found[3] == (
        "| x2 | preserved | 32 | 90.00 | 80.00 | 70.00 | 77.00 | 50.00 | 40.00 | - | 60.50 | 33.00 | 99.25 | 50.00 |"
    )
    assert found[4].startswith("| full | not preserved | 32 | 70.00 ")
    assert found[6] == (
        "The unedited model on the same 32 facts: ES 10.00, PS 11.00, NS 77.00, S 14.00, EA -, PA -, NA -. "
        "first: the first 100 facts or batch."
    )


def test_perplexity_and_broken_models_are_said() -> None:
    found = sequence_table([line(perplexity=36.5), line(edits=2, perplexity=math.inf, failed=1)])
    assert "| perplexity |" in found and "| 36.50 |" in found and "| inf |" in found
    assert " 1 batch could not be written" in found
    missing = {"es": 90.0, "ps": None, "ns": None, "s": None}
    assert "| 90.00 | - | - | - |" in sequence_table([line(scores=missing)])


def test_a_line_with_its_records_has_intervals() -> None:
    records = [record(i, float(i > 0), ea=float(i > 1)) for i in range(4)]
    row = sequence_table([line(records=records)]).splitlines()[2]
    assert "| 90.00 [25.00, 100.00] | 80.00 [100.00, 100.00] |" in row
    assert "| 50.00 [0.00, 100.00] | 40.00 | - |" in row
    assert "In brackets the 95 % bootstrap interval" in sequence_table([line(records=records)])
    assert "In brackets" not in sequence_table([line()])


@pytest.mark.parametrize("measured", [False, True])
def test_the_figure_draws_every_line_and_is_the_same_twice(measured: bool) -> None:
    pytest.importorskip("matplotlib")
    lines = [
        line(multiplier, preserve, edits, perplexity=36.0 * edits if measured else None)
        for multiplier in (1.0, 2.0, None)
        for preserve in (True, False)
        for edits in (1, 2)
    ]
    files = sequence_figure(lines, "tiny: MEMIT")
    assert sequence_figure(lines, "tiny: MEMIT") == files
    svg, png = files["svg"], files["png"]
    assert svg.startswith(b"<?xml") and png.startswith(b"\x89PNG")
    text = svg.decode()
    assert ("<!-- perplexity -->" in text) is measured
    # The names are drawn as paths, and stand in comments beside them.
    for name in ("x1, edit keys preserved", "full, edit keys not preserved", "tiny: MEMIT"):
        assert f"<!-- {name} -->" in text


def test_values_that_are_not_numbers_leave_a_gap() -> None:
    pytest.importorskip("matplotlib")
    lines = [line(edits=1, perplexity=math.inf), line(edits=2, perplexity=40.0)]
    missing = {"es": 90.0, "ps": None, "ns": None, "s": None}
    assert sequence_figure(lines, "t") and sequence_figure([line(scores=missing)], "t")


def test_a_figure_has_the_unedited_level_of_all_facts_and_ticks_where_it_was_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Drawing] = []
    monkeypatch.setattr(plots, "render", seen.append)
    sequence_figure([line(), line(edits=2)], "t")
    points = seen[0].lines[0].points
    level = points[32]["unedited ns"]
    assert level is not None and level.value == 77.0 and "unedited ns" not in points[16]
    axes = plots._draw(seen[0]).axes[0]
    assert list(axes.get_xticks()) == [16, 32] and axes.get_xlim()[0] > 10
