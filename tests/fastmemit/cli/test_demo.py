"""The demonstration's whole way, on a tiny model."""

from __future__ import annotations

import re
import shlex

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
            "layers=0-1", "--set", "steps=2", "--out", place.at / "demo.st", *more]  # fmt: skip


def test_it_edits_scores_saves_and_undoes(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, *demo(place))
    assert "multiplier 4, 256 keys" in out
    cell = r"[-+]?[\d.]+ \[[-\d.]+, [-\d.]+\]"
    for name in ("ES", "PS", "NS", "S", "EA", "PA", "NA"):
        assert re.search(rf"^{name} +{cell} +{cell} +{cell}$", out, re.MULTILINE), name
    assert re.search(r"^perplexity +[\d.]+ +[\d.]+ +[-+][\d.]+$", out, re.MULTILINE)
    assert "ES, PS, NS: the wanted answer is more probable" in out and "EA, PA, NA: the" in out
    told = re.search(r"^(\d) of 5 facts are now what the model says", out, re.MULTILINE)
    ea = re.search(rf"^EA +{cell} +([\d.]+)", out, re.MULTILINE)
    assert told is not None and ea is not None
    assert 20 * int(told[1]) == float(ea[1]), "the verdict is the exact matches, counted"
    assert out.count(" (says: ") == 5 - int(told[1])
    assert out.count("  before: ") == out.count("  after:  ") == 4
    assert re.search(r"undone: all \d+ tensors are bit for bit the original\n", out)
    assert len(Delta.load(place.at / "demo.st").provenance["requests"]) == 5
    assert "edited all of them at once by memit, target vectors by rotate\n" in out


@pytest.mark.parametrize(
    ("more", "how"),
    [
        (("--set", "optimiser=adam"), "memit, target vectors by adam"),
        (("--set", "v_lr=0.4"), "memit, target vectors by adam"),  # which v_lr is of
        (("--method", "ultraedit"), "ultraedit"),
    ],
)
def test_how_the_demonstration_makes_target_vectors(place: Place, capsys: pytest.CaptureFixture[str], more, how):
    words = demo(place, *more)
    if "ultraedit" in more:  # it has no steps
        at = words.index("steps=2")
        words = words[: at - 1] + words[at + 1 :]
    assert f"edited all of them at once by {how}\n" in run(capsys, *words)


def test_a_page_of_the_demonstration(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    page = place.at / "page.html"
    out = run(capsys, *demo(place, "--html", page))
    assert f"wrote the page {page}\n" in out
    written = page.read_text()
    assert written.count("<article>") == 15 and "Neighbours" in written


def test_it_ends_with_commands_that_work_as_they_stand(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, *demo(place))
    told = out[out.index("Next, with the edit in") :].replace("\\\n", " ").splitlines()
    commands = [shlex.split(line.partition("fastmemit ")[2]) for line in told if "--" in line]
    assert [command[0] for command in commands] == ["apply", "edit"]
    apply = run(capsys, *commands[0], *place.model[2:])
    assert "see the Eiffel Tower" in apply
    small = ["--multiplier", "4", "--set", "layers=0-1", "--set", "steps=1"]
    mine = ["--out", place.at / "mine.st"]
    run(capsys, *commands[1], *place.model[2:], *small, *mine)
    assert len(Delta.load(place.at / "mine.st").provenance["requests"]) == 1


def test_it_says_if_the_weights_do_not_come_back(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastmemit.edits import Edit

    monkeypatch.setattr(Edit, "undo", lambda self: None)
    assert main([str(word) for word in demo(place)]) == 2
    assert "The undo left 2 weights changed" in capsys.readouterr().err


def test_a_bad_place_is_refused_first(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    args = [*demo(place)[:-1], place.at / "no" / "demo.st"]
    assert "does not exist" in refused(capsys, place, *args)
