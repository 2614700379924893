"""Reference texts: what is true of things for which an edit's new answer is true."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastmemit.data import Record
from fastmemit.data.reading import is_clean_text, read_values
from fastmemit.errors import BadData
from fastmemit.metrics.generation import TextLikeness

_FIELDS = ("relation_id", "target_new", "text")
_SHOWN = 3  # records named in one error


class References:
    """Reference texts by relation and new answer, and how alike another text is to them.

    Args:
        texts: The texts of each ``(relation_id, target_new)``; the answer's case does not matter.

    Raises:
        BadConfig: scikit-learn is not installed.
        BadData: The texts hold no word.
    """

    def __init__(self, texts: Mapping[tuple[str, str], Sequence[str]]) -> None:
        self._texts: dict[tuple[str, str], list[str]] = {}
        for (relation, answer), some in texts.items():
            self._texts.setdefault((relation, _key(answer)), []).extend(some)
        self._likeness = TextLikeness([text for some in texts.values() for text in some])

    def check(self, records: Iterable[Record]) -> None:
        """See that there is a text for every record.

        Raises:
            BadData: There is none for some; the first of them are named.
        """
        lacking = [record for record in records if _place(record) not in self._texts]
        if lacking:
            named = "; ".join(
                f"case {r.case_id}: relation_id {r.relation_id!r}, target_new {r.request.target_new.strip()!r}"
                for r in lacking[:_SHOWN]
            )
            more = f"; and {len(lacking) - _SHOWN} more" if len(lacking) > _SHOWN else ""
            raise BadData(
                f"The references have no text for {len(lacking)} of the records ({named}{more}); "
                "add one for each, or name no references."
            )

    def score(self, record: Record, texts: Sequence[str]) -> float:
        """The reference score: the cosine of all generated texts with all reference texts.

        Raises:
            BadData: There is no reference text for the record.
        """
        self.check([record])
        return self._likeness(" ".join(texts), " ".join(self._texts[_place(record)]))


def load_references(path: str | Path) -> References:
    """Read reference texts.

    Args:
        path: A JSON list or JSONL file of ``{"relation_id": ..., "target_new": ..., "text": ...}``; several items of
            one relation and answer are several texts. Texts about things whose answer is ``target_new`` serve best,
            such as articles about cities in Italy for an edit that moves something to Italy.

    Raises:
        BadConfig: scikit-learn is not installed.
        BadData: The file cannot be read, or an item lacks a field.
    """
    texts: dict[tuple[str, str], list[str]] = {}
    for index, (place, value) in enumerate(read_values(Path(path), BadData)):
        relation, answer, text = _item(path, index, place, value)
        texts.setdefault((relation, answer), []).append(text)
    if not texts:
        raise BadData(f"{path} holds no reference text; write at least one.")
    return References(texts)


def _item(path: str | Path, index: int, place: str, value: Any) -> tuple[str, str, str]:
    where = f"Reference {index} of {path} ({place})"
    if not isinstance(value, Mapping):
        raise BadData(f"{where} is {value!r:.40}; write an object with relation_id, target_new and text.")
    for name in _FIELDS:
        found: Any = value.get(name)
        if not is_clean_text(found) or not found.strip():
            raise BadData(f"{where} must have text in the field {name} but has {found!r:.40}; write some.")
    return value["relation_id"], value["target_new"], value["text"]


def _place(record: Record) -> tuple[str, str]:
    return record.relation_id or "", _key(record.request.target_new)


def _key(answer: str) -> str:
    return answer.strip().lower()
