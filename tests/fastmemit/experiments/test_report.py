from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastmemit.errors import BadConfig, BadData
from fastmemit.experiments.report import write_report
from tiny_sweeps import cell, sequences, write


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_report_is_written_and_again_the_same(tmp_path: Path) -> None:
    cells = [cell(multiplier=m) for m in (1.0, 2.0, None)]
    folder = write(tmp_path / "sweep", cells)
    report = write_report([folder], resamples=50)
    first = _files(folder / "report")
    assert {str(path.relative_to(folder / "report")) for path in report.files} == set(first)
    assert set(first) == {
        "report.html",
        "tables.md",
        "tables.tex",
        "tables.csv",
        "cells.csv",
        "figures/memit.svg",
        "figures/memit.pdf",
        "figures/memit.png",
    }
    assert report.model == "tiny-model" and set(report.cells["title"]) == {"MEMIT"}
    write(folder, cells[::-1], shards=2)  # the same cells, as two processes leave them
    (folder / "results.jsonl").unlink()
    write_report([folder], tmp_path / "elsewhere", resamples=50)
    assert _files(tmp_path / "elsewhere") == first
    assert first["figures/memit.svg"].startswith(b"<?xml")
    assert first["figures/memit.pdf"].startswith(b"%PDF")
    page = first["report.html"].decode()
    assert page.index("<li>Unedited, 10 batches of 4: S ") < page.index("ES, PS, NS: efficacy") < page.index("<figure")
    assert b"| 2 | " in first["tables.md"] and b"\\toprule" in first["tables.tex"]


def test_several_folders_make_one_report(tmp_path: Path) -> None:
    folders = [write(tmp_path / "a", [cell()]), write(tmp_path / "b", [cell(multiplier=None)])]
    write_report(folders, resamples=50)
    text = (tmp_path / "a" / "report" / "tables.md").read_text()
    full = cell(multiplier=None)["scores"]["s"]
    assert full is not None and f"| {full:.2f} |" in text
    assert not (tmp_path / "b" / "report").exists()
    assert str(folders[1]) in (tmp_path / "a" / "report" / "report.html").read_text()


def test_a_report_does_not_replace_the_steps_that_it_is_made_of(tmp_path: Path) -> None:
    folders = [sequences(tmp_path / name, {"ridge": ridge}) for name, ridge in (("a", 0.0), ("b", 0.1))]
    before = _files(folders[1])
    with pytest.raises(BadConfig, match="b' holds the sequences, and their steps would be replaced"):
        write_report(folders, tmp_path / "a" / ".." / "b", resamples=50)
    assert _files(folders[1]) == before


def test_nothing_is_written_where_there_is_nothing_to_report(tmp_path: Path) -> None:
    folder = write(tmp_path / "sweep", [])
    with pytest.raises(BadData, match="No finished cell"):
        write_report([folder])
    (tmp_path / "file").write_text("x")
    write(folder, [cell()])
    with pytest.raises(BadConfig, match="file' is a file; name a folder with --out"):
        write_report([folder], tmp_path / "file", resamples=50)
    assert not (folder / "report").exists()


def test_more_draws_are_other_intervals(tmp_path: Path) -> None:
    folder = write(tmp_path, [cell()])
    found = [write_report([folder], resamples=n).cells for n in (50, 500)]
    first, second = (cells["s"].iat[0] for cells in found)
    assert first is not None and second is not None
    assert first.value == second.value and first != second
    assert json.loads((tmp_path / "sweep.json").read_text())["model"] == "tiny-model"


def test_names_of_strangers_are_text_in_every_file(tmp_path: Path) -> None:
    evil = '"><script>alert(1)</script>\x1b[2J\x07\u202egnp\ud800\x00=1+1'
    cells = [cell("memit", d, (2, 2), settings={"shrinkage": evil}) for d in (2.0, None)]
    folder = write(tmp_path / "sweep", cells, model=evil, dtype=evil, methods={evil: {evil: evil}})
    timings = [json.loads(line) for line in (folder / "timings.jsonl").read_text().splitlines()]
    for timing in timings:
        timing["hardware"], timing["versions"], timing["seconds"] = evil, {evil: evil}, {evil: 1.0}
    (folder / "timings.jsonl").write_text("".join(json.dumps(t) + "\n" for t in timings))
    report = write_report([folder], resamples=20)
    assert report.model.startswith('"><script>alert(1)</script>\\x1b[2J\\x07\\u202egnp\\ud800\\x00')
    for path in report.files:
        if path.suffix in (".png", ".pdf"):
            continue
        text = path.read_bytes().decode("utf-8")
        assert not set(text) & {chr(n) for n in (*range(9), *range(11, 32), *range(127, 160))}, path
        assert "\u202e" not in text
        if path.suffix in (".html", ".md", ".svg"):
            assert "<script>" not in text and "<script" not in text.replace("\\<script", "")
    heading = (folder / "report" / "tables.md").read_text().splitlines()[0]
    assert heading.startswith('# "\\>\\<script\\>alert(1)\\</script\\>\\\\x1b[2J')
