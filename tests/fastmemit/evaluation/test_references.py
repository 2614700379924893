"""Reference texts: read, checked, and compared with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn")

from fastmemit.data import Record
from fastmemit.errors import BadData
from fastmemit.evaluation import References, load_references
from tiny_editors import FACTS

ROWS = [
    {"relation_id": "P1", "target_new": "Rome", "text": "Trajan's Column stands in Rome."},
    {"relation_id": "P1", "target_new": "rome ", "text": "The Tiber runs through the city."},
    {"relation_id": "P2", "target_new": "Rome", "text": "A pope lived there."},
]
RECORD = Record(3, FACTS[0], relation_id="P1")  # to Rome


def write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_texts_of_one_relation_and_answer_belong_together(tmp_path: Path) -> None:
    references = load_references(write(tmp_path / "a.jsonl", *ROWS))
    references.check([RECORD])
    said = ["The column stands in", "the city"]
    want = References({("", ""): [row["text"] for row in ROWS]}).likeness(
        "The column stands in the city", "Trajan's Column stands in Rome. The Tiber runs through the city."
    )
    assert references.score(RECORD, said) == pytest.approx(want) and want > 0.3
    other = dataclasses.replace(RECORD, relation_id="P2")
    assert references.score(other, said) == 0.0


def test_a_record_without_a_text_is_named() -> None:
    references = References({("P1", "Rome"): ["Rome is a city."]})
    lacking = [Record(n, FACTS[1], relation_id="P1") for n in range(5)]  # to Berlin
    with pytest.raises(BadData) as caught:
        references.check([RECORD, *lacking])
    assert str(caught.value) == (
        "The references have no text for 5 of the records (case 0: relation_id 'P1', target_new "
        "'Berlin'; case 1: relation_id 'P1', target_new 'Berlin'; case 2: relation_id 'P1', "
        "target_new 'Berlin'; and 2 more); add one for each, or name no references."
    )
    with pytest.raises(BadData, match="relation_id None"):
        references.score(Record(9, FACTS[0]), ["text"])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (["no"], r"Reference 1 of .* \(line 2\) is \['no'\]; write an object"),
        ({**ROWS[0], "text": " "}, "must have text in the field text but has ' '"),
        ({**ROWS[0], "relation_id": None}, "must have text in the field relation_id but has None"),
        ({**ROWS[0], "target_new": {"str": "x"}}, "must have text in the field target_new"),
    ],
)
def test_malformed_items(row: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(BadData, match=reason):
        load_references(write(tmp_path / "a.jsonl", ROWS[0], row))


def test_an_empty_list(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(BadData, match="holds no reference text"):
        load_references(tmp_path / "a.json")
