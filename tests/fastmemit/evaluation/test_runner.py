"""An evaluation: batch by batch on the unedited model, weights given back, one honest result."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import sys
import typing
from typing import Any

import pytest
import torch

from fastmemit.data import Record
from fastmemit.editor import Editor
from fastmemit.errors import BadData, BadRequest, FastmemitError, WrongModel
from fastmemit.evaluation import evaluate, judge_answers, measure_answers, runner, score_records
from fastmemit.evaluation.runner import RecordResult, Result
from fastmemit.evaluation.scores import ALL, summarise
from fastmemit.statistics import versions
from fastmemit.text import encode
from tiny_editors import FACTS, QUICK, optimised, record, tiny_editor

BATCHES = [[record(10, FACTS[0]), record(11, FACTS[1])], [record(12, FACTS[2])]]


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory) -> Editor:
    return tiny_editor(tmp_path_factory.mktemp("editor"), name="tiny")


@pytest.fixture(scope="module")
def weights(editor: Editor) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in editor.model.state_dict().items()}


@pytest.fixture(autouse=True)
def _restored(editor: Editor, weights: dict[str, torch.Tensor]) -> Any:
    yield
    assert editor.edits == ()
    now = editor.model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in weights.items())


@pytest.fixture(scope="module")
def result(editor: Editor, weights: dict[str, torch.Tensor]) -> Result:
    return evaluate(editor, BATCHES, "memit", {**QUICK, "steps": 20, "clamp": 4.0})


def test_it_has_the_fields_of_the_schema(result: Result) -> None:
    names = "before after records portability perplexity settings seconds versions"
    assert list(result) == names.split()
    assert all(f"``{name}``" in str(Result.__doc__) for name in result)
    for table in (result["before"], result["after"]):
        assert table.keys() == set(ALL)
    for row in result["records"]:
        assert row.keys() == typing.get_type_hints(RecordResult).keys()
        for scores in (row["before"], row["after"]):
            assert scores.keys() == (result["before"].keys() | {"nll"}) - {"s"}
            assert scores["nll"].keys() == {"rewrite", "paraphrases", "neighbourhood", "attributes"}
    assert [(row["case_id"], row["batch"]) for row in result["records"]] == [(10, 0), (11, 0), (12, 1)]


def test_it_is_json_without_nan(result: Result) -> None:
    read = json.loads(json.dumps(result, allow_nan=False))
    assert read["records"] == result["records"]
    assert (read["before"], read["after"]) == (result["before"], result["after"])


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_totals_are_the_means_of_the_records(result: Result, when: str) -> None:
    total: Any = result[when]  # type: ignore[literal-required]  # `when` is before or after
    for name in ("es", "ps", "ns"):
        shares = [row[when][name] for row in result["records"]]  # type: ignore[literal-required]  # `when` is before or after
        assert total[name] == pytest.approx(100 * sum(shares) / 3)
    values = [total[name] for name in ("es", "ps", "ns")]
    mean = 0 if 0 in values else 3 / sum(1 / value for value in values)
    assert total["s"] == pytest.approx(mean)


def test_before_is_the_unedited_model_and_after_the_edited_one(editor: Editor, result: Result) -> None:
    def shown(batch: list) -> list[dict[str, Any]]:
        scores = score_records(editor.adapter, editor.tokenizer, batch)
        return [{k: v for k, v in s.as_dict().items() if k != "case_id"} for s in scores]

    def costs(rows: list[Any]) -> list[float]:
        return [cost for row in rows for cost in row["nll"]["rewrite"]]

    before = [row for batch in BATCHES for row in shown(batch)]
    assert costs([r["before"] for r in result["records"]]) == pytest.approx(costs(before), abs=1e-5)
    after = []
    for batch in BATCHES:
        edit = editor.edit([r.request for r in batch], "memit", **{**QUICK, "steps": 20, "clamp": 4.0})
        after += shown(batch)
        edit.undo()
    assert costs([r["after"] for r in result["records"]]) == pytest.approx(costs(after), abs=1e-5)
    # The edit does something: the new answers are cheaper than they were.
    new = [(r["before"]["nll"]["rewrite"][0], r["after"]["nll"]["rewrite"][0]) for r in result["records"]]
    assert all(after < before for before, after in new)


def test_settings_say_what_was_done(editor: Editor, result: Result) -> None:
    settings = result["settings"]
    assert settings["method"] == "memit" and tuple(settings["layers"]) == (0, 1)
    assert settings["steps"] == 20 and settings["batches"] == [2, 1]
    assert settings["relative_ridge"] == 0.0  # what it came to with four widths
    assert settings["model"] == "tiny" and settings["fingerprint"] == editor.fingerprint
    assert (settings["dtype"], settings["device"], settings["seed"]) == ("float32", "cpu", 0)
    assert settings["statistics"]["multiplier"] == 4.0
    assert settings["statistics"]["corpus"]["name"] == "tiny0"
    assert result["versions"] == versions()
    assert result["seconds"].keys() == {"before", "targets", "edit", "after", "undo"}
    assert all(seconds >= 0 for seconds in result["seconds"].values())


def test_perplexity_is_measured_before_and_after_the_first_batches(
    editor: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastmemit.evaluation import perplexity as module
    from fastmemit.evaluation.perplexity import PerplexityText, perplexity

    text = PerplexityText("text", "0" * 64, tuple(range(20, 60)))
    unedited = perplexity(editor.adapter, text)
    costs = []
    for batch in BATCHES:
        edit = editor.edit([r.request for r in batch], "memit", **QUICK)
        costs.append(perplexity(editor.adapter, text).nll)
        edit.undo()
    found = evaluate(editor, BATCHES, "memit", QUICK, text=text, perplexity_batches=2)
    assert found["perplexity"] == {
        "before": pytest.approx(unedited.perplexity),
        "after": pytest.approx(math.exp(sum(costs) / 2)),
        "batches": 2,
        "tokens": unedited.tokens,
    }
    assert found["settings"]["text"] == {"name": "text", "sha256": "0" * 64, "tokens": 40}
    one = evaluate(editor, BATCHES, "memit", QUICK, text=text)["perplexity"]
    assert one is not None and one["batches"] == 1
    assert one["after"] == pytest.approx(math.exp(costs[0]))
    # A model that an edit has broken has no finite perplexity, and the evaluation goes on.
    real = module.perplexity

    def broken(adapter: Any, *args: Any, **kwargs: Any) -> Any:
        if editor.edits:
            raise FastmemitError("The model's logits are not finite.")
        return real(adapter, *args, **kwargs)

    monkeypatch.setattr(module, "perplexity", broken)
    last = evaluate(editor, BATCHES, "memit", QUICK, text=text)["perplexity"]
    assert last is not None and last["after"] == math.inf and last["before"] == one["before"]


def test_targets_are_optimised_once_for_all_batches(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = optimised(monkeypatch)
    evaluate(editor, BATCHES, "emmet", {"layers": (1,), "steps": 2})
    assert sizes == [3]
    evaluate(editor, [[r] for batch in BATCHES for r in batch], "emmet", {"layers": (1,), "steps": 2})
    assert sizes == [3]


def test_an_edited_model_is_refused(editor: Editor) -> None:
    edit = editor.edit([FACTS[0]], "rome", layers=(1,), steps=1)
    with pytest.raises(WrongModel, match="edited already; undo its edits"):
        evaluate(editor, BATCHES, "memit", QUICK)
    edit.undo()


def test_an_error_while_scoring_gives_the_weights_back(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = runner.score_records

    def fails_later(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(editor.edits))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(runner, "score_records", fails_later)
    with pytest.raises(KeyboardInterrupt):
        evaluate(editor, BATCHES, "memit", QUICK)
    assert calls == [0, 1, 1]  # `_restored` looks at the weights


def test_a_batch_that_contradicts_itself(editor: Editor) -> None:
    twice = [record(1, FACTS[0]), record(2, FACTS[0])]
    with pytest.raises(BadRequest, match="Requests 0 and 1"):
        evaluate(editor, [twice], "memit", QUICK)


def test_records_without_other_prompts_have_no_other_scores(editor: Editor) -> None:
    from fastmemit.data import Record

    found = evaluate(editor, [[Record(1, FACTS[0])]], "rome", {"layers": (1,), "steps": 1})
    assert found["before"]["ps"] is None and found["after"]["s"] is None
    assert found["after"]["es"] in (0.0, 100.0)
    json.dumps(found, allow_nan=False)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("progress", [True, False])
def test_bars_are_drawn_on_a_terminal_and_if_asked(
    editor: Editor, monkeypatch: pytest.MonkeyPatch, progress: bool
) -> None:
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        evaluate(editor, BATCHES, "memit", QUICK, progress=progress)
        drawn = stream.getvalue()
        if progress and stream.isatty():
            assert "unedited scores" in drawn and "edited batches" in drawn
        else:
            assert drawn == ""


def test_summarise_is_what_the_totals_are(editor: Editor, result: Result) -> None:
    scores = score_records(editor.adapter, editor.tokenizer, [r for b in BATCHES for r in b])
    assert summarise(scores) == pytest.approx(result["before"])


def test_open_answers_are_what_the_unedited_model_says(editor: Editor) -> None:
    fact = dataclasses.replace(FACTS[1], target_true=None)
    own = Record(4, fact, neighbourhood=("The piano is in", "I play"), neighbourhood_answers=(None, "the violin"))
    (found,) = measure_answers(editor, [own])
    length = len(encode(editor.tokenizer, " Berlin")) + 4
    texts = editor.generate([fact.text, "The piano is in"], length)
    said = [runner.first_words(text, fact.target_new) for text in texts]
    assert found.request.target_true == said[0] and len(said[0].split()) == 1
    assert found.neighbourhood_answers == (said[1], "the violin")
    # Each neighbour keeps its own answer: NA is whether the model says it, before an edit always.
    result = evaluate(editor, [[found]], "memit", QUICK)
    nll = result["records"][0]["before"]["nll"]
    questions = [("The piano is in", f" {said[1]}"), ("I play", " the violin")]
    own = judge_answers(editor.adapter, editor.tokenizer, questions)
    assert [true for _, true in nll["neighbourhood"]] == pytest.approx([answer.nll for answer in own], abs=1e-4)
    with pytest.raises(BadData, match="Record 4 has no true answer to 'The capital of France is'"):
        score_records(editor.adapter, editor.tokenizer, [Record(4, fact)])


def test_an_answer_that_no_score_could_compare_is_named(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    fact = dataclasses.replace(FACTS[1], target_true=None)
    for says, message in (
        (" berlin, which", "The model says 'berlin' to 'The capital of France is' of record 4 already, unedited"),
        (" ... ", "The model says no word to 'The capital of France is' of record 4"),
    ):
        monkeypatch.setattr(editor, "generate", lambda prompts, _, says=says: [says] * len(prompts))
        with pytest.raises(BadData, match=message):
            measure_answers(editor, [Record(4, fact)])


@pytest.mark.parametrize(
    ("text", "like", "answer"),
    [
        (" Herman Melville, who was", "Jane Austen", "Herman Melville"),
        ("\n\n Paris.\nIt is", "Rome", "Paris"),
        (" “Moby-Dick”, a", "x", "Moby-Dick"),
        (" C++ and", "Python", "C++"),
        (" 50%.", "x", "50%"),
        ("パリです", "ローマ", "パリで"),
        (" ... ", "x", ""),
        ("", "x", ""),
    ],
)
def test_an_answer_is_as_many_words_as_another_one(text: str, like: str, answer: str) -> None:
    assert runner.first_words(text, like) == answer
