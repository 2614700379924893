"""The table and the figure of sequences."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fastmemit.experiments.sequential_report import figure, markdown


def line(
    multiplier: float | None = 2.0, preserve: bool = True, edits: int = 1, **more: Any
) -> dict[str, Any]:
    es = 90.0 - 10 * edits * (not preserve)
    scores = {"es": es, "ps": 80.0, "ns": 70.0, "s": 79.0 - edits}
    return {
        "multiplier": multiplier,
        "preserve": preserve,
        "edits": edits,
        "facts": 16 * edits,
        "failed": 0,
        "scores": scores,
        "before": {"es": 10.0, "ps": 11.0, "ns": 77.0, "s": 14.0},
        "by_batch": [{**scores, "s": 60.5}, {**scores, "s": 99.25}][:edits],
        "perplexity": None,
        **more,
    }


def test_a_row_for_each_step() -> None:
    found = markdown([line(), line(edits=2), line(None, False, 2)]).splitlines()
    assert found[0].startswith("| multiplier | edit keys | facts | ES | PS | NS | S |")
    assert found[0].count("|") == found[1].count("|") == found[2].count("|") == 10
    assert found[3] == ("| x2 | preserved | 32 | 90.00 | 80.00 | 70.00 | 77.00 | 60.50 | 99.25 |")
    assert found[4].startswith("| full | not preserved | 32 | 70.00 ")
    assert found[6] == (
        "The unedited model on the same 32 facts: S 14.00, ES 10.00, PS 11.00, NS 77.00."
    )


def test_perplexity_and_broken_models_are_said() -> None:
    found = markdown([line(perplexity=36.5), line(edits=2, perplexity=math.inf, failed=1)])
    assert "| perplexity |" in found and "| 36.50 |" in found and "| inf |" in found
    assert "1 batches could not be written" in found
    missing = {"es": 90.0, "ps": None, "ns": None, "s": None}
    assert "| 90.00 | - | - | - |" in markdown([line(scores=missing)])


@pytest.mark.parametrize("measured", [False, True])
def test_the_figure_draws_every_line_and_is_the_same_twice(measured: bool) -> None:
    pytest.importorskip("matplotlib")
    lines = [
        line(multiplier, preserve, edits, perplexity=36.0 * edits if measured else None)
        for multiplier in (1.0, 2.0, None)
        for preserve in (True, False)
        for edits in (1, 2)
    ]
    svg, png = figure(lines, "tiny: MEMIT")
    assert figure(lines, "tiny: MEMIT") == (svg, png)
    assert svg.startswith(b"<?xml") and png.startswith(b"\x89PNG")
    text = svg.decode()
    assert ("Perplexity" in text) is measured
    # The names are drawn as paths, and stand in comments beside them.
    for name in ("x1, edit keys preserved", "full, edit keys not preserved", "tiny: MEMIT"):
        assert f"<!-- {name} -->" in text


def test_values_that_are_not_numbers_leave_a_gap() -> None:
    pytest.importorskip("matplotlib")
    lines = [line(edits=1, perplexity=math.inf), line(edits=2, perplexity=40.0)]
    missing = {"es": 90.0, "ps": None, "ns": None, "s": None}
    assert figure(lines, "t") and figure([line(scores=missing)], "t")
