"""Models, edits, records and output places that cannot be used: refused before any work."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmemit.delta import Delta
from tiny_commands import EDIT, Place, edit_args, refused

Capture = pytest.CaptureFixture[str]


def untouched(place: Place) -> bool:
    return not (place.at / "cache").exists()


@pytest.mark.parametrize(
    ("model", "part"),
    [
        ("./gone", "There is no model folder './gone'"),
        ("", "There is no model folder ''"),
        ("nobody/has-this-model", "The model 'nobody/has-this-model' cannot be loaded"),
    ],
)
def test_an_unknown_model(place: Place, capsys: Capture, model: str, part: str) -> None:
    options = ("--model", model, *place.model[2:])
    line = refused(capsys, place, "precompute", *options, "--corpus", place.corpus)
    assert part in line and "smollm2" in line


def test_a_folder_that_is_no_model(place: Place, capsys: Capture) -> None:
    (place.at / "empty").mkdir()
    options = ("--model", place.at / "empty", *place.model[2:])
    line = refused(capsys, place, "precompute", *options, "--corpus", place.corpus)
    assert "has no config.json; name a folder that save_pretrained wrote" in line


def test_a_model_with_damaged_weights(place: Place, capsys: Capture) -> None:
    folder = place.at / "model"
    shutil.copytree(place.model[1], folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    options = ("--model", folder, *place.model[2:])
    line = refused(capsys, place, "precompute", *options, "--corpus", place.corpus)
    assert "cannot be read" in line and str(folder) in line


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--device", "abacus"], ["no device 'abacus'", "cpu"]),
        (["--device", "cuda:77"], ["'cuda:77' is not here", "cpu"]),
        (["--dtype", "int8"], ["no dtype 'int8'", "float32"]),
        (["--module", "model.layers.{}.none"], ["'model.layers.{}.none'"]),
        (["--module", "model.layers.mlp"], ["exactly one {}"]),
        (["--seed", "x"], ["--seed", "'x'", "--help"]),
        (["--seed", "-1"], ["--seed", "from 0 to 4294967295 but is '-1'"]),
        (["--seed", str(2**70)], ["--seed", "from 0 to 4294967295"]),
        (["--target-batch-tokens", "0"], ["--target-batch-tokens", "above 0 but is '0'"]),
        (["--max-length", "some"], ["--max-length", "above 0 but is 'some'"]),
        (["--max-length", "300"], ["context of 256 tokens but is 300"]),
        (["--multiplier", "ten"], ["--multiplier", "'ten'"]),
        (["--nonsense"], ["--nonsense"]),
    ],
)
def test_options(place: Place, capsys: Capture, options: list[str], parts: list[str]) -> None:
    line = refused(capsys, place, "precompute", *place.model, "--corpus", place.corpus, *options)
    assert all(part in line for part in parts), line
    assert untouched(place)


@pytest.mark.parametrize("words", [[], ["paint"], ["edit"]])
def test_no_verb_or_no_model(place: Place, capsys: Capture, words: list[str]) -> None:
    assert "--help" in refused(capsys, place, *words)


def test_a_cache_that_is_a_file(place: Place, capsys: Capture) -> None:
    cache = place.at / "cache"
    cache.write_text("in the way")
    line = refused(capsys, place, "precompute", *place.model, "--corpus", place.corpus)
    assert str(cache) in line
    assert cache.read_text() == "in the way"


@pytest.mark.parametrize("option", ["--out", "--json"])
@pytest.mark.parametrize(
    ("where", "part"), [("gone/out", "does not exist; make it, or name another"), (".", "is a folder; name a file")]
)
def test_output_files(place: Place, capsys: Capture, option: str, where: str, part: str) -> None:
    path = place.at / where
    command: list[Any] = (
        edit_args(place, place.requests)[:-1]
        if option == "--out"
        else ["evaluate", *place.model, "--facts", place.records, "--json"]
    )
    line = refused(capsys, place, *command, path)
    assert part in line and str(path if where == "." else path.parent) in line
    assert untouched(place)


@pytest.mark.parametrize("taken", ["file", "folder"])
def test_a_model_folder_that_is_taken(place: Place, capsys: Capture, taken: str) -> None:
    path = place.at / "out"
    if taken == "file":
        path.write_text("mine")
    else:
        path.mkdir()
        (path / "mine").write_text("mine")
    args = [*edit_args(place, place.requests), "--save-model", path]
    line = refused(capsys, place, *args)
    assert repr(str(path)) in line and "not an empty folder; name a new one" in line
    assert untouched(place)


@pytest.fixture
def saved(place: Place, capsys: Capture) -> Path:
    return place.edit(capsys, "edit.st")


def apply(place: Place, *edits: Path) -> list[Any]:
    return ["apply", *place.model, *(word for edit in edits for word in ("--edit", edit))]


def test_an_edit_that_is_not_there(place: Place, capsys: Capture) -> None:
    line = refused(capsys, place, *apply(place, place.at / "gone.st"))
    assert line == (f"There is no edit file {str(place.at / 'gone.st')!r}; give the path that --out wrote.")


def test_a_damaged_edit(place: Place, capsys: Capture, saved: Path) -> None:
    data = bytearray(saved.read_bytes())
    data[-1] ^= 1
    (place.at / "bad.st").write_bytes(data)
    (place.at / "text.st").write_text("no edit")
    for name in ("bad.st", "text.st"):
        line = refused(capsys, place, *apply(place, saved, place.at / name))
        assert repr(str(place.at / name)) in line and "get or make the edit again" in line


def test_an_edit_of_another_model(place: Place, capsys: Capture, saved: Path) -> None:
    made_for = Delta.load(saved).model
    assert made_for is not None
    line = refused(capsys, place, "apply", *place.other_model(), "--edit", saved)
    assert repr(str(saved)) in line and made_for[:16] in line and "--force" in line


def test_force_does_not_bend_shapes(place: Place, capsys: Capture) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    Delta({name: (torch.ones(5, 1), torch.ones(64, 1))}).save(place.at / "wide.st")
    line = refused(capsys, place, *apply(place, place.at / "wide.st"), "--force")
    assert f"changes {name} of shape (5, 64) but this model has it as (32, 64)" in line


@pytest.mark.parametrize("tokens", ["0", "-1", "x"])
def test_how_far_to_continue(place: Place, capsys: Capture, saved: Path, tokens: str) -> None:
    line = refused(capsys, place, *apply(place, saved), "--prompt", "I", f"--max-new-tokens={tokens}")
    assert f"--max-new-tokens: must be a whole number above 0 but is '{tokens}'" in line


def test_a_prompt_without_a_token(place: Place, capsys: Capture, saved: Path) -> None:
    assert "'' gives no token" in refused(capsys, place, *apply(place, saved), "--prompt", "")


def evaluation(place: Place, data: Any, *more: str) -> list[Any]:
    return ["evaluate", *place.model, *EDIT, "--facts", data, "--json", place.at / "out.json", *more]


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["--batch-size", "0"], "batch_size is 0"),
        (["--num-batches", "-2"], "n_batches is -2"),
        (["--batch-size", "3", "--num-batches", "2"], "The facts have 4 records with different subjects"),
    ],
)
def test_batches(place: Place, capsys: Capture, more: list[str], part: str) -> None:
    assert part in refused(capsys, place, *evaluation(place, place.records, *more))
    assert untouched(place)


def test_records(place: Place, capsys: Capture) -> None:
    path = place.at / "bad.json"
    found = json.loads(place.records.read_text())
    del found[1]["requested_rewrite"]["target_true"]
    path.write_text(json.dumps(found))
    line = refused(capsys, place, *evaluation(place, path))
    assert "record 1" in line and "requested_rewrite.target_true" in line and "is missing" in line
    line = refused(capsys, place, *evaluation(place, place.at / "gone.json"))
    assert "gone.json" in line and "does not exist" in line
    assert untouched(place)


def test_no_statistics_and_no_network(place: Place, capsys: Capture) -> None:
    args = edit_args(place, place.requests)
    at = args.index("--corpus")
    line = refused(capsys, place, *args[:at], *args[at + 4 :])
    assert "wikipedia" in line and "--corpus builtin" in line


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may do anything")
def test_a_folder_without_permission(place: Place, capsys: Capture) -> None:
    folder = place.at / "locked"
    folder.mkdir()
    folder.chmod(0o500)
    line = refused(capsys, place, *edit_args(place, place.requests)[:-1], folder / "edit.st")
    assert "cannot be written" in line
