"""Sequences in a folder: whole runs are kept, and the file is the same however it was made."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fastmemit.editor import Editor
from fastmemit.errors import BadData, DamagedFile, WrongModel
from fastmemit.evaluation.perplexity import read_text
from fastmemit.experiments import sequential
from fastmemit.experiments.results import Inputs, ResultsFile, Step, check_step
from fastmemit.experiments.sequential import Plan, run_sequences
from fastmemit.request import EditRequest
from tiny_editors import FACTS, record, texts, tiny_corpus, tiny_editor

SUBJECTS = ("Eiffel Tower", "Italy", "the poet", "the piano")
RECORDS = [record(10 + n, EditRequest("{} is in", name, "Rome", "Paris")) for n, name in enumerate(SUBJECTS)]
PLAN = Plan(
    [RECORDS[:2], RECORDS[2:3], RECORDS[3:]], "memit", {"layers": (0, 1), "steps": 2}, (2.0, None), score_every=2
)
KEYS = [
    f"memit/b2x3/{multiplier}/{kind}/{edits}"
    for multiplier in ("x2", "full")
    for kind in ("preserved", "plain")
    for edits in (2, 3)
]


def inputs(folder: Path, **more: Any) -> Inputs:
    return Inputs(tiny_corpus(40), folder, {"name": "tiny"}, **more)


def content(folder: Path) -> bytes:
    return (folder / "sequential.jsonl").read_bytes()


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory) -> Editor:
    return tiny_editor(tmp_path_factory.mktemp("cache"), layers=None)


@pytest.fixture(scope="module")
def unbroken(editor: Editor, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("unbroken") / "out"
    return folder, run_sequences(editor, PLAN, inputs(folder))


def test_a_line_for_each_step_in_the_order_of_the_plan(unbroken: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, found = unbroken
    assert [line["key"] for line in found] == KEYS
    assert [json.loads(line) for line in content(folder).splitlines()] == found
    place = {"key", "method", "batch_size", "multiplier", "preserve", "keys", "targets"}
    assert all(line.keys() == place | Step.__annotations__.keys() for line in found)
    assert [line["multiplier"] for line in found] == [2.0] * 4 + [None] * 4
    assert found[0]["keys"] == 128 < found[-1]["keys"]
    assert [line["preserved"] for line in found[:4]] == [3, 4, 0, 0]
    timings = (folder / "sequential-timings.jsonl").read_text().splitlines()
    assert len(timings) == 4 and all(json.loads(line)["seconds"] > 0 for line in timings)
    assert sum(len(batch) for batch in PLAN.batches) * 4 + (3 + 4) * 4 == 4 * PLAN.scored()


@pytest.mark.parametrize("killed_at", [0, 1, 3, 6])
def test_killed_and_continued_it_leaves_the_same_file(
    unbroken: tuple[Path, list[dict[str, Any]]], tmp_path: Path, killed_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of writing a line, by another process's editor with its own cache."""
    cache, folder = tmp_path / "cache", tmp_path / "out"
    real, written = ResultsFile.append, []

    def dies(self: ResultsFile, value: Any) -> None:
        if self.path.name == "sequential.jsonl":
            if len(written) == killed_at:
                with open(self.path, "ab") as file:
                    file.write(b'{"key":"memit/b2x3/x2/pre')
                raise KeyboardInterrupt
            written.append(value)
        real(self, value)

    monkeypatch.setattr(ResultsFile, "append", dies)
    first = tiny_editor(cache, layers=None)
    with pytest.raises(KeyboardInterrupt):
        run_sequences(first, PLAN, inputs(folder))
    assert first.edits == ()
    monkeypatch.setattr(ResultsFile, "append", real)
    again: list[bool] = []
    run_sequential = sequential.run_sequential

    def counted(*args: Any, **kwargs: Any) -> Any:
        again.append(args[2])
        return run_sequential(*args, **kwargs)

    monkeypatch.setattr(sequential, "run_sequential", counted)
    found = run_sequences(tiny_editor(cache, layers=None), PLAN, inputs(folder))
    assert content(folder) == content(unbroken[0]) and found == unbroken[1]
    assert len(again) == 4 - killed_at // 2  # two steps a run
    assert run_sequences(tiny_editor(cache, layers=None), PLAN, inputs(folder)) == found
    assert len(again) == 4 - killed_at // 2


