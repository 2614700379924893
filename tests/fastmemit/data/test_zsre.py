"""zsRE in MEND's format, and every way a record can be malformed."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from fastmemit.data import ZsreRecord, batches, load_zsre
from fastmemit.data.records import is_zsre
from fastmemit.errors import BadData
from fastmemit.request import EditRequest


def row(number: int = 0, **changes: Any) -> dict[str, Any]:
    fields = {
        "subject": f"Tower {number}",
        "src": f"In which city is Tower {number}?",
        "rephrase": f"What city has Tower {number}?",
        "alt": "Rome",
        "answers": ["Paris", "City of Paris"],
        "loc": "nq question: who wrote the odyssey",
        "loc_ans": "Homer",
    }
    return {name: x for name, x in {**fields, **changes}.items() if x != "REMOVED"}


def write(path: Path, *rows: Any, lines: bool = False) -> Path:
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("lines", [True, False])
def test_a_record_as_memit_reads_it(tmp_path: Path, lines: bool) -> None:
    path = write(tmp_path / "a.json", row(0), row(1), lines=lines)
    first, second = load_zsre(path)
    assert first == ZsreRecord(
        case_id=0,
        request=EditRequest("In which city is {}?", "Tower 0", "Paris"),
        paraphrases=("What city has Tower 0?",),
        neighbourhood=("nq question: who wrote the odyssey?",),
        neighbourhood_answers=("Homer",),
    )
    assert (second.case_id, second.request.subject) == (1, "Tower 1")
    assert load_zsre(f"zsre:{path}") == [first, second]
    assert len(batches([first, second], 1)) == 2


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (["no object"], r"field \(all\): a record must be an object, not list"),
        (row(subject="REMOVED"), "field subject: is missing"),
        (row(subject=" "), "field subject: must be text that is not empty, not ' '"),
        (row(subject="Bridge"), "field src: 'In which city is Tower 0.' does not contain .*Bridge"),
        (row(src="Tower 0 or Tower 0?"), "field src: .* contains the subject 'Tower 0' twice"),
        (row(src="Is Tower 0 {}?"), "field src: .*2 of {}"),
        (row(src=3), "field src: must be text that is not empty, not 3"),
        (row(rephrase=""), "field rephrase: must be text"),
        (row(answers=[]), r"field answers: must be a list of one text or more, not \[\]"),
        (row(answers="Paris"), "field answers: must be a list of one text or more, not 'Paris'"),
        (row(answers=[" "]), r"field answers\[0\]: must be text"),
        (row(loc="who wrote it"), "field loc: 'who wrote it' does not begin with 'nq question: '"),
        (row(loc_ans=None), "field loc_ans: is missing"),
        (row(loc_ans="\ud800"), "field loc_ans: must be text"),
    ],
)
def test_malformed_records_name_index_and_field(
    record: Any, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.jsonl", row(7), record, row(9), lines=True)
    with pytest.raises(BadData, match=rf"1 malformed record of 3: record 1 \(line 2\), {reason}"):
        load_zsre(path)
    with caplog.at_level(logging.WARNING):
        assert [r.case_id for r in load_zsre(path, skip_malformed=True)] == [0, 2]
    assert "skipped record 1 (line 2)" in caplog.text


def test_ten_problems_are_shown_and_all_counted(tmp_path: Path) -> None:
    with pytest.raises(BadData) as caught:
        load_zsre(write(tmp_path / "a.json", row(), *[row(loc="x")] * 13))
    message = str(caught.value)
    assert "13 malformed records of 14" in message and "and 3 more" in message
    assert "record 10 (item 10)" in message and "record 11" not in message
    with pytest.raises(BadData, match=r"no readable record \(1 looked at\)"):
        load_zsre(write(tmp_path / "b.json", 7), skip_malformed=True)


def test_it_is_told_by_its_name_or_its_fields(tmp_path: Path) -> None:
    assert is_zsre("zsre:anything")
    assert is_zsre(write(tmp_path / "a.json", row()))
    assert is_zsre(str(write(tmp_path / "b.jsonl", row(), lines=True)))
    assert not is_zsre(write(tmp_path / "c.json", {"case_id": 0, "requested_rewrite": {}}))
    assert not is_zsre(write(tmp_path / "d.json"))
    (tmp_path / "e.json").write_text("")
    for name in ("e.json", "gone.json"):
        assert not is_zsre(tmp_path / name)
    assert not is_zsre("counterfact") and not is_zsre("hub:some/data")
    with pytest.raises(BadData, match="does not exist"):
        load_zsre(f"zsre:{tmp_path / 'gone.json'}")


def test_the_published_subset(data_dir: Path) -> None:
    records = load_zsre(data_dir / "zsre_1000.json")
    assert len(records) == 1000
    assert records[0].request.text == "What is the product made by UniFirst?"
    assert records[0].request.target_new == "uniform"
    assert records[2].request.target_new == "1987"
    assert all(r.neighbourhood[0].endswith("?") for r in records)
    assert sum(map(len, batches(records, 10, 99))) == 990
