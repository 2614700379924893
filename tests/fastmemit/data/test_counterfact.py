"""CounterFact in both schemas, every way a record can be malformed, and how batches are dealt."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastmemit.data import batches, load_records, load_requests
from fastmemit.data.records import Record
from fastmemit.errors import BadData
from fastmemit.request import EditRequest


def full(case_id: int = 0, **changes: Any) -> dict[str, Any]:
    record = {
        "case_id": case_id,
        "requested_rewrite": {
            "prompt": "{} is in",
            "relation_id": "P131",
            "target_new": {"str": "Rome", "id": "Q220"},
            "target_true": {"str": "Paris", "id": "Q90"},
            "subject": f"Tower {case_id}",
        },
        "paraphrase_prompts": ["Where is the tower? In"],
        "neighborhood_prompts": ["The Louvre is in", "Orsay is in"],
        "attribute_prompts": ["The Pantheon is in"],
        "generation_prompts": ["Next to the tower"],
    }
    return {**record, **changes}


def flat(case_id: int = 0, **changes: Any) -> dict[str, Any]:
    record = {
        "case_id": case_id,
        "subject": f"Tower {case_id}",
        "prompt": "{} is in",
        "prompt_filled": f"Tower {case_id} is in",
        "relation_id": None,
        "target_new": "Rome",
        "target_true": "Paris",
        "rephrase_prompt": "Next to the tower",
        "locality_prompt": "The Louvre is in",
        "locality_ground_truth": "Paris",
    }
    return {**record, **changes}


def write(path: Path, *records: Any, as_list: bool = False) -> Path:
    text = json.dumps(records) if as_list else "\n".join(map(json.dumps, records)) + "\n"
    path.write_text(text, encoding="utf-8")
    return path


def test_full_schema_as_list_and_as_lines(tmp_path: Path) -> None:
    expected = Record(
        case_id=3,
        request=EditRequest("{} is in", "Tower 3", "Rome", "Paris"),
        paraphrases=("Where is the tower? In",),
        neighbourhood=("The Louvre is in", "Orsay is in"),
        attributes=("The Pantheon is in",),
        generations=("Next to the tower",),
        relation_id="P131",
    )
    assert load_records(write(tmp_path / "a.json", full(3), as_list=True)) == [expected]
    # The content tells, not the name.
    assert load_records(write(tmp_path / "b.json", full(3))) == [expected]
    assert load_records(str(write(tmp_path / "c.jsonl", full(3), as_list=True))) == [expected]


def test_flat_schema_has_no_paraphrases(tmp_path: Path) -> None:
    (record,) = load_records(write(tmp_path / "flat.jsonl", flat(5)))
    assert record.request == EditRequest("{} is in", "Tower 5", "Rome", "Paris")
    assert record.paraphrases == ()
    assert record.neighbourhood == ("The Louvre is in",)
    assert record.generations == ("Next to the tower",)
    assert record.relation_id is None


def test_flat_schema_with_filled_prompt_and_ground_truth(tmp_path: Path) -> None:
    row = flat(5, prompt="Tower 5 is in", ground_truth="Paris")
    del row["target_true"]
    (record,) = load_records(write(tmp_path / "flat.jsonl", row))
    assert record.request == EditRequest("{} is in", "Tower 5", "Rome", "Paris")


def test_blank_lines_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(full(0)), "", "  ", json.dumps(full(1))]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert [record.case_id for record in load_records(path)] == [0, 1]
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([full(4)]).encode())
    assert [record.case_id for record in load_records(path)] == [4]


def test_own_facts_have_the_number_of_their_line_and_may_leave_answers_open(tmp_path: Path) -> None:
    own = {"prompt": "{} is in", "subject": "Tower 5", "target": "Rome"}
    more = {
        **own,
        "target_true": "Paris",
        "paraphrases": ["To see {}, go to", "Tower 5 stands in"],
        "neighbours": ["The Louvre is in", {"prompt": "Big Ben is in", "answer": "London"}],
    }
    path = tmp_path / "mine.jsonl"
    path.write_text(f"{json.dumps(own)}\n\n{json.dumps(more)}\n{json.dumps(full(7))}\n")
    first, second, third = load_records(path, own=True)
    assert (first.case_id, first.request) == (1, EditRequest("{} is in", "Tower 5", "Rome"))
    assert (first.paraphrases, first.neighbourhood, first.neighbourhood_answers) == ((), (), ())
    assert (second.case_id, second.request.target_true) == (3, "Paris")
    assert second.paraphrases == ("To see Tower 5, go to", "Tower 5 stands in")
    assert second.neighbourhood == ("The Louvre is in", "Big Ben is in")
    assert second.neighbourhood_answers == (None, "London")
    assert (third.case_id, third.neighbourhood_answers) == (7, ())
    # The same file is one of requests.
    path.write_text(f"{json.dumps(own)}\n\n{json.dumps(more)}\n")
    assert load_requests(path) == [first.request, second.request]
    (listed,) = load_records(write(tmp_path / "list.json", own, as_list=True), own=True)
    assert listed.case_id == 0
    with pytest.raises(BadData, match="field case_id: must be a whole number"):
        load_records(path)  # where answers are needed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"subject": None}, "The request has no subject"),
        ({"paraphrases": [3]}, r"field paraphrases\[0\]: must be text"),
        ({"neighbours": [{"answer": "x"}]}, r"field neighbours\[0\]: must be text that is not empty, not None"),
        ({"neighbours": [{"prompt": "x", "answer": " "}]}, r"field neighbours\[0\].answer: must be text"),
    ],
)
def test_an_own_fact_that_cannot_be_read_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    own = {"prompt": "{} is in", "subject": "Tower 5", "target_new": "Rome", **change}
    with pytest.raises(BadData, match=said):
        load_records(write(tmp_path / "mine.jsonl", own), own=True)


def rewrite(**changes: Any) -> dict[str, Any]:
    fields = {**full()["requested_rewrite"], **changes}
    return full(requested_rewrite={k: v for k, v in fields.items() if v != "REMOVED"})


@pytest.mark.parametrize(
    ("record", "field"),
    [
        (["no object"], r"field \(all\): .*not list"),
        (full("7"), "field case_id: .*'7'"),
        (full(True), "field case_id: .*True"),
        ({k: v for k, v in full().items() if k != "case_id"}, "field case_id: .*None"),
        (full(requested_rewrite="x"), "field requested_rewrite: must be an object"),
        ({"case_id": 1, "answer": "x"}, r"field requested_rewrite: is missing \(fields: case_id"),
        (rewrite(subject="REMOVED"), "field requested_rewrite.subject: is missing"),
        (rewrite(subject="  "), "field requested_rewrite.subject: must be text that is not empty"),
        (rewrite(target_new={"id": "Q1"}), "field requested_rewrite.target_new.str: is missing"),
        (rewrite(target_true="REMOVED"), "field requested_rewrite.target_true: is missing"),
        (rewrite(target_true={"str": 3}), "field requested_rewrite.target_true.str: must be text"),
        (rewrite(prompt="{} or {}"), "field requested_rewrite.prompt: .*2 of {}"),
        (rewrite(prompt="no hole"), "field requested_rewrite.prompt: .*not in the prompt"),
        (rewrite(subject="\ud800"), "field requested_rewrite.subject: must be text"),
        (rewrite(relation_id=5), "field requested_rewrite.relation_id: .*5"),
        (full(paraphrase_prompts={"a": 1}), "field paraphrase_prompts: .*not dict"),
        (full(paraphrase_prompts=["a", None]), r"field paraphrase_prompts\[1\]: .*None"),
        (full(neighborhood_prompts=["a", " "]), r"field neighborhood_prompts\[1\]: .*' '"),
        (flat(target_true=None), "field target_true: is missing"),
        (flat(locality_prompt=""), "field locality_prompt: .*''"),
        (flat(locality_ground_truth="Lyon"), "field locality_ground_truth: is 'Lyon', not 'Paris'"),
    ],
)
def test_malformed_records_name_index_and_field(
    record: Any, field: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.jsonl", full(50), record, flat(51))
    with pytest.raises(BadData, match=rf"1 malformed record of 3: record 1 \(line 2\), {field}"):
        load_records(path)
    with caplog.at_level(logging.WARNING):
        assert [r.case_id for r in load_records(path, skip_malformed=True)] == [50, 51]
    assert "skipped record 1 (line 2)" in caplog.text


def test_all_problems_are_counted_and_ten_shown(tmp_path: Path) -> None:
    bad = [full(i, neighborhood_prompts=7) for i in range(13)]
    with pytest.raises(BadData) as caught:
        load_records(write(tmp_path / "a.json", full(99), *bad, as_list=True))
    message = str(caught.value)
    assert "13 malformed records of 14" in message
    assert "record 10 (item 10)" in message and "record 11" not in message
    assert "and 3 more" in message


def test_a_case_id_may_not_repeat(tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"record 2 .*field case_id: 4 is also that of record 0"):
        load_records(write(tmp_path / "a.jsonl", full(4), full(5), flat(4)))


def test_nothing_left_after_skipping(tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"no readable record \(1 looked at\)"):
        load_records(write(tmp_path / "a.jsonl", {"prompt": 1}), skip_malformed=True)


@pytest.mark.parametrize(
    "request_",
    [
        {"prompt": "{} is in", "subject": "Tower", "target_new": "Rome"},
        {"prompt": "{} is in", "subject": "Tower", "target_new": {"str": "Rome"}},
        {"prompt": "{} is in", "subject": "Tower", "target": "Rome"},
        {"prompt": "Tower is in", "subject": "Tower", "target_new": "Rome"},
        {"requested_rewrite": {"prompt": "{} is in", "subject": "Tower", "target_new": "Rome"}},
    ],
)
def test_requests_in_every_spelling(request_: dict, tmp_path: Path) -> None:
    expected = [EditRequest("{} is in", "Tower", "Rome")]
    assert load_requests(write(tmp_path / "a.jsonl", request_)) == expected
    assert load_requests(write(tmp_path / "a.json", request_, as_list=True)) == expected


def test_bad_requests_are_listed(tmp_path: Path) -> None:
    good = {"prompt": "{} is in", "subject": "Tower", "target_new": "Rome"}
    path = write(tmp_path / "a.jsonl", good, 5, {**good, "subject": ""}, {**good, "target_new": " "})
    with pytest.raises(BadData) as caught:
        load_requests(path)
    message = str(caught.value)
    assert "3 malformed requests of 4" in message
    for place in ("request 1 (line 2)", "request 2 (line 3)", "request 3 (line 4)"):
        assert place in message
    with pytest.raises(BadData, match=r"target_new .*not valid Unicode"):
        load_requests(write(tmp_path / "b.jsonl", {**good, "target_new": "\udc00"}))
    with pytest.raises(BadData, match="holds no request"):
        load_requests(write(tmp_path / "c.json", as_list=True))


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, config: str | None) -> dict[str, list]:
        asked.append((name, config))
        return {"train": [full(0)], "test": [full(1)]}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert [r.case_id for r in load_records("counterfact")] == [0, 1]
    assert len(load_records("hub:someone/facts:small")) == 2
    assert asked == [("azhx/counterfact", None), ("someone/facts", "small")]


def test_hub_without_a_network_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, config: str | None) -> None:
        raise ConnectionError("Couldn't reach the hub.\nA long explanation")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(BadData) as caught:
        load_records("hub:azhx/counterfact")
    assert str(caught.value) == (
        "The hub data set azhx/counterfact could not be loaded (ConnectionError: Couldn't reach "
        "the hub); check the name and the network, or give a file in CounterFact's JSON format."
    )
    with pytest.raises(BadData, match="names no data set"):
        load_records("hub:")


def test_the_published_subset(data_dir: Path) -> None:
    records = load_records(data_dir / "counterfact_1400.json")
    assert len(records) == 1400
    assert all(len(r.paraphrases) == 2 and len(r.neighbourhood) == 10 for r in records)
    assert records[0].request.text == "The mother tongue of Danielle Darrieux is"
    assert records[0].request.target_true == "French"
    assert sum(map(len, batches(records, 16))) == 1386


def test_the_flat_file(data_dir: Path) -> None:
    records = load_records(data_dir / "counterfact_flat_21919.jsonl")
    assert len(records) == 21_919
    assert not any(r.paraphrases for r in records)
    assert all(len(r.neighbourhood) == 1 and len(r.generations) == 1 for r in records)
