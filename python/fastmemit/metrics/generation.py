"""How free text reads: n-gram entropy, and likeness to reference texts; no model is needed here."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fastmemit.errors import BadConfig, BadData
from fastmemit.metrics.means import mean, percent

#: Weights of the bigram and the trigram entropy, whose mean is the entropy of a text.
WEIGHTS = {2: 2 / 3, 3: 4 / 3}

# A word with its apostrophes and hyphens, or one other character that is not white space.
_TOKEN = re.compile(r"\w+(?:['\u2019-]\w+)*|[^\w\s]")


@dataclass(frozen=True)
class RecordGeneration:
    """What one record's openings were continued to.

    Args:
        case_id: The record's number.
        ge: Mean n-gram entropy of the texts, in bits.
        rs: Reference score, the cosine of the texts with the reference texts, in [0, 1]; None where no reference texts
            were named.
        texts: The texts, openings included.
    """

    case_id: int
    ge: float
    rs: float | None
    texts: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The measures and the texts for a JSON file."""
        return {"ge": self.ge, "rs": self.rs, "texts": list(self.texts)}


@dataclass(frozen=True)
class Generation:
    """The means over a set of records; None where no record was asked.

    Args:
        ge: n-gram entropy, in bits (published tables show 100 times this).
        rs: Reference score, in percent.
    """

    ge: float | None
    rs: float | None

    def as_dict(self) -> dict[str, float | None]:
        """Both by name."""
        return {"ge": self.ge, "rs": self.rs}


def tokens_of(text: str) -> list[str]:
    """The words and punctuation marks of a text, as it is written, case included.

    Published figures use another tokeniser (NLTK's), which splits "don't" in two; the entropies of one text differ
    little, but compare only what one tokeniser counted.
    """
    return _TOKEN.findall(text)


def n_gram_entropy(text: str) -> float:
    """The fluency of a text: low where it repeats itself.

    ``H_n = -sum p log2 p`` over the distinct n-grams, p their share of all n-grams of the text. The result is the mean
    of ``2/3 H_2`` and ``4/3 H_3`` (Meng et al. 2022, after Zhang et al. 2018).

    Returns:
        Bits; 0 for a text of fewer than three tokens.
    """
    tokens = tokens_of(text)
    return math.fsum(weight * _entropy(tokens, n) for n, weight in WEIGHTS.items()) / len(WEIGHTS)


def _entropy(tokens: Sequence[str], n: int) -> float:
    counts = Counter(zip(*(tokens[start:] for start in range(n)), strict=False))
    total = sum(counts.values())
    return -math.fsum(c / total * math.log2(c / total) for c in counts.values())


class TextLikeness:
    """Cosine of TF-IDF vectors, by scikit-learn's `TfidfVectorizer` with its own settings.

    Args:
        texts: What the vocabulary and the inverse document frequencies are fitted on.

    Raises:
        BadConfig: scikit-learn is not installed.
        BadData: The texts hold no word.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
        except ImportError:
            raise BadConfig(
                "The reference score needs scikit-learn, which is not installed; "
                "pip install 'fastmemit[eval]', or name no references."
            ) from None
        self._vectorizer = TfidfVectorizer()
        try:
            self._vectorizer.fit(texts)
        except ValueError as bad:
            raise BadData(
                f"The reference texts cannot be compared with ({str(bad).rstrip('.')}); give texts with words in them."
            ) from None

    def __call__(self, one: str, other: str) -> float:
        """The cosine of two texts, in [0, 1]; 0 if one of them has no word of the vocabulary."""
        first, second = self._vectorizer.transform([one, other])
        # The rows have length 1, or 0 where no word is known.
        return float((first @ second.T).sum())


def summarise_generation(records: Iterable[RecordGeneration]) -> Generation:
    """Average over records, each of which counts once."""
    written = list(records)
    return Generation(
        mean([record.ge for record in written]),
        percent(mean([record.rs for record in written if record.rs is not None])),
    )
