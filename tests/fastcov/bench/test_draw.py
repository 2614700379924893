from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

from benchmarks import draw
from fastcov.bench.schema import Machine, Row, Run, save

BASE = {"device": "cpu", "dtype": "float32", "n": 8, "d": 4}


def row(contender, suite="rank_k", **more):
    kind = "ours" if contender.startswith("fastcov") else "library"
    return Row(**BASE, suite=suite, case="a & b", contender=contender, kind=kind,
               **{"status": "ok", **more})  # fmt: skip


def run(*rows):
    machine = Machine("a CPU", 2, (), "Linux")
    return Run(machine, {"torch": "2.13"}, 2, "command", "now", rows=list(rows))


def bars(picture):
    """Widths of the bars, without the background."""
    ElementTree.fromstring(picture)  # it is XML
    return [float(width) for width in re.findall(r'<rect x="\d+" y="\d+" width="([\d.]+)"', picture)]


def test_bars_are_as_long_as_their_figures_and_only_for_what_was_timed():
    found = draw.pictures(
        run(
            row("fastcov avx2", p50=1.0, gflops=90.0, ratio=3.0),
            row("torch.addmm", p50=3.0, gflops=30.0, ratio=1.0),
            row("fastcov bad", status="failed", reason="wrong"),
        )
    )
    assert set(found) == {"rank_k"}
    longest, short = bars(found["rank_k"])
    assert longest == draw.WIDTH - draw.LABELS - draw.VALUES
    assert abs(short - longest / 3) < 0.1
    assert "90  (3.00x)" in found["rank_k"] and "a &amp; b" in found["rank_k"]
    assert "bad" not in found["rank_k"] and "peak" not in found["rank_k"]


def test_the_peak_is_the_scale_where_it_is_the_longest():
    picture = draw.pictures(run(row("fastcov avx2", p50=1.0, gflops=50.0, peak_before=90.0, peak_after=100.0)))[
        "rank_k"
    ]
    assert bars(picture) == [(draw.WIDTH - draw.LABELS - draw.VALUES) / 2]
    assert "measured peak 100" in picture


def test_each_suite_has_its_own_file_and_unit(tmp_path, capsys):
    save(
        run(
            row("fastcov", suite="factor", p50=0.25), row("fastcov", suite="collect", p50=1.0, tokens_per_second=1234.0)
        ),
        tmp_path / "one.json",
    )
    assert draw.main([str(tmp_path / "one.json"), "--out", str(tmp_path)]) == 0
    assert "250" in (tmp_path / "one-factor.svg").read_text()
    assert "1,234" in (tmp_path / "one-collect.svg").read_text()
    assert not (tmp_path / "one-rank_k.svg").exists()
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_file_of_another_kind_is_an_error(tmp_path, capsys):
    (tmp_path / "x.json").write_text("{}")
    assert draw.main([str(tmp_path / "x.json"), "--out", str(tmp_path)]) == 2
    assert "is not a run of fastcov.bench" in capsys.readouterr().err
