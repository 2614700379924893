"""Precompute says how fast it went, where it is not told to be quiet."""

from __future__ import annotations

import re

import pytest

from fastmemit.cli import main
from tiny_commands import Place, run


def test_it_says_how_fast_it_went_and_only_where_it_collected(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.model[-1] == "--quiet"
    command = ["precompute", *place.model[:-1], "--corpus", place.corpus, "--multiplier", "4",
               "--layers", "0-1"]  # fmt: skip
    out = run(capsys, *command)
    line = r"\n  256 keys of 2 layers in \d+\.\d s: [\d,]+ tokens/s"
    assert re.search(rf"{line}\n", out)
    assert "tokens/s" not in run(capsys, *command)  # stored: nothing was collected
    out = run(capsys, *command, "--cache", place.at / "other", "--throughput")
    assert re.search(rf"{line}, \d+ % of what this machine's arithmetic allows\n", out)


def test_quiet_measures_nothing(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastcov.throughput.measured_peak", None)  # to call it would raise
    out = run(capsys, "precompute", *place.model, "--corpus", place.corpus, "--multiplier", "4",
              "--layers", "0-1")  # fmt: skip
    assert "second moments of 2 layers" in out and "tokens/s" not in out


def test_a_corpus_that_is_not_there_is_said_before_the_model_is_loaded(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastmemit.cli.stats.make_editor", None)  # to call it would raise
    assert main(["precompute", *place.model, "--corpus", str(place.at / "no.jsonl")]) == 2
    assert "There is no file" in capsys.readouterr().err


def test_forward_passes_in_bfloat16_are_asked_for_by_a_flag(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["precompute", *place.model, "--corpus", place.corpus, "--multiplier", "4", "--layers", "0-1",
               "--forward", "bfloat16"]  # fmt: skip
    monkeypatch.setattr("fastmemit.statistics.why_no_bfloat", lambda: "no such instructions")
    assert main([*map(str, command)]) == 2
    assert "forward='bfloat16' would be slower here than float32 (no such instructions)" in capsys.readouterr().err
    monkeypatch.setattr("fastmemit.statistics.why_no_bfloat", lambda: None)
    assert ", bfloat16 forward passes, in " in run(capsys, *command)