def test_a_plan_may_grow_and_shrink(
    editor: Editor, unbroken: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    small = dataclasses.replace(PLAN, multipliers=(None,), earlier_keys=(False,))
    found = run_sequences(editor, small, inputs(tmp_path))
    # Statistics of fewer stops on the way: another order of the sum, so that last bits may differ.
    assert [line["key"] for line in found] == KEYS[6:]
    run_sequences(editor, PLAN, inputs(tmp_path))
    lines = [json.loads(line)["key"] for line in content(tmp_path).splitlines()]
    assert lines == KEYS
    assert run_sequences(editor, small, inputs(tmp_path)) == found
    assert sorted(json.loads(line)["key"] for line in content(tmp_path).splitlines()) == sorted(KEYS)


def test_perplexity_is_measured_where_there_is_a_text(editor: Editor, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(texts(20)))
    plan = dataclasses.replace(PLAN, multipliers=(2.0,), earlier_keys=(True,), score_every=3)
    text = read_text(path, editor.tokenizer, tokens=60, context=30)
    (line,) = run_sequences(editor, plan, inputs(tmp_path / "out", text=text))
    assert line["perplexity"] > 1
    header = json.loads((tmp_path / "out" / "sequential.json").read_text())
    assert header["perplexity"] == {"name": "text.txt", "sha256": text.sha256, "tokens": 60}
    assert str(tmp_path) not in json.dumps(header)


def test_another_sequence_in_the_folder_is_refused(
    editor: Editor, unbroken: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder = unbroken[0]
    before = content(folder)
    others = {
        "other settings of memit": dataclasses.replace(PLAN, settings={"layers": (0, 1), "steps": 3}),
        "another batches": dataclasses.replace(PLAN, batches=[RECORDS[:2], RECORDS[2:]]),
        "another score_every": dataclasses.replace(PLAN, score_every=1),
    }
    for name, plan in others.items():
        with pytest.raises(BadData, match=f"sequences with {name}; name another folder"):
            run_sequences(editor, plan, inputs(folder))
    assert content(folder) == before
    # A header from before there was a setting is that of its default, and one from when all methods
    # had all settings is that of the method's own.
    path = folder / "sequential.json"
    header = json.loads(path.read_text())
    for name in ("spread", "stop"):
        del header["methods"]["memit"][name]
    header["methods"]["memit"] |= {"lambda_e": 0.0, "keys": "consistent", "l2": 10.0}
    path.write_text(json.dumps(header))
    run_sequences(editor, PLAN, inputs(folder))
    assert content(folder) == before
    (tmp_path / "sequential.json").write_text("[1]")
    with pytest.raises(BadData, match="is not the header of sequences"):
        run_sequences(editor, PLAN, inputs(tmp_path))


def test_an_edited_model_is_refused(editor: Editor, tmp_path: Path) -> None:
    editor.precompute(tiny_corpus(40), multiplier=2, layers=[1])
    edit = editor.edit(FACTS[:1], "rome", layers=(1,), steps=1)
    with pytest.raises(WrongModel, match="undo its edits before a sequence"):
        run_sequences(editor, PLAN, inputs(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    edit.undo()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("edits", "2"),
        ("failed", None),
        ("preserve", 1),
        ("multiplier", "x2"),
        ("scores", {"es": 90.0}),
        ("before", []),
        ("by_batch", []),
        ("by_batch", [{"es": 1.0, "ps": 1.0, "ns": 1.0, "s": "1"}]),
        ("perplexity", 10**400),
        ("perplexity", 0.5),
        ("perplexity", -1.0),
        ("edits", -1),
        ("facts", 10**400),
        ("multiplier", 0),
        ("multiplier", -2.0),
        ("before", {"es": 101.0, "ps": 1.0, "ns": 1.0, "s": 1.0}),
        ("scores", {"es": -0.5, "ps": 1.0, "ns": 1.0, "s": 1.0}),
        ("facts", ...),  # not there
    ],
)
def test_a_line_that_no_run_writes_is_refused(
    unbroken: tuple[Path, list[dict[str, Any]]], name: str, value: Any
) -> None:
    good = unbroken[1][0]
    check_step("A line", good)
    bad = {k: v for k, v in good.items() if k != name} | ({} if value is ... else {name: value})
    with pytest.raises(DamagedFile, match=rf"^A line .*{name}.*; delete the lines of its run"):
        check_step("A line", bad)


def test_a_damaged_line_ends_a_run_before_any_work(
    editor: Editor, unbroken: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(unbroken[0], folder)
    spoilt = content(folder).replace(b'"failed":0', b'"failed":"0"', 1)
    (folder / "sequential.jsonl").write_bytes(spoilt)
    with pytest.raises(DamagedFile, match=r"memit/b2x3/x2.*has failed = '0'"):
        run_sequences(editor, PLAN, inputs(folder))
    assert content(folder) == spoilt
