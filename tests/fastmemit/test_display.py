"""Bars on terminals and in notebooks, lines in logs, tables and data frames."""

from __future__ import annotations

import io
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from fastmemit import display
from fastmemit.display import Rows, bar, duration, html_table
from fastmemit.evaluation.runner import Result
from fastmemit.evaluation.scores import score_record
from fastmemit.experiments.results import cell_columns


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("shown", [True, False])
def test_a_note_is_drawn_behind_the_numbers_on_a_terminal(monkeypatch: pytest.MonkeyPatch, shown: bool) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with bar("keys", 10, shown) as advance:
        advance.note("12 tokens/s")
        time.sleep(0.15)  # tqdm draws ten times a second
        advance(4)
    drawn = sys.stderr.getvalue()
    if shown:
        assert "keys" in drawn and "4/10" in drawn and "12 tokens/s" in drawn
    else:
        assert drawn == ""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """A time of our own, and the lines that are written to stderr, which is no terminal."""
    place = SimpleNamespace(now=1000.0, said=lambda: capsys.readouterr().err.splitlines())
    monkeypatch.setattr(display.time, "monotonic", lambda: place.now)
    monkeypatch.setattr(display._Lines, "_next", 0.0)
    return place


def test_a_log_gets_a_line_of_all_open_bars_every_thirty_seconds(clock: Any) -> None:
    with bar("records", 40, True) as outer:
        outer.note("memit/b1x1")
        outer(0)
        clock.now += 20
        outer(10)
        assert clock.said() == []  # a short run says nothing
        with bar("target steps", 2500, True) as inner:
            clock.now += 10
            inner(0)
            inner(1000)  # at once after a line: nothing
            clock.now += 29.9
            inner(100)
        clock.now += 0.1
        outer(10)
    assert clock.said() == [
        "records (memit/b1x1): 10 of 40 (25%), about 2 min left; target steps: 0 of 2,500",
        "records (memit/b1x1): 20 of 40 (50%), about 60 s left",
    ]
    assert display._Lines._open == []


def test_a_log_has_no_line_at_once_after_a_pause_nor_of_a_quiet_bar(clock: Any) -> None:
    with bar("first", 2, True) as advance:
        clock.now += 31
        advance(1)
    clock.now += 1000  # a person thinks
    with bar("second", 2, True) as advance, bar("quiet", 2, False) as quiet:
        advance(1)
        clock.now += 60
        quiet(1)
    assert clock.said() == ["first: 1 of 2 (50%), about 31 s left"]


def test_lines_end_with_what_ended_early(clock: Any) -> None:
    with pytest.raises(KeyError), bar("records", 40, True):
        raise KeyError
    assert display._Lines._open == []


@pytest.mark.parametrize("widgets", [True, False])
def test_a_notebook_gets_a_bar_with_and_without_ipywidgets(monkeypatch: pytest.MonkeyPatch, widgets: bool) -> None:
    from tqdm import notebook

    drawn: list[str] = []

    class Widget(display.tqdm):
        def __init__(self, **settings: Any) -> None:
            drawn.append(settings["desc"])
            super().__init__(**{**settings, "disable": True})

    shell = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr(notebook, "IProgress", object if widgets else None)
    monkeypatch.setattr(notebook, "tqdm", Widget)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with bar("keys", 3, True) as advance, bar("tokens read", 3, True):
        advance(3)
    text = sys.stderr.getvalue()
    if widgets:
        assert (drawn, text) == (["keys", "tokens read"], "")
    else:  # one at a time: a cell's output cannot be drawn over but in its last line
        assert drawn == [] and "keys" in text and "tokens read" not in text and "\x1b" not in text


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (89.4, "89 s"), (90, "2 min"), (5400, "1 h 30 min"), (36000, "10 h 0 min"), (259200, "3.0 days")],
)
def test_a_time_reads_as_people_say_it(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_a_table_escapes_what_is_in_it() -> None:
    made = html_table([{"a<b": "<script>x</script>\x1b[2J", "n": 0.123456, "none": None}])
    assert "<script>" not in made and "\x1b" not in made and "&lt;script&gt;" in made
    assert made.startswith("<table><thead><tr><th>a&lt;b</th>") and "<td>0.1235</td><td></td>" in made
    assert html_table([]) == "<table><thead><tr></tr></thead><tbody></tbody></table>"


def score(case: int) -> Any:
    return score_record(case, (1.0, 2.0, True), [(1.0, 2.0, True), (2.0, 1.0, False)], [(3.0, 1.0, True)])


def test_scores_are_short_and_become_a_data_frame() -> None:
    pytest.importorskip("pandas")
    scores = Rows([score(4), score(7)], lambda one: {"case_id": one.case_id, **one.shares()})
    assert repr(scores[0]) == "<RecordScore: record 4, ES 1.00, PS 0.50, NS 1.00, EA 1.00, PA 0.50, NA 1.00>"
    assert "<b>RecordScore</b>: record 4" in scores[0]._repr_html_()
    assert scores == [score(4), score(7)] and repr(scores).startswith("<2 rows of case_id, es, ps")
    frame = scores.to_pandas()
    assert frame["ps"].tolist() == [0.5, 0.5] and frame["case_id"].tolist() == [4, 7]
    assert scores._repr_html_().count("<tr>") == 3


def test_what_an_evaluation_found_is_short_and_becomes_a_data_frame() -> None:
    pytest.importorskip("pandas")
    row = {"es": 0.0, "ps": None, "nll": {"rewrite": [1.0, 2.0]}}
    found = Result(
        before={"es": 0.0, "ps": None},
        after={"es": 100.0, "ps": None},
        records=[{"case_id": 3, "batch": 0, "before": row, "after": {**row, "es": 1.0}}],
        perplexity={"before": 20.0, "after": 21.0},
    )
    assert repr(found) == "<Result: 1 records edited, ES 100.0, PERPLEXITY 21.0; to_pandas() has them one by one>"
    assert "<td>es</td><td>0</td><td>100</td><td>100</td>" in found._repr_html_()
    (line,) = found.to_pandas().to_dict("records")
    assert (line["case_id"], line["es_before"], line["es_after"]) == (3, 0.0, 1.0) and "nll_before" not in line


def test_a_cell_and_a_step_show_their_place_and_scores() -> None:
    cell = {
        "key": "memit/b1x1/x2", "settings": {"ridge": 0.1}, "scores": {"es": 50.0}, "before": {"es": 0.0},
        "perplexity": {"before": 1.0, "after": 2.0}, "records": [1, 2], "jitter": {},
    }  # fmt: skip
    shown = {"key": "memit/b1x1/x2", "settings": "ridge=0.1", "es": 50.0, "perplexity": 2.0, "es_before": 0.0}
    assert cell_columns(cell) == shown
    step = {"key": "k/1", "edits": 1, "scores": {"es": 1.0}, "before": {}, "perplexity": None, "by_batch": []}
    assert cell_columns(step) == {"key": "k/1", "edits": 1, "es": 1.0, "perplexity": None}
