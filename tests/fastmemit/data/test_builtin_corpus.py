"""The prose that the package ships: enough of it, and no sentence twice."""

from __future__ import annotations

import re
from collections import Counter

from fastmemit.data import load_corpus

DOCUMENTS = list(load_corpus("builtin").documents())


def test_there_is_enough_for_ten_keys_a_dimension_of_a_small_model() -> None:
    # SmolLM2-135M needs 15,360 keys at multiplier 10; English has more tokens than words.
    assert len(DOCUMENTS) == len(load_corpus("builtin")) >= 130
    assert sum(len(text.split()) for text in DOCUMENTS) >= 15_800


def test_documents_are_short_paragraphs() -> None:
    assert all(80 <= len(text.split()) <= 140 for text in DOCUMENTS)
    assert all("\n" not in text and "  " not in text for text in DOCUMENTS)


def test_nothing_repeats() -> None:
    phrases: Counter[tuple[str, ...]] = Counter()
    for text in DOCUMENTS:
        words = re.findall(r"\w+", text.lower())
        phrases.update({tuple(words[i : i + 7]) for i in range(len(words) - 6)})
    assert [" ".join(phrase) for phrase, count in phrases.items() if count > 1] == []
