"""Editors of tiny random models with statistics, and facts and text in words that they know."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from fastmemit import targets
from fastmemit.data import Corpus, Record, corpus_from_texts
from fastmemit.editor import Editor
from fastmemit.request import EditRequest
from tiny_models import tiny_model, tiny_tokenizer
from tiny_tokenizers import SENTENCES

FACTS = (
    EditRequest("{} is located in the city of", "Eiffel Tower", "Rome", "Paris"),
    EditRequest("The capital of {} is", "France", "Berlin", "Paris"),
    EditRequest("The mother tongue of {} is", "the poet", "English", "French"),
)
#: Few steps: whether an edit is good does not matter to those who undo it.
QUICK: dict[str, Any] = {"layers": (0, 1), "steps": 3}


def optimised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of how many facts target vectors are optimised from now on, call by call."""
    made: list[int] = []
    real = targets.optimise

    def spy(adapter: Any, tokenizer: Any, requests: Any, *args: Any, **kwargs: Any) -> Any:
        made.append(len(requests))
        return real(adapter, tokenizer, requests, *args, **kwargs)

    monkeypatch.setattr(targets, "optimise", spy)
    return made


def texts(n: int, seed: int = 0) -> list[str]:
    """n documents of different lengths and contents, 20 tokens or more each."""
    draw = random.Random(seed)
    words = " ".join(SENTENCES).split()
    return [" ".join(draw.choices(words, k=draw.randrange(15, 40))) for _ in range(n)]


def tiny_corpus(n: int = 60, seed: int = 0) -> Corpus:
    """A corpus of `texts`: more than 10 keys per dimension of a tiny model."""
    return corpus_from_texts(f"tiny{seed}", texts(n, seed))


def tiny_editor(
    folder: Path,
    architecture: str = "llama",
    *,
    model: Any = None,
    tokenizer: str = "byte_bpe",
    layers: tuple[int, ...] | None = (0, 1),
    **settings: Any,
) -> Editor:
    """An editor that keeps its files in `folder`, with statistics of `layers` if there are any."""
    model = tiny_model(architecture) if model is None else model
    editor = Editor(model, tiny_tokenizer(tokenizer), cache_dir=folder, **settings)
    if layers:
        editor.precompute(tiny_corpus(), multiplier=4, layers=layers)
    return editor


def record(case_id: int, fact: EditRequest) -> Record:
    """A CounterFact record about a fact, with two paraphrases and three neighbours."""
    return Record(
        case_id,
        fact,
        paraphrases=(f"They say that {fact.text}", f"I play the violin. {fact.text}"),
        neighbourhood=("The piano is in", "The company is located in", fact.before + "Italy is"),
    )
