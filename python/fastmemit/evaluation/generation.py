"""Free text about a record's subject, from the model as it is now: its entropy, and its likeness to reference texts."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcov.files import StrPath
from fastmemit.data import Record
from fastmemit.data.corpora import is_clean_text
from fastmemit.data.reading import read_values
from fastmemit.errors import BadConfig, BadData
from fastmemit.evaluation.scores import mean
from fastmemit.text import continue_texts

NEW_TOKENS = 100
TOP_K = 5
WEIGHTS = {2: 2 / 3, 3: 4 / 3}  # weights of the bigram and the trigram entropy, whose mean is the entropy of a text
# A word with its apostrophes and hyphens, or one other character that is not white space.
_TOKEN = re.compile(r"\w+(?:['\u2019-]\w+)*|[^\w\s]")
_FIELDS = ("relation_id", "target_new", "text")
_SHOWN = 3  # records named in one error


@dataclass(frozen=True)
class RecordGeneration:
    """What one record's openings were continued to."""

    case_id: int
    ge: float  # mean n-gram entropy of the texts, in bits
    rs: float | None  # cosine of the texts with the reference texts, in [0, 1]; None where there are none
    texts: tuple[str, ...]  # openings included

    def as_dict(self) -> dict[str, Any]:
        """The measures and the texts for a JSON file."""
        return {"ge": self.ge, "rs": self.rs, "texts": list(self.texts)}


def summarise_generation(records: Iterable[RecordGeneration]) -> dict[str, float | None]:
    """Average over records: ge, n-gram entropy in bits (published tables show 100 times this), and rs in percent."""
    written = list(records)
    likeness = mean([record.rs for record in written if record.rs is not None])
    return {"ge": mean([record.ge for record in written]), "rs": None if likeness is None else 100 * likeness}


def tokens_of(text: str) -> list[str]:
    """The words and punctuation marks of a text, as it is written, case included.

    Published figures use another tokeniser (NLTK's), which splits "don't" in two; the entropies of one text differ
    little, but compare only what one tokeniser counted.
    """
    return _TOKEN.findall(text)


def n_gram_entropy(text: str) -> float:
    """The fluency of a text: low where it repeats itself.

    ``H_n = -sum p log2 p`` over the distinct n-grams, p their share of all n-grams of the text. The result is the mean
    of ``2/3 H_2`` and ``4/3 H_3``, in bits (Meng et al. 2022, after Zhang et al. 2018); 0 below three tokens.
    """
    tokens = tokens_of(text)
    return math.fsum(weight * _entropy(tokens, n) for n, weight in WEIGHTS.items()) / len(WEIGHTS)


def _entropy(tokens: Sequence[str], n: int) -> float:
    counts = Counter(zip(*(tokens[start:] for start in range(n)), strict=False))
    total = sum(counts.values())
    return -math.fsum(c / total * math.log2(c / total) for c in counts.values())


class References:
    """Reference texts by relation and new answer, and how alike another text is to them.

    They are texts about things for which an edit's new answer is true. Likeness is the cosine of TF-IDF vectors, by
    scikit-learn's `TfidfVectorizer` with its own settings, fitted on all of them. They are given by ``(relation_id,
    target_new)``, the case of which does not matter.

    Raises:
        BadConfig: scikit-learn is not installed.
        BadData: The texts hold no word.
    """

    def __init__(self, texts: Mapping[tuple[str, str], Sequence[str]]) -> None:
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
        except ImportError:
            raise BadConfig(
                "The reference score needs scikit-learn, which is not installed; pip install 'fastmemit[eval]', or "
                "name no references."
            ) from None
        self._texts: dict[tuple[str, str], list[str]] = {}
        for (relation, answer), some in texts.items():
            self._texts.setdefault((relation, _key(answer)), []).extend(some)
        self._vectorizer = TfidfVectorizer()
        try:
            self._vectorizer.fit([text for some in texts.values() for text in some])
        except ValueError as bad:
            raise BadData(
                f"The reference texts cannot be compared with ({str(bad).rstrip('.')}); give texts with words in them."
            ) from None

    def check(self, records: Iterable[Record]) -> None:
        """Raise BadData if there is no text for some of the records; the first of them are named."""
        lacking = [record for record in records if _place(record) not in self._texts]
        if lacking:
            named = "; ".join(
                f"case {r.case_id}: relation_id {r.relation_id!r}, target_new {r.request.target_new.strip()!r}"
                for r in lacking[:_SHOWN]
            )
            more = f"; and {len(lacking) - _SHOWN} more" if len(lacking) > _SHOWN else ""
            raise BadData(
                f"The references have no text for {len(lacking)} of the records ({named}{more}); add one for each, or "
                "name no references."
            )

    def likeness(self, one: str, other: str) -> float:
        """The cosine of two texts, in [0, 1]; 0 if one of them has no word of the vocabulary."""
        first, second = self._vectorizer.transform([one, other])
        return float((first @ second.T).sum())  # the rows have length 1, or 0 where no word is known

    def score(self, record: Record, texts: Sequence[str]) -> float:
        """The reference score: the cosine of all generated texts with all reference texts; BadData without any."""
        self.check([record])
        return self.likeness(" ".join(texts), " ".join(self._texts[_place(record)]))


