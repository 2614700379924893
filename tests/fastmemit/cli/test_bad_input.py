"""Bad input on the command line: exit code 2, one line with value and fix, and nothing changed."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from typing import Any

import pytest

import fastcov
from tiny_commands import EDIT, Place, edit_args, refused

Capture = pytest.CaptureFixture[str]


GOOD = {"prompt": "The capital of {} is", "subject": "France", "target_new": "Rome"}


@pytest.mark.parametrize(
    ("requests", "parts"),
    [
        ([{**GOOD, "prompt": "It lies in"}], ["'France' is not in the prompt 'It lies in'", "write {}"]),
        ([GOOD, {**GOOD, "prompt": "{} and {}"}], ["request 1", "has 2 of {}", "exactly one {}"]),
        ([{**GOOD, "target_new": " "}], ["target_new of 'The capital of France is' is empty", "give"]),
        ([{**GOOD, "subject": " "}], ["subject", "is empty"]),
        (
            [GOOD, {**GOOD, "subject": "Italy"}, {**GOOD, "target_new": "Berlin"}],
            ["Requests 0 and 2", "'The capital of France is'", "'Rome' and 'Berlin'", "keep one"],
        ),
        ([{"prompt": "{} is"}], ["has no subject", "add it"]),
        ([], ["holds no request"]),
        ([7], ["must be an object", "7"]),
        ([{**GOOD, "subject": "\ud83d"}], ["is not valid Unicode"]),
    ],
)
def test_requests(place: Place, capsys: Capture, requests: list, parts: list[str]) -> None:
    path = place.at / "bad.json"
    path.write_text(json.dumps(requests))
    line = refused(capsys, place, *edit_args(place, path))
    assert all(part in line for part in parts), line
    assert not (place.at / "cache").exists()  # nothing was computed


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b"Eiffel Tower is in Rome\n", "is not JSON"),
        (b'{"prompt": "\xff"}', "is not UTF-8 text: byte 12 (0xff)"),
        (b'{"data": []}', "not records; write a list"),
    ],
)
def test_request_files(place: Place, capsys: Capture, content: bytes | None, part: str) -> None:
    path = place.at / "bad.jsonl"
    if content is not None:
        path.write_bytes(content)
    line = refused(capsys, place, *edit_args(place, path))
    assert part in line and str(path) in line


def test_a_folder_of_requests(place: Place, capsys: Capture) -> None:
    assert "is a folder; give one file" in refused(capsys, place, *edit_args(place, place.at))


@pytest.mark.parametrize(
    ("fact", "part"),
    [
        (["--prompt", "It is", "--subject", "x", "--target", "y"], "'x' is not in the prompt 'It is'"),
        (["--prompt", "{} is {}", "--subject", "x", "--target", "y"], "has 2 of {}"),
        (["--prompt", "{} is", "--subject", "x", "--target", ""], "target_new of 'x is' is empty"),
        (["--prompt", "{} is", "--subject", "x"], "either by --facts FILE or by --prompt"),
        ([], "either by --facts FILE or by --prompt"),
    ],
)
def test_one_fact(place: Place, capsys: Capture, fact: list[str], part: str) -> None:
    assert part in refused(capsys, place, "edit", *place.model, *fact, "--out", place.at / "e")


def test_an_edit_that_would_be_gone(place: Place, capsys: Capture) -> None:
    line = refused(capsys, place, "edit", *place.model, "--facts", place.requests)
    assert "--out FILE or --save-model DIR" in line


@pytest.mark.parametrize("multiplier", ["0", "-1", "nan", "inf"])
@pytest.mark.parametrize("verb", ["precompute", "edit", "evaluate"])
def test_a_multiplier_that_is_not_above_zero(place: Place, capsys: Capture, verb: str, multiplier: str) -> None:
    rest = {
        "precompute": ["--layers", "0"],
        "edit": [*EDIT, "--facts", place.requests, "--out", place.at / "e"],
        "evaluate": [*EDIT, "--facts", place.records, "--batch-size", "1", "--num-batches", "1"],
    }[verb]
    # Without a corpus: the multiplier is refused before one is looked for.
    line = refused(capsys, place, verb, *place.model, "--multiplier", multiplier, *rest)
    shown = repr(float(multiplier))
    assert f"above 0 but is {shown}; 10 is recommended" in line
    assert not (place.at / "cache").exists()


@pytest.mark.parametrize("layers", ["3", "0,99"])
def test_a_layer_out_of_range(place: Place, capsys: Capture, layers: str) -> None:
    number = layers.split(",")[-1]
    line = refused(capsys, place, "precompute", *place.model, "--layers", layers)
    assert number in line and "0" in line and "2" in line
    args = edit_args(place, place.requests, "--set", f"layers={layers}")
    assert number in refused(capsys, place, *args)


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("clamp", ["'clamp' is not name=value"]),
        ("nonsense=1", ["There is no setting 'nonsense'; memit has layers, clamp, optimiser, steps"]),
        ("clmap=1", ["There is no setting 'clmap'; did you mean 'clamp'? memit has layers"]),
        ("lambda_e=1", ["lambda_e is a setting of emmet; memit has layers, clamp"]),
        ("keys=original", ["keys is a setting of rome; memit has layers, clamp"]),
        ("l2=3", ["l2 is a setting of alphaedit; memit has layers, clamp"]),
        ("clamp=much", ["'much' of clamp is not a number"]),
        ("clamp=0", ["clamp must be a finite number above 0 but is 0.0"]),
        ("clamp=nan", ["clamp must be a finite number above 0 but is nan"]),
        ("steps=0", ["steps must be a whole number above 0 but is 0"]),
        ("steps=2.5", ["'2.5' of steps is not a whole number"]),
        ("layers=a-b", ["layers 'a-b'", "4-8"]),
        ("layers=8-4", ["'8-4'", "empty"]),
        ("layers=1,0", ["ascending"]),
        ("method=rome", ["There is no setting 'method'; memit has"]),
    ],
)
def test_settings(place: Place, capsys: Capture, setting: str, parts: list[str]) -> None:
    line = refused(capsys, place, *edit_args(place, place.requests, "--set", setting))
    assert all(part in line for part in parts), line


def test_several_layers_for_one(place: Place, capsys: Capture) -> None:
    args = edit_args(place, place.requests, "--method", "rome")
    assert "rome edits one layer but layers are [0, 1]; set layers=N" in refused(capsys, place, *args)


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("gone.txt", None, ["There is no file", "gone.txt", ".jsonl"]),
        ("latin.txt", "café\n".encode("latin-1"), ["is not UTF-8 text: byte 3 (0xe9)", "save"]),
        ("other.jsonl", b'{"body": "x"}\n', ["has no field 'text'", "body", "field"]),
        ("list.json", b'[{"text": "x"}, {"body": "x"}]', ["Item 1", "has no field 'text'"]),
        ("number.jsonl", b'{"text": 5}\n', ["'text' of line 1", "not text (5)"]),
        ("broken.jsonl", b"{", ["is not JSON"]),
        ("empty.txt", b"", ["is empty"]),
        ("white.txt", b" \n\n \n", ["holds no text"]),
        ("corpus.pdf", b"%PDF", ["ends in '.pdf'"]),
        ("short.txt", b"The capital of France is Paris.", ["keys for", "but 640 were wanted"]),
    ],
)
def test_a_corpus(place: Place, capsys: Capture, name: str, content: bytes | None, parts: list[str]) -> None:
    path = place.at / name
    if content is not None:
        path.write_bytes(content)
    line = refused(capsys, place, "precompute", *place.model, "--layers", "0", "--corpus", path)
    assert all(part in line for part in parts), line
    assert not [p for p in (place.at / "cache").rglob("*") if p.is_file()]


def test_statistics_of_another_model(place: Place, capsys: Capture) -> None:
    place.edit(capsys, "good.st")
    mine = sorted((place.at / "cache").rglob("*.layers.1.*.safetensors"))
    other = Place(place.at, place.other_model(), place.corpus, place.requests, place.records)
    other.edit(capsys, "other.st")
    (theirs,) = set((place.at / "cache").rglob("*.layers.1.*.safetensors")) - set(mine)
    shutil.copy(theirs, mine[0])
    line = refused(capsys, place, "edit", *place.model, *EDIT, "--facts", place.requests,
                   "--out", place.at / "e.st")  # fmt: skip
    assert str(mine[0]) in line and "of another model" in line and "delete it" in line
    assert fastcov.read_provenance(theirs)["model"] in line


@pytest.mark.parametrize("place_of_damage", [40, -3])
def test_damaged_statistics(place: Place, capsys: Capture, place_of_damage: int) -> None:
    place.edit(capsys, "good.st")
    (path,) = (place.at / "cache").rglob("*.layers.1.*.safetensors")
    data = bytearray(path.read_bytes())
    data[place_of_damage] ^= 1
    path.write_bytes(data)
    line = refused(capsys, place, *edit_args(place, place.requests))
    assert str(path) in line and "delete it and precompute" in line


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")


@pytest.mark.parametrize("verb", ["precompute", "edit", "edit to a model", "evaluate"])
def test_a_full_disk(place: Place, capsys: Capture, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    commands: dict[str, list[Any]] = {
        "precompute": ["precompute", *place.model, "--corpus", place.corpus, "--multiplier", "2",
                       "--layers", "0"],
        "edit": edit_args(place, place.requests),
        "edit to a model": [*edit_args(place, place.requests)[:-2], "--save-model",
                            place.at / "out"],
        "evaluate": ["evaluate", *place.model, *EDIT, "--facts", place.records, "--batch-size", "1",
                     "--num-batches", "1", "--json", place.at / "out.json"],
    }  # fmt: skip
    if verb != "precompute":
        place.edit(capsys, "edit.st")  # statistics and targets are kept, and a former file
    monkeypatch.setattr(os, "replace", full)
    line = refused(capsys, place, *commands[verb])
    monkeypatch.undo()
    assert line.startswith("No space left on device: somewhere; nothing was left half written")
    assert not [p for p in place.at.rglob(".*")]
    if verb == "precompute":
        assert not [p for p in (place.at / "cache").rglob("*") if p.is_file()]


@pytest.fixture
def small_files() -> Any:
    """A disk on which no file grows beyond 100 kB: the system's own refusal, not a stand-in."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def on() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))

    yield on
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_model_that_does_not_fit_on_the_disk(place: Place, capsys: Capture, small_files: Callable[[], None]) -> None:
    saved = place.edit(capsys, "edit.st")
    out = place.at / "out"
    small_files()
    line = refused(capsys, place, "apply", *place.model, "--edit", saved, "--save-model", out)
    assert line.startswith(f"File too large: {out}; nothing was left half written")
    assert not out.exists()


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("pass more text, or allow_fewer=True.", "pass more text, or --allow-fewer."),
        ("name the one that holds the text with field=.", "holds the text with --field."),
        ("or pass force=True (--force) if", "or pass --force if"),
    ],
)
def test_a_mend_is_named_as_the_option_that_it_is_here(said, shown, capsys):
    from fastmemit.cli import _fail

    assert _fail(said) == 2
    assert shown in capsys.readouterr().err


@pytest.mark.parametrize("extra", [["--prompt", "{} is"], ["--target", "x"]])
def test_a_fact_beside_a_file_of_facts_is_not_ignored(extra, capsys):
    from fastmemit.cli import main

    args = ["edit", "--model", "none", "--facts", "f.jsonl", "--out", "e.safetensors", *extra]
    assert main(args) == 2
    assert "either by --facts FILE or by --prompt" in capsys.readouterr().err
