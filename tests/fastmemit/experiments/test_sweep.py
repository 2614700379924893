"""A sweep: everything once, nothing lost, and the same lines however it was interrupted."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmemit.data import Record
from fastmemit.editor import Editor
from fastmemit.errors import BadData, FastmemitError, WrongModel
from fastmemit.evaluation import evaluate
from fastmemit.evaluation.perplexity import read_text
from fastmemit.experiments import sweep as sweep_module
from fastmemit.experiments.results import Cell, Inputs, ResultsFile
from fastmemit.experiments.sweep import Grid, forecast, run_sweep
from fastmemit.request import EditRequest
from fastmemit.text import encode
from tiny_editors import FACTS, optimised, record, texts, tiny_corpus, tiny_editor

SUBJECTS = ("Eiffel Tower", "Italy", "the poet", "the piano", "France")
SETTINGS = {"steps": 3, "layers": (1,)}
GRID = Grid(
    methods=("emmet", "memit"),
    batches={1: 2, 2: 2},
    multipliers=(0.5, 2.0, None),
    variants=(SETTINGS, {**SETTINGS, "relative_ridge": 1e-2}),
)


def records() -> list[Record]:
    facts = [EditRequest("{} is in", name, "Rome", "Paris") for name in SUBJECTS]
    return [record(number, fact) for number, fact in enumerate((*facts, *FACTS[1:2]), 10)]


def inputs(folder: Path, **more: Any) -> Inputs:
    return Inputs(tiny_corpus(40), folder, **{"data": {"name": "tiny"}, **more})


def lines(folder: Path) -> bytes:
    return (folder / "results.jsonl").read_bytes()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Cell], bytes]:
    at = tmp_path_factory.mktemp("unbroken")
    editor = tiny_editor(at / "cache", layers=None)
    before = {name: tensor.clone() for name, tensor in editor.model.state_dict().items()}
    cells = run_sweep(editor, GRID, records(), inputs(at / "out"))
    after = editor.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    return cells, lines(at / "out")


def test_every_cell_is_there_in_the_order_of_the_grid(unbroken: tuple[list[Cell], bytes]) -> None:
    cells, written = unbroken
    assert [cell["key"] for cell in cells] == [place.key for place in GRID.places()]
    assert [json.loads(line) for line in written.splitlines()] == cells
    for cell, place in zip(cells, GRID.places(), strict=True):
        assert cell.keys() == Cell.__annotations__.keys()
        assert len(cell["records"]) == place.batch_size * place.batches
        assert {row["batch"] for row in cell["records"]} == set(range(place.batches))
        for row in cell["records"]:
            assert {"es", "ps", "ns"} <= row["before"].keys() == row["after"].keys()
    # Records of one batch size are the same for every method and multiplier.
    sets = {(c["batch_size"], tuple(r["case_id"] for r in c["records"])) for c in cells}
    assert len(sets) == 2


def test_a_forecast_measures_stores_nothing_and_knows_what_is_finished(
    unbroken: tuple[list[Cell], bytes], tmp_path: Path
) -> None:
    editor = tiny_editor(tmp_path / "cache", layers=None)
    before = torch.random.get_rng_state()
    found = forecast(editor, GRID, records(), inputs(tmp_path / "out"))
    assert found is not None and torch.equal(torch.random.get_rng_state(), before)
    assert found.describe().startswith("24 cells, 72 records to edit and score: about ")
    assert min(vars(found.rates).values()) > 0 and found.width == 64
    there = sum(len(encode(editor.tokenizer, text)) for text in tiny_corpus(40).documents())
    assert found.full == pytest.approx(there)  # fewer than the full precompute asks for
    assert not list((tmp_path / "cache").rglob("*.safetensors")) and not (tmp_path / "out").exists()
    place = inputs(tmp_path / "done")
    place.folder.mkdir()
    kept = unbroken[1].splitlines(keepends=True)
    (place.folder / "results.jsonl").write_bytes(b"".join(kept[:20]))
    rest = forecast(editor, GRID, records(), place)
    assert rest is not None and [p.key for p in rest.places] == [p.key for p in GRID.places()[20:]]
    half = forecast(editor, GRID, records(), place, shard=(2, 2))
    assert half is not None and [p.key for p in half.places] == [p.key for p in GRID.places()[21::2]]
    (place.folder / "results.jsonl").write_bytes(unbroken[1])
    assert forecast(editor, GRID, records(), place) is None


@pytest.mark.parametrize("place", [3, 8, 21])
def test_a_cell_is_what_an_evaluation_of_its_own_gives(
    unbroken: tuple[list[Cell], bytes], tmp_path: Path, place: int
) -> None:
    cell = unbroken[0][place]
    editor = tiny_editor(tmp_path, layers=None)
    known = {record.case_id: record for record in records()}
    dealt = [
        [known[row["case_id"]] for row in cell["records"] if row["batch"] == number]
        for number in range(cell["batches"])
    ]
    if cell["multiplier"] is None:
        editor.precompute(tiny_corpus(40), multiplier=500, layers=(1,), allow_fewer=True)
    else:
        editor.precompute(tiny_corpus(40), multiplier=cell["multiplier"], layers=(1,))
    wanted = evaluate(editor, dealt, cell["method"], {"relative_ridge": 0.0, **cell["settings"]})
    for name, score in cell["scores"].items():
        assert score == pytest.approx(wanted["after"][name])
    for name, score in cell["before"].items():
        assert score == pytest.approx(wanted["before"][name])
    assert cell["keys"] == editor.store.covering((1,)).keys


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_a_random_moment_it_goes_on_to_the_same_lines(
    unbroken: tuple[list[Cell], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    draw = random.Random(seed)
    left = [draw.randrange(1, 120)]
    out = tmp_path / "out"

    def killed(real):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(sweep_module, "score_records", killed(sweep_module.score_records))
    monkeypatch.setattr(Editor, "edit", killed(Editor.edit))
    monkeypatch.setattr(ResultsFile, "append", killed(ResultsFile.append))
    for _ in range(20):
        editor = tiny_editor(tmp_path / "cache", layers=None)
        try:
            run_sweep(editor, GRID, records(), inputs(out))
            break
        except KeyboardInterrupt:
            assert editor.edits == ()
            left = [draw.randrange(20, 120)]
            if draw.random() < 0.5 and (out / "results.jsonl").is_file():
                with open(out / "results.jsonl", "ab") as file:  # as a lost machine leaves it
                    file.write(b'{"key":"emmet/b1')
    else:
        raise AssertionError("never finished")
    assert lines(out) == unbroken[1]


def test_two_shards_put_together_are_the_whole(unbroken: tuple[list[Cell], bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for number in (2, 1):  # each with a cache of its own, as on two machines
        editor = tiny_editor(tmp_path / f"cache{number}", layers=None)
        run_sweep(editor, GRID, records(), inputs(out), shard=(number, 2))
        assert (out / f"results-{number}of2.jsonl").is_file()
    assert not (out / "results.jsonl").exists()
    editor = tiny_editor(tmp_path / "cache", layers=None)
    assert run_sweep(editor, GRID, records(), inputs(out)) == unbroken[0]
    assert lines(out) == unbroken[1]
    assert not list(out.glob("*of2.jsonl"))


def test_nothing_is_paid_for_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = tiny_editor(tmp_path / "cache", layers=None)
    made = optimised(monkeypatch)
    unedited: list[int] = []
    scored = sweep_module.score_records

    def counted(adapter: Any, tokenizer: Any, found: Any, **more: Any) -> Any:
        if not editor.edits:
            unedited.append(len(found))
        return scored(adapter, tokenizer, found, **more)

    monkeypatch.setattr(sweep_module, "score_records", counted)
    grid = dataclasses.replace(GRID, multipliers=(0.5, 2.0))
    run_sweep(editor, grid, records(), inputs(tmp_path / "out"))
    # Batches of 1 and of 2 share records, and both methods the layer.
    assert made == unedited == [4]
    run_sweep(editor, GRID, records(), inputs(tmp_path / "out"))  # a larger grid goes on
    assert made == unedited == [4]


def test_vectors_are_made_for_the_records_that_a_method_edits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = tiny_editor(tmp_path / "cache", layers=None)
    asked: list[tuple[str, int]] = []
    real = editor.targets

    def counted(requests, config, **settings):
        if settings.get("together"):
            asked.append((config.method, len(requests)))
        return real(requests, config, **settings)

    monkeypatch.setattr(editor, "targets", counted)
    grid = Grid(("emmet", "rome"), {1: 1, 2: 2}, (2.0,), (SETTINGS,))
    run_sweep(editor, grid, records(), inputs(tmp_path / "out"))
    assert asked == [("emmet", 4), ("rome", 1)]


def test_damaged_unedited_scores_are_refused_by_their_file(tmp_path: Path) -> None:
    editor = tiny_editor(tmp_path / "cache", layers=None)
    grid = dataclasses.replace(GRID, multipliers=(2.0,), variants=(SETTINGS,), batches={1: 1})
    (tmp_path / "out").mkdir()
    (tmp_path / "out/unedited.json").write_text('{"fingerprint": ')
    with pytest.raises(BadData, match=r"unedited.json' is not what was written .*; delete it"):
        run_sweep(editor, grid, records(), inputs(tmp_path / "out"))


def test_it_says_how_long_each_cell_took_and_where(tmp_path: Path) -> None:
    editor = tiny_editor(tmp_path / "cache", layers=None)
    grid = dataclasses.replace(GRID, multipliers=(2.0,), variants=(SETTINGS,))
    path = tmp_path / "text.txt"
    path.write_text(" ".join(texts(20)))
    text = read_text(path, editor.tokenizer, tokens=200, context=32)
    cells = run_sweep(editor, grid, records(), inputs(tmp_path / "out", text=text))
    timings = [json.loads(x) for x in (tmp_path / "out/timings.jsonl").read_text().splitlines()]
    assert [timing["key"] for timing in timings] == [cell["key"] for cell in cells]
    for timing in timings:
        assert timing.keys() == {"key", "seconds", "hardware", "versions", "finished"}
        assert timing["seconds"].keys() == {"factor", "edit", "evaluate", "undo", "perplexity"}
    for cell in cells:
        found = cell["perplexity"]
        assert found is not None and found["batches"] == 1
        assert 1 < found["before"] != found["after"] > 1
        assert set(cell["jitter"]) == {"1"}


def test_a_cell_with_ledoit_wolf_gets_the_fourth_powers_that_it_needs(tmp_path: Path) -> None:
    editor = tiny_editor(tmp_path / "cache", layers=None)
    wanted = ({**SETTINGS, "shrinkage": "ledoit-wolf"},)
    grid = Grid(methods=("emmet",), batches={1: 1}, multipliers=(0.5, 2.0), variants=wanted)
    assert len(run_sweep(editor, grid, records(), inputs(tmp_path / "out"))) == 2
    assert editor.statistics is not None and editor.statistics.provenance["quartic"] is True


def test_another_sweep_in_the_folder_is_refused(tmp_path: Path) -> None:
    editor = tiny_editor(tmp_path / "cache", layers=None)
    grid = dataclasses.replace(GRID, multipliers=(2.0,), methods=("emmet",), batches={2: 1})
    given = inputs(tmp_path / "out")
    run_sweep(editor, grid, records(), given)
    other = dataclasses.replace(given, data={"name": "other"})
    with pytest.raises(BadData, match="holds a sweep with another data"):
        run_sweep(editor, grid, records(), other)
    path = tmp_path / "out/sweep.json"
    written = path.read_text()
    moved = json.loads(written)
    moved["methods"]["emmet"]["clamp"] = 9.0
    path.write_text(json.dumps(moved))
    with pytest.raises(BadData, match="other settings of emmet"):
        run_sweep(editor, grid, records(), given)
    path.write_text(written)
    # A header from before there was a setting is that of its default, and one from when all methods
    # had all settings is that of the method's own.
    header = json.loads(path.read_text())
    del header["methods"]["emmet"]["stop"]
    header["methods"]["emmet"] |= {"spread": "linear", "keys": "consistent", "l2": 10.0}
    path.write_text(json.dumps(header))
    run_sweep(editor, grid, records(), given)
    path.write_text("{")
    with pytest.raises(BadData, match="not the header of a sweep"):
        run_sweep(editor, grid, records(), given)


def test_a_model_that_answers_nothing_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = tiny_editor(tmp_path / "cache", layers=None)
    grid = dataclasses.replace(GRID, multipliers=(2.0,), variants=(SETTINGS,), batches={2: 1})

    real = sweep_module.score_records

    def broken(*args: Any, **more: Any) -> Any:
        if editor.edits:
            raise BadData("NaN.")
        return real(*args, **more)

    monkeypatch.setattr(sweep_module, "score_records", broken)
    cell = run_sweep(editor, grid, records(), inputs(tmp_path / "out"))[0]
    assert cell["scores"] == dict.fromkeys(("es", "ps", "ns", "s", "ea", "pa", "na"), 0.0)
    assert cell["before"]["ns"] is not None and cell["before"]["na"] is not None


def test_a_model_without_a_finite_perplexity_does_not_end_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastmemit.evaluation import perplexity as module

    editor = tiny_editor(tmp_path / "cache", layers=None)
    grid = dataclasses.replace(GRID, multipliers=(2.0,), variants=(SETTINGS,), batches={2: 1})
    path = tmp_path / "text.txt"
    path.write_text("the poet was in the city of Rome " * 20)
    real = module.perplexity

    def broken(*args: Any, **more: Any) -> Any:
        if editor.edits:
            raise FastmemitError("The model's logits are not finite.")
        return real(*args, **more)

    monkeypatch.setattr(module, "perplexity", broken)
    text = read_text(path, editor.tokenizer, tokens=40)
    for cell in run_sweep(editor, grid, records(), inputs(tmp_path / "out", text=text)):
        assert cell["perplexity"] is not None
        assert cell["perplexity"]["after"] == math.inf > cell["perplexity"]["before"]


def test_an_edited_model_is_refused(tmp_path: Path) -> None:
    editor = tiny_editor(tmp_path / "cache", layers=(0, 1))
    edit = editor.edit(FACTS[:1], "memit", layers=(0, 1), steps=2)
    with pytest.raises(WrongModel, match="undo its edits"):
        run_sweep(editor, GRID, records(), inputs(tmp_path / "out"))
    edit.undo()


def test_too_few_records_are_refused_before_any_work(tmp_path: Path) -> None:
    editor = tiny_editor(tmp_path / "cache", layers=None)
    grid = dataclasses.replace(GRID, batches={64: 5})
    with pytest.raises(BadData, match="too few"):
        run_sweep(editor, grid, records(), inputs(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
