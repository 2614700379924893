"""MQuAKE and RippleEdits: read as published, fetched by name, and asked what follows from their edits."""

from __future__ import annotations

import io
import json
from http.client import IncompleteRead
from pathlib import Path
from typing import Any

import pytest

from fastmemit.answers import Answer
from fastmemit.cli import main
from fastmemit.cli.edit import named_requests
from fastmemit.data import load_records
from fastmemit.data.reading import downloaded
from fastmemit.data.records import ADDRESSES, Probe
from fastmemit.errors import BadData
from fastmemit.evaluation import evaluate
from fastmemit.evaluation.scores import judge_probes, portability
from tiny_editors import tiny_editor

MQUAKE = {
    "case_id": 7,
    "requested_rewrite": [
        {
            "prompt": "{} is located in the country of", "relation_id": "P17", "subject": "Verona",
            "question": "Where is Verona?", "target_new": {"str": "Norway", "id": "Q20"},
            "target_true": {"str": "Italy", "id": "Q38"},
        },
        {
            "prompt": "The capital of {} is", "relation_id": "P36", "subject": "Norway", "question": "Capital?",
            "target_new": {"str": "Turku", "id": "Q1"}, "target_true": {"str": "Oslo", "id": "Q2"},
        },
    ],
    "questions": ["What is the capital of Verona's country?", "Verona's country has which capital?"],
    "answer": "Rome", "answer_alias": ["Roma"], "new_answer": "Turku", "new_answer_alias": ["Åbo", ""],
    "single_hops": [{"question": "?", "cloze": "Verona is in", "answer": "Italy", "answer_alias": []}],
    "new_single_hops": [
        {"question": "?", "cloze": "Verona is in", "answer": "Norway", "answer_alias": ["Norge", "Norway"]},
        {"question": "?", "cloze": "The capital of Norway is", "answer": "Turku", "answer_alias": []},
    ],
}  # fmt: skip


def query(prompt: str, *answers: str, aliases: tuple[str, ...] = ()) -> dict[str, Any]:
    found = [{"value": answer, "aliases": list(aliases)} for answer in answers]
    return {"prompt": prompt, "answers": found, "query_type": "regular", "subject_id": "Q1", "relation": "X"}


def ripple(said: str, former: str | None = None, **tests: Any) -> dict[str, Any]:
    edit = {"prompt": said, "subject_id": "Q1", "relation": "X", "target_id": "Q2"}
    if former is not None:
        edit["original_fact"] = {"prompt": former, "subject_id": "Q1", "relation": "X", "target_id": "Q3"}
    return {"example_type": "popular", "edit": edit, **tests}


RIPPLE = ripple(
    "The name of the country of citizenship of Ada Lovelace is Peru.",
    "The name of the country of citizenship of Ada Lovelace is United Kingdom.",
    Relation_Specificity=[
        {
            "test_queries": [query("The name of the mother of Ada Lovelace is", "Anne", aliases=("Annabella", "Anne"))],
            "test_condition": "OR",
            "condition_queries": [query("The name of the mother of Ada Lovelace is", "Anne")],
        }
    ],
    Logical_Generalization=[
        {
            "test_queries": [query("The first is", "Lima"), query("The second is", "Cusco"), query("The third is")],
            "test_condition": "AND",
            "condition_queries": [],
        }
    ],
    Subject_Aliasing=[{"test_queries": [query("The country of A. Lovelace is", "Peru")], "condition_queries": []}],
    Compositionality_I=[],
)


def write(place: Path, *records: Any) -> Path:
    path = place / "records.json"
    path.write_text(json.dumps(records))
    return path


def test_a_chain_of_mquake_is_edited_together_and_asked_at_its_end_and_hop_by_hop(tmp_path: Path) -> None:
    (record,) = load_records(write(tmp_path, MQUAKE))
    assert (record.case_id, record.relation_id) == (7, "P17")
    facts = [(fact.text, fact.target_new, fact.target_true) for fact in record.requests]
    assert facts == [
        ("Verona is located in the country of", "Norway", "Italy"), ("The capital of Norway is", "Turku", "Oslo"),
    ]  # fmt: skip
    answers = ("Turku", "Åbo")
    assert record.probes == (
        Probe("multi-hop", tuple((question, answers) for question in MQUAKE["questions"])),
        Probe("one hop", (("Verona is in", ("Norway", "Norge")),)),
        Probe("one hop", (("The capital of Norway is", ("Turku",)),)),
    )


