"""``fastmemit experiment downstream`` on a tiny model folder."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fastmemit.editor import Editor
from fastmemit.evaluation.perplexity import perplexity, read_text
from tiny_commands import Place, refused, run
from tiny_editors import texts
from tiny_tasks import task_folder


@pytest.fixture
def text(place: Place) -> Path:
    path = place.at / "text.txt"
    path.write_text("\n".join(texts(20)))
    return path


def test_before_and_after_an_edit(place: Place, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    edit, out_file = place.edit(capsys, "edit.st"), place.at / "out.json"
    out = run(capsys, "experiment", "downstream", *place.model, "--edit", edit, "--text", text, "--text-tokens", "200",
              "--context", "64", "--stride", "32", "--tasks", "tiny_facts", "--limit", "4",
              "--include-path", task_folder(place.at), "--json", out_file)  # fmt: skip
    found = json.loads(out_file.read_text())
    editor = Editor.from_pretrained(place.model[1], cache_dir=place.at / "cache")
    cut = read_text(text, editor.tokenizer, tokens=200, context=64, stride=32)
    assert found["before"]["perplexity"] == perplexity(editor.adapter, cut).perplexity
    editor.load(edit).apply()
    assert found["after"]["perplexity"] == perplexity(editor.adapter, cut).perplexity
    assert found["text"]["tokens"] == 199 and found["text"]["stride"] == 32
    assert found["edits"][0]["facts"] == 2 and found["edits"][0]["method"] == "memit"
    assert "1 edit with 2 facts\ntext.txt: 199 tokens predicted in " in out
    shown = re.search(r"^perplexity +([\d.]+) +([\d.]+)$", out, re.MULTILINE)
    assert shown is not None
    assert [float(value) for value in shown.groups()] == pytest.approx(
        [found["before"]["perplexity"], found["after"]["perplexity"]], abs=1e-4
    )
    assert re.search(r"^tiny_facts acc +0\.\d{4}( ± [\d.]+)? +[01]\.\d{4}", out, re.MULTILINE)


def test_a_model_alone(place: Place, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "experiment", "downstream", *place.model, "--text", text)
    assert "0 edits with 0 facts" in out and "after" not in out and "perplexity" in out


def test_what_is_refused(place: Place, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = ("experiment", "downstream", *place.model)
    assert "nothing to score" in refused(capsys, place, *start)
    missing = place.at / "no.txt"
    assert "no.txt does not exist" in refused(capsys, place, *start, "--text", missing)
    assert "give a longer text or ask for fewer" in refused(
        capsys, place, *start, "--text", text, "--text-tokens", "1000000"
    )
    assert "but the model takes 256 at once" in refused(capsys, place, *start, "--text", text, "--context", "300")
    assert "a window has room for 256" in refused(capsys, place, *start, "--text", text, "--stride", "300")
    assert "no folder" in refused(capsys, place, *start, "--tasks", "x", "--include-path", place.at / "nowhere")
    text.write_bytes(b"\xff")
    assert "is not UTF-8" in refused(capsys, place, *start, "--text", text)


def test_data_out_of_reach_is_said_before_the_model_is_loaded(
    place: Place, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    folder = task_folder(place.at)
    file = folder / "tiny_facts.yaml"
    file.write_text(file.read_text().replace("dataset_path: json", "dataset_path: nobody/nothing"))
    said = refused(capsys, place, "experiment", "downstream", "--model", place.at / "no-model", "--text", text,
                   "--tasks", "tiny_facts", "--include-path", folder)  # fmt: skip
    assert "data set nobody/nothing" in said
