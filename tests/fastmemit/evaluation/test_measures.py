"""Which measures are taken of which records, and their table."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fastmemit.data import Record, ZsreRecord
from fastmemit.editor import Editor
from fastmemit.errors import BadConfig, BadData
from fastmemit.evaluation import References, evaluate, generate_records, judge_zsre, score_records
from fastmemit.evaluation.generation import summarise_generation
from fastmemit.evaluation.runner import METRICS, Measured, Measures, table
from fastmemit.evaluation.scores import summarise
from fastmemit.request import EditRequest
from tiny_editors import FACTS, QUICK, record, tiny_editor

FULL = [
    dataclasses.replace(
        record(number, fact), attributes=("The piano is in",), generations=("I play",),
        relation_id="P1",
    )
    for number, fact in enumerate(FACTS)
]  # fmt: skip
ZSRE = [
    ZsreRecord(
        0,
        EditRequest("Where is {}?", "Eiffel Tower", "Rome"),
        ("Where would you see Eiffel Tower?",),
        ("nq question: where is the piano?",),
        neighbourhood_answers=("London",),
    )
]


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory) -> Editor:
    return tiny_editor(tmp_path_factory.mktemp("editor"))


def test_scores_and_what_is_asked_besides(editor: Editor) -> None:
    measures = Measures.of(METRICS)
    measures.check(FULL)
    found = measures.take(editor, FULL, "scores", False)
    scores = score_records(editor.adapter, editor.tokenizer, FULL, attributes=True)
    written = generate_records(editor.model, editor.tokenizer, FULL, seed=editor.seed)
    assert [one.answers for one in found] == scores
    assert [one.written for one in found] == written
    assert table(found) == {**summarise(scores), **summarise_generation(written)}
    row = found[0].shown()
    assert row["generation"] == written[0].as_dict() and "case_id" not in row
    assert row["as"] == scores[0].shares()["as"]


def test_nothing_more_is_asked_by_default(editor: Editor) -> None:
    found = Measures.of(("score", "magnitude", "accuracy")).take(editor, FULL, "scores", False)
    assert all(one.written is None and one.answers.attributes == () for one in found)  # type: ignore[union-attr]  # CounterFact's answers have them
    assert "ge" not in table(found) and table(found)["as"] is None
    assert found == Measures.of(()).take(editor, FULL, "scores", False)


def test_zsre_has_its_accuracies(editor: Editor) -> None:
    result = evaluate(editor, [ZSRE], "memit", {**QUICK, "steps": 20, "clamp": 4.0})
    assert result["before"].keys() == {"ea", "pa", "na", "a", "ew", "pw", "nw"}
    judged = judge_zsre(editor.adapter, editor.tokenizer, ZSRE)
    assert result["before"] == summarise(judged)
    assert result["records"][0]["before"] == judged[0].shares()


def test_an_evaluation_with_all_of_it(editor: Editor, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    texts = {("P1", fact.target_new): ["The piano is in the city."] for fact in FACTS}
    result = evaluate(editor, [FULL], "memit", QUICK, metrics=METRICS, references=References(texts))
    for when in (result["before"], result["after"]):
        assert when["ge"] is not None and when["rs"] is not None and when["as"] is not None
    assert len(result["records"][0]["after"]["generation"]["texts"]) == 1
    assert result["settings"]["metrics"] == list(METRICS)


def test_unknown_names_and_lonely_references() -> None:
    with pytest.raises(BadConfig, match="no metric 'fluency'; choose from score, magnitude"):
        Measures.of(["score", "fluency"])
    pytest.importorskip("sklearn")
    with pytest.raises(BadConfig, match="ask for the metric generation too"):
        Measures.of(["score"], References({("P1", "Rome"): ["word"]}))


def test_records_that_lack_what_is_asked() -> None:
    bare = [Record(5, FACTS[0])]
    with pytest.raises(BadData, match="No record has attribute_prompts"):
        Measures.of(["attributes"]).check(bare)
    Measures.of(["attributes"]).check([*bare, *FULL])
    with pytest.raises(BadData, match="Record 5 has no generation_prompts"):
        Measures.of(["generation"]).check([*FULL, *bare])
    with pytest.raises(BadData, match="1 of 4 records are zsRE's"):
        Measures.of(["score"]).check([*FULL, *ZSRE])
    for name in ("attributes", "generation"):
        with pytest.raises(BadData, match="zsRE has neither"):
            Measures.of([name]).check(ZSRE)


def test_references_are_checked_before_any_work(editor: Editor) -> None:
    pytest.importorskip("sklearn")
    with pytest.raises(BadData, match="The references have no text for 3 of the records"):
        evaluate(
            editor, [FULL], "memit", QUICK, metrics=["generation"],
            references=References({("P9", "Rome"): ["word"]}),
        )  # fmt: skip


def test_measured_without_texts_shows_none() -> None:
    from fastmemit.evaluation.scores import accuracy_record

    assert Measured(accuracy_record(1, [True])).shown() == {
        **{"ea": 1.0, "pa": None, "na": None},
        **{"ew": 1.0, "pw": None, "nw": None},
    }
