"""The demonstration's whole way, on a tiny model."""

from __future__ import annotations

import re

import pytest

from fastmemit import data
from fastmemit.cli import main
from fastmemit.delta import Delta
from tiny_commands import Place, refused, run


@pytest.fixture(autouse=True)
def few_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five facts instead of all: a tiny model is not quick at steps, only small."""
    facts = data.builtin_facts()[:5]
    monkeypatch.setattr(data, "builtin_facts", lambda: facts)


def demo(place: Place, *more: str) -> list[object]:
    return ["demo", *place.model, "--corpus", place.corpus, "--multiplier", "4", "--set",
            "layers=0-1", "--set", "steps=2", "--save", place.at / "demo.st", *more]  # fmt: skip


def test_it_edits_scores_saves_and_undoes(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, *demo(place))
    assert "multiplier 4, 256 keys" in out
    assert re.search(r"ES +PS +NS +S\nbefore( +[\d.]+){4}\nafter ( +[\d.]+){4}\n", out)
    assert out.count("  before: ") == out.count("  after:  ") == 4
    assert re.search(r"undone: all \d+ tensors are bit for bit the original\n", out)
    assert len(Delta.load(place.at / "demo.st").provenance["requests"]) == 5


def test_it_says_if_the_weights_do_not_come_back(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastmemit.applied import Edit

    monkeypatch.setattr(Edit, "undo", lambda self: None)
    assert main([str(word) for word in demo(place)]) == 2
    assert "The undo left 2 weights changed" in capsys.readouterr().err


def test_a_bad_place_is_refused_first(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    args = [*demo(place)[:-1], place.at / "no" / "demo.st"]
    assert "does not exist" in refused(capsys, place, *args)
