"""Contexts: how many, how long, from the unedited model and the seed, and before every prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastmemit import text as contexts_module
from fastmemit.errors import WrongModel
from fastmemit.text import OPENINGS, Contexts
from tiny_editors import FACTS, tiny_editor
from tiny_models import tiny_model, tiny_tokenizer


def generate_contexts(model: Any, tokenizer: Any, kind: str, seed: int) -> tuple[str, ...]:
    return Contexts(model, tokenizer, seed).of("rome" if kind == "start" else "memit")


def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[list[int]], int, dict[str, Any]]]:
    """What is asked of the sampler, which keeps working."""
    calls: list[tuple[list[list[int]], int, dict[str, Any]]] = []
    real = contexts_module.continue_rows

    def spy(model: Any, tokenizer: Any, rows: Any, n: int, **settings: Any) -> list[list[int]]:
        calls.append(([list(row) for row in rows], n, settings))
        return real(model, tokenizer, rows, n, **settings)

    monkeypatch.setattr(contexts_module, "continue_rows", spy)
    return calls


@pytest.mark.parametrize("kind", ["byte_bpe", "bpe_bos", "adds_eos"])
def test_five_texts_that_begin_with_words(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    calls = written(monkeypatch)
    tokenizer = tiny_tokenizer(kind)
    found = generate_contexts(tiny_model("llama"), tokenizer, "words", seed=1)
    assert len(found) == 6 and found[0] == ""
    for word, text in zip(OPENINGS, found[1:], strict=True):
        assert text.startswith(word) and text.endswith(". ") and text == text.strip() + " "
        assert "\n" not in text and "  " not in text and "<" not in text.replace("<0x", "")
    ((rows, n, settings),) = calls
    assert n == 10 and settings == {"top_k": 5, "seed": 1}
    bos = [] if kind == "byte_bpe" else [1]
    words = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in OPENINGS]
    assert rows == [bos + word for word in words]  # and no EOS behind


def test_twenty_texts_from_the_start_token(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = written(monkeypatch)
    found = generate_contexts(tiny_model("llama"), tiny_tokenizer(), "start", seed=0)
    assert len(found) == 21 and found[0] == ""
    assert all(text.endswith(". ") for text in found[1:])
    assert [(len(rows), n) for rows, n, _ in calls] == [(10, 5), (10, 10)]
    assert all(row == [1] for rows, _, _ in calls for row in rows)  # BOS
    assert len(set(found)) > 15  # ten draws, not one ten times


def test_a_tokenizer_without_bos_starts_from_eos() -> None:
    class Bare:
        bos_token_id, eos_token_id, pad_token_id = None, 2, 0

    assert contexts_module._start_token(Bare()) == 2
    tokenizer = tiny_tokenizer()
    first = tokenizer("The")["input_ids"][0]

    class Nothing:
        bos_token_id = eos_token_id = pad_token_id = None
        is_fast = True
        __call__ = staticmethod(tokenizer.__call__)

    assert contexts_module._start_token(Nothing()) == first


@pytest.mark.parametrize("kind", ["words", "start"])
def test_they_depend_on_the_seed_alone(kind: Any) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    first = generate_contexts(model, tokenizer, kind, seed=3)
    assert generate_contexts(model, tokenizer, kind, seed=3) == first
    assert generate_contexts(model, tokenizer, kind, seed=4) != first


def test_an_editor_writes_them_once_on_the_unedited_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = tiny_editor(tmp_path)
    unedited = generate_contexts(editor.model, editor.tokenizer, "words", seed=0)
    edit = editor.edit(FACTS[:1], "memit", layers=(0, 1), steps=2)
    assert edit.delta.provenance["contexts"] == list(unedited)
    assert editor.contexts("memit") == editor.contexts("emmet") == unedited
    with pytest.raises(WrongModel, match=r"undo the edits, or call editor.contexts\('rome'\)"):
        editor.contexts("rome")
    edit.undo()
    rome = editor.contexts("rome")
    assert len(rome) == 21
    with edit:
        assert editor.contexts("rome") is rome
