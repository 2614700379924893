"""The table and the figure of sequences."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fastmemit.errors import BadData
from fastmemit.experiments import plots
from fastmemit.experiments.frame import measure_steps
from fastmemit.experiments.plots import Drawing, Picture, sequence_picture
from fastmemit.experiments.tables import difference_tables, markdown, step_tables
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


def sequence_table(lines: list[dict[str, Any]]) -> str:
    """The steps alone, as Markdown."""
    return markdown(step_tables(measure_steps(lines))[:1]).partition("\n\n")[2]


def sequence_figure(lines: list[dict[str, Any]], title: str) -> Picture:
    return sequence_picture(measure_steps(lines), title)


def test_a_row_for_each_step() -> None:
    found = sequence_table([line(), line(edits=2), line(None, False, 2)]).splitlines()
    assert found[0].startswith("| run | facts | ES | PS | NS | S | EA | PA | NA | S first | EA first | S newest | EA")
    assert found[0].count("|") == found[1].count("|") == found[2].count("|") == 14
    assert found[3] == (
        "| x2, edit keys preserved | 32 | 90.00 | 80.00 | 70.00 | 77.00 | 50.00 | 40.00 | - | 60.50 | 33.00 | 99.25 "
        "| 50.00 |"
    )
    assert found[4].startswith("| full, edit keys not preserved | 32 | 70.00 ")
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
    assert "The multiplier is 2." in sequence_table([line(), line(preserve=False)])


def test_a_line_with_its_records_has_intervals() -> None:
    records = [record(i, float(i > 0), ea=float(i > 1)) for i in range(4)]
    row = sequence_table([line(records=records)]).splitlines()[2]
    assert "| 75.00 [25.00, 100.00] | 100.00 [100.00, 100.00] |" in row
    assert "| 50.00 [0.00, 100.00] | - | - |" in row
    assert "In brackets the 95 % bootstrap interval" in sequence_table([line(records=records)])
    assert "In brackets" not in sequence_table([line()])


def test_a_run_is_named_by_what_tells_it_from_the_others() -> None:
    several = [
        line(method="memit", keys=8), line(method="memit", keys=8, preserve=False, settings={"relative_ridge": 0.1}),
        line(method="ultraedit", keys=0, preserve=False), line(method="memit", run="as they call it"),
    ]  # fmt: skip
    names = measure_steps(several)["run"].tolist()
    assert names == ["MEMIT, edit keys preserved", "MEMIT, relative_ridge=0.1", "UltraEdit", "as they call it"]
    sizes = [line(batch_size=size, targets=targets) for size, targets in ((1, "edited"), (2, "unedited"))]
    assert measure_steps(sizes)["run"].tolist() == [
        "x2, batches of 1, targets of the edited model, edit keys preserved",
        "x2, batches of 2, targets of the unedited model, edit keys preserved",
    ]
    lacking = [line(), line(batch_size=2, targets="edited", preserve=False)]
    assert measure_steps(lacking)["run"].str.startswith("x2, ").all(), "lines of earlier versions have less"
    with pytest.raises(BadData, match="two sequences of x2, edit keys preserved, 16 facts, with the same"):
        measure_steps([line(), line()])


def test_further_fields_of_a_line_take_no_column() -> None:
    """One that is named as a column would be taken for what it is compared with."""
    named = {"full": "x", "preset": "x", "first": "x", "verdict_full": "x", "es_minus_full": "x", "kept": 1, "title": 1}
    found, plain = (measure_steps([line(**more), line(edits=2, **more)], resamples=20) for more in (named, {}))
    assert found.equals(plain) and list(found) == list(plain) and difference_tables(found) == []


def test_the_last_step_is_compared_with_the_first_run_after_as_many_facts_and_the_oldest_are_followed() -> None:
    def steps(run: str, *shares: float) -> list[dict[str, Any]]:
        return [
            line(edits=at, run=run, records=[record(i, 1.0, ea=share) for i in range(4)], by_batch=batches[:at])
            for at, share in enumerate(shares, 1)
        ]

    batches = [{"ea": 75.0, "s": 1.0}, {"ea": None, "s": 1.0}, {"ea": 100.0, "s": 1.0}]
    found = measure_steps([*steps("A", 1.0, 0.5), *steps("B", 1.0, 0.75, 1.0)], resamples=20)
    (table,) = difference_tables(found)
    ((cell, minus, *values),) = table.rows
    assert (cell, minus) == ("B, 32 facts", "A, 32 facts"), "the first was not scored after 48"
    assert values[4] == "+25.0 [+25.0, +25.0]" and values[-1] == "not worse"
    ages = step_tables(found)[1]
    assert ages.rows == (("A", "75 -", "75 75"), ("B", "75 - 100", "75 75 75"))


@pytest.mark.parametrize("measured", [False, True])
def test_the_figure_draws_every_line_and_is_the_same_twice(measured: bool) -> None:
    pytest.importorskip("matplotlib")
    lines = [
        line(multiplier, preserve, edits, perplexity=36.0 * edits if measured else None)
        for multiplier in (1.0, 2.0, None)
        for preserve in (True, False)
        for edits in (1, 2)
    ]
    files = sequence_figure(lines, "tiny: MEMIT").files
    assert sequence_figure(lines, "tiny: MEMIT").files == files
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