def test_an_edit_of_rippleedits_is_read_off_its_sentence_and_tests_keep_their_conditions(tmp_path: Path) -> None:
    (record,) = load_records(write(tmp_path, RIPPLE))
    fact = record.request
    assert (fact.prompt, fact.subject) == ("The name of the country of citizenship of {} is", "Ada Lovelace")
    assert (fact.target_new, fact.target_true, record.case_id) == ("Peru", "United Kingdom", 0)
    mother = ("The name of the mother of Ada Lovelace is", ("Anne", "Annabella"))
    assert record.probes == (
        Probe("logical", (("The first is", ("Lima",)), ("The second is", ("Cusco",))), every=True),
        Probe("alias", (("The country of A. Lovelace is", ("Peru",)),)),
        Probe("specificity", (mother,), conditions=((mother[0], ("Anne",)),)),
    )


@pytest.mark.parametrize(
    ("said", "prompt", "subject", "answer"),
    [
        ("The gender of Ada is male.", "The gender of {} is", "Ada", "male"),
        ("The names of the siblings of Ada are Bo Li.", "The names of the siblings of {} are", "Ada", "Bo Li"),
        ("The name of the currency in Peru is sol.", "The name of the currency in {} is", "Peru", "sol"),
        ("The number of children Ada has is 3.", "The number of children {} has is", "Ada", "3"),
        (
            "The name of the religion which Ada is associated with is Deism.",
            "The name of the religion which {} is associated with is", "Ada", "Deism",
        ),
        ("Dune Messiah follows Dune.", "{} follows", "Dune Messiah", "Dune"),
        ("Dune is followed by Dune Messiah.", "{} is followed by", "Dune", "Dune Messiah"),
    ],
)  # fmt: skip
def test_every_shape_of_sentence_shows_its_subject(
    tmp_path: Path, said: str, prompt: str, subject: str, answer: str
) -> None:
    (record,) = load_records(write(tmp_path, ripple(said)), own=True)
    assert (record.request.prompt, record.request.subject) == (prompt, subject)
    assert (record.request.target_new, record.request.target_true) == (answer, None)


def test_an_alias_tells_where_a_sentence_is_cut_and_without_one_it_is_refused(tmp_path: Path) -> None:
    said = "The name of the director of My Name is Khan is Ang Lee."
    tests = {"Subject_Aliasing": [{"test_queries": [query("The name of the director of MNIK is", "Ang Lee")]}]}
    (record,) = load_records(write(tmp_path, ripple(said, **tests)))
    assert (record.request.subject, record.request.target_new) == ("My Name is Khan", "Ang Lee")
    with pytest.raises(BadData, match="does not show where its subject ends and its answer begins"):
        load_records(write(tmp_path, ripple(said)))


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({**MQUAKE, "requested_rewrite": []}, "requested_rewrite: must be a list of objects, one or more"),
        ({**MQUAKE, "new_answer": None}, "new_answer: is missing"),
        ({**MQUAKE, "new_single_hops": [3]}, r"new_single_hops\[0\]: must be an object, not 3"),
        ({**MQUAKE, "new_answer_alias": "x"}, "new_answer's aliases: must be a list, not 'x'"),
        ({**RIPPLE, "edit": "x"}, "edit: must be an object, not 'x'"),
        ({**RIPPLE, "Forgetfulness": [{"test_queries": [{"answers": [{"value": "a"}]}]}]}, r"\[0\].prompt: is m"),
        ({**RIPPLE, "Forgetfulness": [{"test_queries": [{"prompt": "x", "answers": [1]}]}]}, r"answers\[0\]: must"),
        (ripple("The gender of Ada is male.", "The gender of Bo is female."), "does not begin with 'The gender of Ada"),
    ],
)  # fmt: skip
def test_what_is_malformed_is_named(tmp_path: Path, record: Any, said: str) -> None:
    with pytest.raises(BadData, match=said):
        load_records(write(tmp_path, record))


