"""``fastmemit experiment sequential`` from options to files."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tiny_commands import Place, refused, run


def argv(place: Place, out: Any, *more: Any) -> list[Any]:
    return ["experiment", "sequential", *place.model, "--facts", place.records, "--corpus", place.corpus,
            "--set", "layers=0-1", "--set", "steps=2", "--batch-size", "2", "--num-batches", "2",
            "--multipliers", "1,4", "--out", out, *more]  # fmt: skip


def test_from_records_to_table_and_figure(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out = place.at / "out"
    more = ("--text", place.corpus, "--text-tokens", "100")
    said = run(capsys, *argv(place, out, *more))
    assert "4 facts in 2 batches, all of them kept" in said and "4 sequences in" in said
    lines = [json.loads(line) for line in (out / "sequential.jsonl").read_text().splitlines()]
    assert [(line["multiplier"], line["preserve"], line["edits"]) for line in lines] == [
        (multiplier, preserve, edits) for multiplier in (1.0, 4.0) for preserve in (True, False) for edits in (1, 2)
    ]
    rows = [line.split() for line in said.splitlines()]
    shown = next(row for row in rows if row and row[0] == "memit/b2x2/x4/plain")
    names = ("es", "ps", "ns", "s", "ea", "pa", "na")
    values = [*(lines[-1]["scores"][name] for name in names), lines[-1]["perplexity"]]
    assert shown[1:] == [f"{value:.2f}" for value in values]
    assert (out / "sequential.md").read_text().count("\n| x") == 8 + 4
    assert (out / "sequential.svg").is_file() and (out / "sequential.png").is_file()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert run(capsys, *argv(place, out, *more)) == said
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    # Fewer of them: nothing is run again, and nothing is lost.
    said = run(capsys, *argv(place, out, *more, "--earlier-keys", "no"))
    assert "2 sequences in" in said
    assert len((out / "sequential.jsonl").read_text().splitlines()) == 8


def test_bad_options_are_refused_before_anything_is_made(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    out = place.at / "none"
    assert "neither a number above 0 nor 'full'" in refused(capsys, place, *argv(place, out, "--multipliers", "1,much"))
    assert "too few for 9 batches of 2" in refused(capsys, place, *argv(place, out, "--num-batches", "9"))
    assert "must be a whole number above 0" in refused(capsys, place, *argv(place, out, "--score-every", "0"))
    assert "There is no setting 'speed'; did you mean 'spread'? memit has layers" in refused(
        capsys, place, *argv(place, out, "--set", "speed=1")
    )
    assert "give a file, builtin or wikipedia" in refused(capsys, place, *argv(place, out, "--corpus", "self"))
    assert "is a file; name a folder" in refused(capsys, place, *argv(place, place.records))
    assert not out.exists()
