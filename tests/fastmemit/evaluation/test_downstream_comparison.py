"""Before and after edits: what is measured is the model of that moment, and it is given back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastmemit.editor import Editor
from fastmemit.errors import BadConfig, WrongModel
from fastmemit.evaluation.downstream import compare, find_tasks
from fastmemit.evaluation.perplexity import PerplexityText, perplexity, read_text
from fastmemit.models import fingerprint
from tiny_editors import FACTS, QUICK, texts, tiny_editor
from tiny_tasks import task_folder


@pytest.fixture
def editor(tmp_path: Path) -> Editor:
    return tiny_editor(tmp_path / "cache")


@pytest.fixture
def text(tmp_path: Path, editor: Editor) -> PerplexityText:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(texts(12)))
    return read_text(path, editor.tokenizer, tokens=200, context=64)


def edits(editor: Editor) -> list[Any]:
    """Two edits of the same layers, the second on top of the first; none is applied now."""
    first = editor.edit(FACTS[:1], "memit", **QUICK)
    second = editor.edit(FACTS[1:2], "memit", **QUICK)
    second.undo()
    first.undo()
    return [first, second]


def test_it_scores_without_and_with_the_edits(editor: Editor, text: PerplexityText) -> None:
    unedited = fingerprint(editor.model)
    made = edits(editor)
    found = compare(editor, made, text=text)
    assert fingerprint(editor.model) == unedited and editor.edits == ()
    assert found["before"]["perplexity"] == perplexity(editor.adapter, text).perplexity
    for edit in made:
        edit.apply()
    want = perplexity(editor.adapter, text)
    for edit in reversed(made):
        edit.undo()
    assert found["after"] is not None
    assert found["after"]["perplexity"] == want.perplexity != found["before"]["perplexity"]
    assert found["after"]["nll"] == want.nll
    assert found["text"] == {
        "name": "text.txt",
        "sha256": text.sha256,
        "tokens": want.tokens,
        "windows": 4,
        "context": 64,
        "stride": None,
    }
    assert [edit["facts"] for edit in found["edits"]] == [1, 1]
    assert found["edits"][0]["digest"] == made[0].delta.digest()


def test_tasks_and_text(editor: Editor, text: PerplexityText, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    tasks = find_tasks(["tiny_facts"], include_path=task_folder(tmp_path))
    found = compare(editor, text=text, tasks=tasks, limit=3)
    assert found["after"] is None and found["before"]["tasks"] is not None
    assert found["before"]["tasks"]["samples"] == {"tiny_facts": 3}
    assert found["before"]["seconds"].keys() == {"perplexity", "tasks"}


def test_an_error_gives_the_weights_back(editor: Editor, text: PerplexityText, monkeypatch: pytest.MonkeyPatch) -> None:
    unedited = fingerprint(editor.model)
    made = edits(editor)

    def break_when_edited(*args: Any, **kwargs: Any) -> Any:
        if editor.edits:
            raise KeyboardInterrupt
        return perplexity(*args, **kwargs)

    monkeypatch.setattr("fastmemit.evaluation.downstream.perplexity", break_when_edited)
    with pytest.raises(KeyboardInterrupt):
        compare(editor, made, text=text)
    assert fingerprint(editor.model) == unedited and editor.edits == ()


def test_nothing_to_score_and_an_edited_model(editor: Editor, text: PerplexityText) -> None:
    with pytest.raises(BadConfig, match="neither a text nor a task"):
        compare(editor)
    with edits(editor)[0], pytest.raises(WrongModel, match="edited already"):
        compare(editor, text=text)


def test_a_context_beyond_the_model_is_refused_before_it_runs(editor: Editor, text: PerplexityText) -> None:
    editor.model.register_forward_pre_hook(lambda *_: 1 / 0)
    long = PerplexityText(text.name, text.sha256, text.ids, context=300)
    with pytest.raises(BadConfig, match="context is 300 tokens but the model takes 256"):
        compare(editor, text=long)