def test_a_name_is_fetched_once_and_refused_in_a_sentence_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTMEMIT_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("mquake", "rippleedits"):
        with pytest.raises(BadData, match=f"The data '{name}' cannot be fetched from https://.* is set"):
            load_records(name)
    monkeypatch.delenv("HF_HUB_OFFLINE")

    def unreachable(address: str, **_: Any) -> Any:
        raise OSError("Network is unreachable")

    monkeypatch.setattr("fastmemit.data.reading.urlopen", unreachable)
    with pytest.raises(BadData, match=r"\(Network is unreachable\); give its file instead of the name\."):
        load_records("mquake")

    def cut_short(address: str, **_: Any) -> Any:
        raise IncompleteRead(b"", 9)

    monkeypatch.setattr("fastmemit.data.reading.urlopen", cut_short)
    with pytest.raises(BadData, match=r"\(IncompleteRead\(0 bytes read, 9 more expected\)\); give its file"):
        load_records("mquake")
    asked = []

    def answer(address: str, **_: Any) -> Any:
        asked.append(address)
        return io.BytesIO(json.dumps([MQUAKE]).encode())

    monkeypatch.setattr("fastmemit.data.reading.urlopen", answer)
    assert [len(load_records("mquake")[0].requests) for _ in range(2)] == [2, 2]
    assert len(named_requests("mquake")) == 2  # as `edit` and `stats plan` read the name
    assert asked == [ADDRESSES["mquake"]]  # the second time from the cache
    monkeypatch.setattr("fastmemit.data.reading.MAX_WHOLE_FILE", 10)
    with pytest.raises(BadData, match="larger than 10 bytes"):
        downloaded("zsre", "https://x", BadData)


def test_questions_count_where_their_conditions_hold_and_any_name_of_an_answer_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judged(_adapter: Any, _tokenizer: Any, questions: Any) -> list[Answer]:
        return [Answer(0.0, (True, question == ("The piano is in", " tune"))) for question in questions]

    monkeypatch.setattr("fastmemit.evaluation.scores.judge_answers", judged)
    (record,) = load_records(write(tmp_path, RIPPLE))
    right, wrong = ("The piano is in", ("nowhere", "tune")), ("The piano is in", ("nowhere",))
    probes = (
        Probe("alias", (right,)), Probe("alias", (wrong,)), Probe("logical", (wrong, right)),
        Probe("logical", (wrong, right), every=True), Probe("specificity", (right,), conditions=(wrong,)),
        Probe("specificity", (right,), conditions=(right,)),
    )  # fmt: skip
    records = [type(record)(1, record.request, probes=probes), type(record)(2, record.request)]
    model: Any = (None, None)
    (answered, nothing) = judge_probes(*model, records)
    assert answered == (True, False, True, False, True, True) and nothing == ()
    (counted, _) = judge_probes(*model, records, conditions=True)
    assert counted == (True, True, True, True, False, True)
    none = (False,) * 6
    assert portability(records, [counted, ()], [none, ()], [answered, ()]) == {
        "alias": {"questions": 2, "counted": 2, "before": 0.0, "after": 50.0},
        "logical": {"questions": 2, "counted": 2, "before": 0.0, "after": 50.0},
        "specificity": {"questions": 2, "counted": 1, "before": 0.0, "after": 100.0},
    }
    assert portability(records[1:], [()], [()], [()]) == {}
    assert portability(records[:1], [none], [none], [answered])["alias"]["after"] is None


def test_an_evaluation_edits_the_whole_chain_and_says_what_follows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    editor = tiny_editor(tmp_path)
    records = load_records(write(tmp_path, MQUAKE))
    made: list[int] = []
    edit = editor.edit

    def counted(facts: Any, *more: Any, **settings: Any) -> Any:
        made.append(len(facts))
        return edit(facts, *more, **settings)

    editor.edit = counted  # type: ignore[method-assign]  # of this editor alone
    found = evaluate(editor, [records], "memit", {"layers": (0, 1), "steps": 3})
    assert made == [2] and [row["questions"] for row in found["portability"].values()] == [1, 2]


def test_an_experiment_refuses_what_it_would_not_ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["experiment", "sweep", "--model", "none", "--facts", str(write(tmp_path, MQUAKE)), "--corpus", "builtin"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert "asks what follows from its edits, which experiments do not" in capsys.readouterr().err
