"""Entropy and likeness of texts, by hand and against the formulas written literally."""

from __future__ import annotations

import builtins
import math
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastmemit.errors import BadConfig, BadData
from fastmemit.evaluation.generation import (
    RecordGeneration,
    References,
    n_gram_entropy,
    summarise_generation,
    tokens_of,
)


def test_entropy_by_hand() -> None:
    # Bigrams ab ba ab ba ab: 3/5 and 2/5. Trigrams aba bab aba bab: 1/2 and 1/2.
    bigrams = -(0.6 * math.log2(0.6) + 0.4 * math.log2(0.4))
    assert n_gram_entropy("a b a b a b") == pytest.approx((2 / 3 * bigrams + 4 / 3 * 1.0) / 2)
    # Five different bigrams and four different trigrams.
    assert n_gram_entropy("a b c d e f") == pytest.approx((2 / 3 * math.log2(5) + 4 / 3 * 2) / 2)


@pytest.mark.parametrize("text", ["", "word", "no no", "no no no no", "   "])
def test_a_text_without_choice_has_no_entropy(text: str) -> None:
    assert n_gram_entropy(text) == 0.0


@given(st.lists(st.sampled_from("abc"), min_size=3, max_size=40))
def test_entropy_against_the_literal_formula(words: list[str]) -> None:
    total = 0.0
    for n, weight in ((2, 2 / 3), (3, 4 / 3)):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        shares = [grams.count(gram) / len(grams) for gram in set(grams)]
        total += weight * -sum(p * math.log2(p) for p in shares)
    assert n_gram_entropy(" ".join(words)) == pytest.approx(total / 2, abs=1e-12)


def test_tokens_are_words_and_marks() -> None:
    assert tokens_of("She said: it's the well-known (old) Köln…\n") == [
        "She", "said", ":", "it's", "the", "well-known", "(", "old", ")", "Köln", "…",
    ]  # fmt: skip
    assert n_gram_entropy("Yes, yes, yes") == n_gram_entropy("Yes , yes , yes")
    assert n_gram_entropy("Yes yes yes") > n_gram_entropy("yes yes yes")  # case counts


FITTED = ["the tower is in rome", "the river runs through paris", "a poet wrote in rome"]


def test_likeness_is_the_cosine_of_tf_idf_vectors() -> None:
    likeness = References({("P1", "Rome"): FITTED}).likeness
    vocabulary = sorted({word for text in FITTED for word in text.split() if len(word) > 1})
    # scikit-learn's: idf = ln((1 + n) / (1 + df)) + 1, words of two letters or more.
    idf = {word: math.log(4 / (1 + sum(word in text.split() for text in FITTED))) + 1 for word in vocabulary}

    def vector(text: str) -> list[float]:
        raw = [text.split().count(word) * idf[word] for word in vocabulary]
        return [x / math.sqrt(sum(y * y for y in raw)) for x in raw]

    one, other = "the tower in rome is the tower", "the poet in paris"
    want = sum(a * b for a, b in zip(vector(one), vector(other), strict=True))
    assert likeness(one, other) == pytest.approx(want) and 0 < want < 1
    assert likeness(one, one) == pytest.approx(1.0)
    assert likeness(one, "river") == 0.0
    assert likeness(one, "nothing of it known") == 0.0


def test_texts_without_words() -> None:
    with pytest.raises(BadData, match=r"reference texts cannot be compared with .*give texts"):
        References({("P1", "Rome"): ["", "!"]})


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for name in [n for n in sys.modules if n.startswith("sklearn")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(BadConfig, match=r"needs scikit-learn.*fastmemit\[eval\]"):
        References({("P1", "Rome"): FITTED})


def test_summary() -> None:
    rows = [RecordGeneration(0, 6.0, 0.5, ("a",)), RecordGeneration(1, 4.0, None, ("b",))]
    found = summarise_generation(rows)
    assert found == {"ge": 5.0, "rs": 50.0}
    assert rows[0].as_dict() == {"ge": 6.0, "rs": 0.5, "texts": ["a"]}
    assert summarise_generation([]) == {"ge": None, "rs": None}
