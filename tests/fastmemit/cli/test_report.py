from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastmemit.cli import main
from tiny_commands import Place, run
from tiny_sweeps import cell, write


def test_a_report_is_written_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [cell(multiplier=m) for m in (1.0, None)]
    folder = write(tmp_path / "sweep", cells)
    lines = run(capsys, "experiment", "report", folder, "--out", tmp_path / "out").splitlines()
    assert lines[0] == "tiny-model"
    assert lines[1].split() == ["S,", "at", "multiplier", "1", "full"]
    for line, name in ((lines[2], "s"), (lines[4], "ea")):
        scores = [f"{found['scores'][name]:.2f}" for found in cells]
        assert line.split() == ["MEMIT,", "10", "batches", "of", "4", *scores]
    assert lines[5].startswith("least share of full, %, at multiplier")
    written = [line.removeprefix("written to ") for line in lines[7:]]
    assert all(Path(path).is_file() for path in written)
    assert str(tmp_path / "out" / "report.html") in written
    assert not (folder / "report").exists()


def test_what_a_sweep_writes_is_reported(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    out = place.at / "sweep"
    run(capsys, "experiment", "sweep", *place.model, "--facts", place.records, "--corpus", place.corpus,
        "--methods", "emmet", "--multipliers", "2,full", "--batch-sizes", "1", "--num-batches", "2",
        "--vary", "layers=1,steps=3", "--only-varied", "--out", out)  # fmt: skip
    lines = run(capsys, "experiment", "report", out, "--json", place.at / "cells.json").splitlines()
    assert lines[2].startswith("EMMET, layers=[1], steps=3, 2 batches of 1 ")
    found = json.loads((place.at / "cells.json").read_text(encoding="utf-8"))
    assert [one["settings"] for one in found["cells"]] == [{"layers": [1], "steps": 3}] * 2
    html = (out / "report" / "report.html").read_text(encoding="utf-8")
    assert place.records.name in html and "emmet/b1x2/full" in html
    assert (out / "report" / "figures" / "emmet-layers-1-steps-3.svg").is_file()


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["nowhere"], "does not exist; name one that a sweep wrote."),
        (["bare"], "holds neither sweep.json nor sequential.json; name a folder that a sweep or sequences wrote."),
        (["sweep", "other"], "whose weights differ; report on each model apart."),
        ([], "the following arguments are required: DIR; see fastmemit experiment report --help."),
    ],
)
def test_what_cannot_be_reported_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, names: list[str], said: str
) -> None:
    # Said with or without matplotlib: to look for it at all would raise.
    monkeypatch.setattr("fastmemit.experiments.report.check_matplotlib", None)
    write(tmp_path / "sweep", [cell()])
    write(tmp_path / "other", [cell()], fingerprint="0" * 64)
    (tmp_path / "bare").mkdir()
    try:
        code = main(["experiment", "report", *(str(tmp_path / name) for name in names)])
    except SystemExit as left:
        code = left.code  # type: ignore[assignment]  # an exit has a number
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("fastmemit: error: ") and error.endswith(f"{said}\n")
    assert error.count("\n") == 1
    assert not list(tmp_path.rglob("report.html"))
