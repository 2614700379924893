"""Text that the model writes: the same for one seed, however much of it is read."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest

from fastmemit.data import corpora as module
from fastmemit.data.corpora import OPENINGS, self_written
from tiny_models import tiny_model, tiny_tokenizer

PRINT = "a" * 64


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short documents: a hundred steps for each would show nothing more."""
    monkeypatch.setattr(module, "WRITTEN_TOKENS", 6)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


def first(model: Any, n: int, seed: int = 0) -> list[str]:
    return list(islice(self_written(model, tiny_tokenizer(), PRINT).documents(seed), n))


def test_it_is_the_same_for_one_seed_and_another_for_another(model: Any) -> None:
    one = first(model, 30)
    assert first(model, 30) == one
    other = first(model, 30, seed=1)
    assert sum(a == b for a, b in zip(one, other, strict=True)) == 0


def test_reading_on_does_not_depend_on_how_much_was_read(model: Any) -> None:
    long = first(model, 60)
    assert first(model, 7) == long[:7]
    # Two readers side by side, and somebody else's text between.
    corpus = self_written(model, tiny_tokenizer(), PRINT)
    left, right = corpus.documents(0), corpus.documents(0)
    mixed: list[str] = []
    for _ in range(30):
        mixed.append(next(left))
        assert next(right) == mixed[-1]
    first(model, 25, seed=5)
    assert mixed + list(islice(left, 30)) == long


def test_each_document_continues_an_opening(model: Any) -> None:
    documents = first(model, 2 * len(OPENINGS))
    for number, text in enumerate(documents):
        opening = OPENINGS[number % len(OPENINGS)]
        assert text.startswith(opening) and len(text) > len(opening)
    # The second round continues the same openings otherwise.
    once, again = documents[: len(OPENINGS)], documents[len(OPENINGS) :]
    assert sum(a == b for a, b in zip(once, again, strict=True)) == 0


def test_nothing_is_written_before_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def fake(model: Any, tokenizer: Any, texts: list[str], n: int, **settings: Any) -> list[str]:
        calls.append(settings["seed"])
        assert n == 6 and settings["top_k"] == 200
        return ["!"] * len(texts)

    monkeypatch.setattr(module, "continue_texts", fake)
    corpus = self_written(None, None, PRINT)
    documents: Iterator[str] = corpus.documents(2)
    assert calls == []
    assert list(islice(documents, 24)) == [opening + "!" for opening in OPENINGS[:24]]
    assert len(calls) == 1
    next(documents)
    assert len(set(calls)) == 2


def test_its_fingerprint_is_the_model_and_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    def fingerprint(of: str = PRINT) -> str:
        return self_written(None, None, of).fingerprint

    prints = {fingerprint(), fingerprint("b" * 64)}
    for name, value in (("WRITTEN_TOKENS", 7), ("WRITTEN_TOGETHER", 12), ("TOP_K", 5), ("OPENINGS", ("Once",))):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            prints.add(fingerprint())
    assert len(prints) == 6
    assert fingerprint() == fingerprint()
    corpus = self_written(None, None, PRINT)
    assert corpus.name == "self" and corpus.n_documents is None and corpus
