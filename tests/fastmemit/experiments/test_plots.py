from __future__ import annotations

import builtins
import math
import re
from typing import Any
from xml.etree import ElementTree

import pytest

from fastmemit.errors import BadConfig
from fastmemit.experiments import plots
from fastmemit.experiments.frame import measure
from fastmemit.experiments.plots import COLOURS, Drawing, check_matplotlib
from fastmemit.experiments.results import Cell
from tiny_sweeps import cell, grid, made, record, study


def groups(cells: list[Cell]) -> Any:
    return measure(cells, resamples=20)


@pytest.fixture
def drawings(monkeypatch: pytest.MonkeyPatch) -> list[Drawing]:
    """What `pictures` would draw, without the seconds that drawing takes."""
    seen: list[Drawing] = []

    def note(drawing: Drawing) -> tuple[bytes, bytes]:
        seen.append(drawing)
        return b"svg", b"png"

    monkeypatch.setattr(plots, "render", note)
    return seen


def labels(drawing: Drawing) -> list[str]:
    return [line.label for line in drawing.lines]


PANELS = ["es", "ea", "ps", "pa", "ns", "na", "s"]


def test_each_method_has_every_score_and_a_line_for_each_size(drawings: list[Drawing]) -> None:
    found = plots.pictures(groups(grid()), "tiny")
    assert [picture.name for picture in found] == ["emmet", "memit"]
    for drawing in drawings:
        assert drawing.panels == PANELS
        assert labels(drawing) == ["40 batches of 1", "10 batches of 4", "5 batches of 16"]
        assert len({line.colour for line in drawing.lines}) == 3
        assert all(line.kept for line in drawing.lines)
        for line in drawing.lines:
            assert list(line.points) == [1, 2, 3, 4, 10, math.inf]


def test_a_panel_reads_its_own_score(drawings: list[Drawing]) -> None:
    found = groups(grid())
    plots.pictures(found, "tiny")
    scores = cell("emmet", 2.0, (1, 40))["scores"]
    for panel in drawings[0].panels:
        estimate = drawings[0].lines[0].points[2.0][panel]
        assert estimate is not None
        assert estimate.value == pytest.approx(scores[panel])  # type: ignore[literal-required]  # a panel is one of its keys


def test_settings_are_compared_size_by_size(drawings: list[Drawing]) -> None:
    found = plots.pictures(groups([*grid(), *study()]), "tiny")
    assert [picture.name for picture in found] == [
        "emmet",
        "memit",
        "memit-without-bos",
        "memit-2-batches-of-16-settings",
    ], "sizes with one group have nothing to compare"
    drawing = drawings[-1]
    assert drawing.panels == [*PANELS, "perplexity"], "what a broken model cannot have stands beside S"
    assert [(line.label, line.colour, line.dashed, line.kept) for line in drawing.lines] == [
        ("settings of the preset", 0, False, True),
        ("without BOS", 0, True, False),
        ("relative_ridge=0.01", 1, False, False),
        ("relative_ridge=0.01, without BOS", 1, True, False),
        ("shrinkage=oas", 2, False, False),
        ("shrinkage=oas, without BOS", 2, True, False),
    ]
    perplexity = drawing.lines[0].points[1.0]["perplexity"]
    assert perplexity is not None and perplexity.value > 60


def test_perplexity_is_in_the_figure_of_the_scores(drawings: list[Drawing]) -> None:
    cells = [cell(multiplier=m, size=s, perplexity=True) for s in ((1, 4), (4, 1)) for m in (1.0, 2.0)]
    assert [picture.name for picture in plots.pictures(groups(cells), "tiny")] == ["memit"]
    assert labels(drawings[0]) == ["4 batches of 1", "1 batch of 4"]
    assert drawings[0].panels == [*PANELS, "perplexity"]


def test_what_was_not_recorded_has_no_panel(drawings: list[Drawing]) -> None:
    old = [made("memit", m, (1, 2), [record(0, 1.0), record(1, 0.0)]) for m in (1.0, 2.0)]
    plots.pictures(groups(old), "tiny")
    assert drawings[0].panels == ["es", "ps", "ns", "s"]


def test_a_point_alone_is_not_drawn(drawings: list[Drawing]) -> None:
    assert plots.pictures(groups([cell()]), "tiny") == []
    # Overrides alone, as where the whole sweep was run with them, have their figure.
    ridge = [cell(multiplier=m, settings={"ridge": 1}) for m in (1.0, 2.0)]
    assert [p.name for p in plots.pictures(groups(ridge), "tiny")] == ["memit-ridge-1"]


def test_the_numbers_are_in_the_words(drawings: list[Drawing]) -> None:
    cells = [cell(multiplier=m) for m in (2.0, None)]
    (picture,) = plots.pictures(groups(cells), "tiny")
    s, ea = ([found["scores"][name] for found in cells] for name in ("s", "ea"))
    assert picture.alt == (
        "ES, EA, PS, PA, NS, NA, S against the multiplier. "
        f"EA of 10 batches of 4: {ea[0]:.1f} at 2, {ea[1]:.1f} at full. "
        f"S of 10 batches of 4: {s[0]:.1f} at 2, {s[1]:.1f} at full."
    )


def test_equal_cells_give_equal_files_that_are_what_they_say() -> None:
    cells = [cell(multiplier=m, size=s) for s in ((1, 4), (4, 4)) for m in (1.0, 2.0, None)]
    (first,), (second,) = (plots.pictures(groups(cells), "$\\alpha <&> $") for _ in range(2))
    assert first.files == second.files and set(first.files) == {"svg", "pdf", "png"}
    root = ElementTree.fromstring(first.files["svg"])
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert first.files["png"].startswith(b"\x89PNG\r\n")
    text = first.files["svg"].decode()
    assert "<dc:date>" not in text and "<text" not in text, "no date, and no font of the reader's"
    for colour in COLOURS[:2]:
        assert colour.lower() in text
    # Seven panels with a dashed line each for two sizes.
    assert len(re.findall(r"stroke-dasharray: 3\.\d+,2\.1", text)) == 7 * 2
    other = plots.pictures(groups([cell(multiplier=m) for m in (1.0, 2.0)]), "tiny")[0]
    assert all(other.files[ending] != content for ending, content in first.files.items())


def test_without_matplotlib_the_mend_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BadConfig, match=r'the package matplotlib; pip install "fastmemit\[report\]"'):
        check_matplotlib()


def test_sizes_are_ordered_by_number() -> None:
    found = groups([cell(size=s) for s in ((16, 1), (4, 1), (1, 1))])
    assert found["batch_size"].tolist() == [1, 4, 16]