def load_references(path: StrPath) -> References:
    """Read reference texts: a JSON list or JSONL file of ``{"relation_id": ..., "target_new": ..., "text": ...}``.

    Several items of one relation and answer are several texts. Texts about things whose answer is ``target_new`` serve
    best, such as articles about cities in Italy for an edit that moves something to Italy.

    Raises:
        BadConfig: scikit-learn is not installed.
        BadData: The file cannot be read, or an item lacks a field.
    """
    path = Path(path)
    texts: dict[tuple[str, str], list[str]] = {}
    for index, (place, value) in enumerate(read_values(path, BadData)):
        where = f"Reference {index} of {path} ({place})"
        if not isinstance(value, Mapping):
            raise BadData(f"{where} is {value!r:.40}; write an object with relation_id, target_new and text.")
        for name in _FIELDS:
            found: Any = value.get(name)
            if not is_clean_text(found) or not found.strip():
                raise BadData(f"{where} must have text in the field {name} but has {found!r:.40}; write some.")
        texts.setdefault((value["relation_id"], value["target_new"]), []).append(value["text"])
    if not texts:
        raise BadData(f"{path} holds no reference text; write at least one.")
    return References(texts)


def _place(record: Record) -> tuple[str, str]:
    return record.relation_id or "", _key(record.request.target_new)


def _key(answer: str) -> str:
    return answer.strip().lower()


def generate_records(
    model: Any,
    tokenizer: Any,
    records: Sequence[Record],
    *,
    references: References | None = None,
    new_tokens: int = NEW_TOKENS,
    top_k: int | None = TOP_K,
    seed: int = 0,
    batch_rows: int = 64,
    progress: Callable[[int], None] | None = None,
) -> list[RecordGeneration]:
    """Continue every record's openings by exactly `new_tokens`, and measure the texts.

    Each is sampled among the `top_k` most probable tokens; None takes the most probable (greedy). Openings of like
    lengths run together, `batch_rows` at once. Sampled, an opening that a record has twice gives two texts; greedy,
    equal openings of all records run once. The same seed gives the same texts for the same records in the same order;
    among other records the draws are others. `progress` is called with the number of openings done since its last call.

    Raises:
        BadConfig: A number is below 1.
        BadData: A record has no opening, or no reference text.
    """
    for name, number in (("new_tokens", new_tokens), ("batch_rows", batch_rows), ("top_k", top_k)):
        if number is not None and number < 1:
            raise BadConfig(f"{name} is {number}; it must be 1 or more.")
    check_generations(records, references)
    openings = [text for record in records for text in record.generations]
    texts = [""] * len(openings)
    where: dict[Any, list[int]] = {}  # what runs once -> the openings that it answers
    for index, text in enumerate(openings):
        where.setdefault(text if top_k is None else (text, index), []).append(index)
    rows = sorted(where.values(), key=lambda found: len(openings[found[0]]))
    for start in range(0, len(rows), batch_rows):
        chunk = rows[start : start + batch_rows]
        begun = [openings[found[0]] for found in chunk]
        # A seed of its own for each batch, or equal openings of two batches would go on alike.
        drawn = (seed * 1_000_003 + start) % 2**63
        new = continue_texts(model, tokenizer, begun, new_tokens, top_k=top_k, seed=drawn)
        for found, begin, rest in zip(chunk, begun, new, strict=True):
            for index in found:
                texts[index] = begin + rest
        if progress is not None:
            progress(sum(map(len, chunk)))
    left = iter(texts)
    made = []
    for record in records:
        own = [next(left) for _ in record.generations]
        entropy = math.fsum(map(n_gram_entropy, own)) / len(own)
        score = None if references is None else references.score(record, own)
        made.append(RecordGeneration(record.case_id, entropy, score, tuple(own)))
    return made


def check_generations(records: Sequence[Record], references: References | None = None) -> None:
    """Raise BadData if a record has no opening, or no reference text where there are any."""
    for record in records:
        if not record.generations:
            raise BadData(
                f"Record {record.case_id} has no generation_prompts to continue; add one, or leave out the metric "
                "generation."
            )
    if references is not None:
        references.check(records)
