from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from benchmarks import draw
from fastcov.bench.report import Row, Run, save
from fastcov.machine import Machine

BASE = {"device": "cpu", "dtype": "float32", "n": 8, "d": 4}


def row(contender, suite="rank_k", **more):
    kind = "ours" if contender.startswith("fastcov") else "library"
    return Row(**BASE, suite=suite, case="a & b", contender=contender, kind=kind,
               **{"status": "ok", **more})  # fmt: skip


def run(*rows):
    machine = Machine("a CPU", 2, (), "Linux")
    return Run(machine, {"torch": "2.13"}, 2, "command", "now", rows=list(rows))


def panel(figure):
    """Its only panel: the widths of the bars, and all that is written."""
    (axes,) = figure.axes
    texts = [text.get_text() for text in axes.texts]
    return [bar.get_width() for bar in axes.patches], [axes.get_title(loc="left"), *_names(axes), *texts]


def _names(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


def test_bars_are_as_long_as_their_figures_and_only_for_what_was_timed():
    made = run(
        row("fastcov avx2", p50=1.0, gflops=90.0, ratio=3.0),
        row("torch.addmm", p50=3.0, gflops=30.0, ratio=1.0, inexact=True),
        row("fastcov bad", status="failed", reason="wrong"),
    )
    assert draw.draw(made, "factor") is draw.draw(made, "collect") is None
    widths, words = panel(draw.draw(made, "rank_k"))
    assert widths == [90.0, 30.0]
    assert words == ["a & b", "fastcov avx2", "torch.addmm ~", "90  (3.00x)", "30"]


def test_the_peak_is_a_line_with_its_figure():
    made = run(row("fastcov avx2", p50=1.0, gflops=50.0, peak_before=90.0, peak_after=100.0))
    figure = draw.draw(made, "rank_k")
    assert "peak 100" in panel(figure)[1]
    (axes,) = figure.axes
    assert [line.get_xdata()[0] for line in axes.lines] == [100.0] and axes.get_xlim()[1] > 100


def test_each_suite_has_its_own_file_and_unit(tmp_path, capsys):
    save(
        run(
            row("fastcov", suite="factor", p50=0.25), row("fastcov", suite="collect", p50=1.0, tokens_per_second=1234.0)
        ),
        tmp_path / "one.json",
    )
    assert draw.main([str(tmp_path / "one.json"), "--out", str(tmp_path)]) == 0
    picture = (tmp_path / "one-factor.svg").read_text()
    assert ">250<" in picture and "a &amp; b" in picture
    ElementTree.fromstring(picture)  # it is XML
    assert "1,234" in (tmp_path / "one-collect.svg").read_text()
    assert not (tmp_path / "one-rank_k.svg").exists()
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_file_of_another_kind_is_an_error(tmp_path, capsys):
    (tmp_path / "x.json").write_text("{}")
    assert draw.main([str(tmp_path / "x.json"), "--out", str(tmp_path)]) == 2
    assert "is not a run of fastcov.bench" in capsys.readouterr().err
