"""Free text: what is continued, how often, and what is measured on it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from fastmemit.data import Record
from fastmemit.errors import BadConfig, BadData
from fastmemit.evaluation import generate_records
from fastmemit.evaluation import generation as module
from fastmemit.evaluation.generation import n_gram_entropy
from fastmemit.text import continue_texts
from tiny_editors import FACTS
from tiny_models import tiny_model, tiny_tokenizer

RECORDS = [
    Record(1, FACTS[0], generations=("The piano is in", "I play", "I play")),
    Record(2, FACTS[1], generations=("I play",)),
]


class Likeness:
    """References that count words."""

    def check(self, records: Any) -> None:
        pass

    def score(self, record: Record, texts: list[str]) -> float:
        return len(" ".join(texts)) / (1000 + record.case_id)


def written(**settings: Any) -> list[Any]:
    return generate_records(tiny_model("llama"), tiny_tokenizer(), RECORDS, **settings)


def test_greedy_texts_are_the_models_own() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    done: list[int] = []
    found = generate_records(model, tokenizer, RECORDS, new_tokens=7, top_k=None, batch_rows=1, progress=done.append)
    assert sum(done) == 4 and len(done) == 2  # two different openings
    for record, got in zip(RECORDS, found, strict=True):
        texts = [o + continue_texts(model, tokenizer, [o], 7)[0] for o in record.generations]
        assert got.case_id == record.case_id and list(got.texts) == texts
        assert got.ge == pytest.approx(sum(map(n_gram_entropy, texts)) / len(texts))
        assert got.rs is None
    assert written(new_tokens=7, top_k=None) == found  # whatever the batches


def test_sampled_texts_are_seeded_and_each_opening_has_its_own() -> None:
    found = written(new_tokens=12, seed=3)
    assert found == written(new_tokens=12, seed=3)
    assert found != written(new_tokens=12, seed=4)
    one, other = found[0].texts[1:]
    assert one.startswith("I play") and one != other
    alone = written(new_tokens=12, seed=3, batch_rows=1)  # equal openings in different batches
    assert len({*alone[0].texts[1:], *alone[1].texts}) == 3


def test_texts_are_compared_with_references() -> None:
    first, second = written(new_tokens=3, references=Likeness())
    assert first.rs == len(" ".join(first.texts)) / 1001 and second.rs == len(second.texts[0]) / 1002


def test_the_settings_are_those_of_the_published_code(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fake(model: Any, tokenizer: Any, texts: list[str], new: int, **more: Any) -> list[str]:
        asked.append((texts, new, more["top_k"]))
        return [" on"] * len(texts)

    monkeypatch.setattr(module, "continue_texts", fake)
    assert written()[1].texts == ("I play on",)
    assert asked == [(["I play", "I play", "I play", "The piano is in"], 100, 5)]


def test_what_is_refused() -> None:
    bare = [*RECORDS, dataclasses.replace(RECORDS[0], case_id=77, generations=())]
    with pytest.raises(BadData, match=r"Record 77 has no generation_prompts.*leave"):
        generate_records(None, None, bare)
    for name in ("new_tokens", "top_k", "batch_rows"):
        with pytest.raises(BadConfig, match=f"{name} is 0; it must be 1 or more"):
            written(**{name: 0})
