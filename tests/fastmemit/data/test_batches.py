"""How records are dealt into batches."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastmemit.data import Record, batches
from fastmemit.data.records import listed_records
from fastmemit.errors import BadData
from fastmemit.request import EditRequest


def record(case_id: int, subject: str) -> Record:
    return Record(case_id, EditRequest("{} is in", subject, "Rome", "Paris"))


def test_batches_have_one_record_per_subject() -> None:
    records = [record(i, ["Ann", "ANN", "bob", "Cy", "dee", "Eve", "cy "][i]) for i in range(7)]
    dealt = batches(records, 2)
    assert [len(batch) for batch in dealt] == [2, 2, 1]
    subjects = [r.request.subject.strip().lower() for batch in dealt for r in batch]
    assert sorted(subjects) == ["ann", "bob", "cy", "dee", "eve"]
    assert batches(records, 2, 2) == dealt[:2]


def test_batches_depend_on_the_seed_alone() -> None:
    records = [record(i, f"S{i}") for i in range(20)]
    assert batches(records, 5, seed=1) == batches(list(records), 5, seed=1)
    assert batches(records, 5, seed=1) != batches(records, 5, seed=2)
    # Pinned, so that a run can be repeated with another version of Python.
    assert [r.case_id for r in batches(records, 5, seed=0)[0]] == [10, 18, 16, 14, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (2, 3),
            r"5 records with different subjects \(of 5\), too few for 3 batches of 2; ask for 2 of 2 or 3 of 1, or",
        ),
        ((9, 1), "too few for 1 batch of 9; ask for 1 of 5, or give more records"),
        ((2, 9), "too few for 9 batches of 2; ask for 2 of 2, or give more records"),
        ((0, 1), "batch_size is 0"),
        ((1, -1), "n_batches is -1"),
    ],
)
def test_batches_that_cannot_be_dealt(arguments: tuple, message: str) -> None:
    with pytest.raises(BadData, match=message):
        batches([record(i, f"S{i}") for i in range(5)], *arguments)


def test_no_records_no_batches() -> None:
    with pytest.raises(BadData, match=r"0 records.* too few for some batches of 4; give more"):
        batches([], 4)


def test_a_fixed_list_is_dealt_as_it_stands(tmp_path: Path) -> None:
    records = [record(case, f"subject {case % 5}") for case in range(9)]  # 7 and 2 have one subject: both are listed
    for name, text in (("list.json", "[7, 2, 5, 0]"), ("lines.txt", "7\n2\n\n5\n0\n")):
        (tmp_path / name).write_text(text)
        listed = listed_records(records, tmp_path / name)
        assert [one.case_id for one in listed] == [7, 2, 5, 0]
        dealt = batches(listed, 2, seed=None)
        assert [[one.case_id for one in batch] for batch in dealt] == [[7, 2], [5, 0]]
        with pytest.raises(BadData, match="The facts have 4 records, too few for 3 batches of 2"):
            batches(listed, 2, 3, seed=None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1\n99\n", "line 2: 99 is not the case_id of a record of the facts"),
        ("[1, true]", "item 1: True is not the case_id"),
        ('[1, "2"]', "item 1: '2' is not the case_id"),
        ("[3, 1, 3]", "item 2: the case 3 is there twice"),
        ("[]", "lists no case"),
    ],
)
def test_a_list_that_names_no_records(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "cases").write_text(text)
    with pytest.raises(BadData, match=words):
        listed_records([record(case, f"subject {case}") for case in range(9)], tmp_path / "cases")
