"""CounterFact's questions: which prompts are asked with which answers, and what they count for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from fastmemit.answers import Answer, judge_answers
from fastmemit.data import Record
from fastmemit.errors import BadData
from fastmemit.evaluation import score_records
from fastmemit.evaluation import scores as module
from fastmemit.evaluation.scores import count_questions
from fastmemit.models import find_adapter
from fastmemit.request import EditRequest
from reference.literal_evaluation import literal_costs, literal_record
from tiny_editors import FACTS, record
from tiny_models import tiny_model, tiny_tokenizer

FULL = record(7, FACTS[0])
BARE = Record(9, FACTS[1])
RECORDS = [FULL, BARE, record(8, FACTS[2])]


def test_each_prompt_is_asked_with_both_answers_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = {"Rome": 1.0, "Paris": 2.0}  # the new answer is always the cheaper one

    def fake(adapter: object, tokenizer: object, questions: list, **_: object) -> list[Answer]:
        prompts = [FULL.request.text, *FULL.paraphrases, *FULL.neighbourhood]
        assert questions == [(p, a) for p in prompts for a in (" Rome", " Paris")]
        return [Answer(costs[answer.strip()], (answer == " Rome", True)) for _, answer in questions]

    monkeypatch.setattr(module, "judge_answers", fake)
    (score,) = score_records(None, None, [FULL])  # type: ignore[arg-type]  # the answers are made up, no model is asked
    assert (score.case_id, score.es, score.ps, score.ns) == (7, 1.0, 1.0, 0.0)
    # Of the neighbourhood the true answer counts, which is not exact here.
    assert [score.shares()[name] for name in ("ea", "pa", "na")] == [1.0, 1.0, 0.0]
    costs.update(Rome=3.0)
    (score,) = score_records(None, None, [FULL])  # type: ignore[arg-type]  # the answers are made up, no model is asked
    assert (score.es, score.ps, score.ns) == (0.0, 0.0, 1.0)
    assert score.rewrite == (3.0, 2.0, True) and len(score.paraphrases) == 2
    assert len(score.neighbourhood) == 3


@pytest.mark.parametrize(("join", "space"), [(None, ""), ("", ""), (" ", " ")])
def test_an_answer_follows_each_prompt_as_the_request_has_it(
    monkeypatch: pytest.MonkeyPatch, join: str | None, space: str
) -> None:
    request = EditRequest("{}的首都是", "法国", "罗马", "巴黎", join)
    paraphrase, neighbour = "法国的首都叫", "The capital of France is"
    asked = dataclasses.replace(FULL, request=request, paraphrases=(paraphrase,), neighbourhood=(neighbour,))
    found: list[tuple[str, str]] = []

    def fake(adapter: object, tokenizer: object, questions: list, **_: object) -> list[Answer]:
        found.extend(questions)
        return [Answer(1.0, (True,)) for _ in questions]

    monkeypatch.setattr(module, "judge_answers", fake)
    score_records(None, None, [asked])  # type: ignore[arg-type]  # the answers are made up, no model is asked
    after_english = " " if join is None else join  # the rule looks at the prompt's end
    assert [prompt + answer for prompt, answer in found] == [
        f"法国的首都是{space}罗马",
        f"法国的首都是{space}巴黎",
        f"法国的首都叫{space}罗马",
        f"法国的首都叫{space}巴黎",
        f"The capital of France is{after_english}罗马",
        f"The capital of France is{after_english}巴黎",
    ]


def test_scores_are_those_of_the_costs() -> None:
    adapter, tokenizer = find_adapter(tiny_model("llama")), tiny_tokenizer("bpe_bos")
    done: list[int] = []
    scores = score_records(adapter, tokenizer, RECORDS, batch_tokens=100, progress=done.append)
    assert sum(done) == count_questions(RECORDS) == 2 * (6 + 1 + 6)
    for score, asked in zip(scores, RECORDS, strict=True):

        def pairs(prompts: tuple[str, ...], request: EditRequest) -> list[tuple[float, float]]:
            both = (request.target, f" {request.target_true}")
            return [tuple(judge_answers(adapter, tokenizer, [(p, a)])[0].nll for a in both) for p in prompts]

        assert score.case_id == asked.case_id
        ((new, true),) = pairs((asked.request.text,), asked.request)
        assert score.es == float(new < true)
        assert score.rewrite[:2] == pytest.approx((new, true), abs=1e-5)
        said = pairs(asked.paraphrases, asked.request)
        near = pairs(asked.neighbourhood, asked.request)
        if asked is BARE:
            assert score.ps is None and score.ns is None
            continue
        assert score.ps == sum(new < true for new, true in said) / 2
        assert score.ns == sum(true < new for new, true in near) / 3


@pytest.mark.parametrize("kind", ["byte_bpe", "bpe_bos"])
def test_it_is_the_literal_evaluation(kind: str) -> None:
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer(kind)
    scores = score_records(find_adapter(model), tokenizer, RECORDS)
    for score, asked in zip(scores, RECORDS, strict=True):
        rewrite, paraphrases, neighbourhood = literal_record(model, tokenizer, asked)
        mine = [score.rewrite, *score.paraphrases, *score.neighbourhood]
        theirs = [*rewrite, *paraphrases, *neighbourhood]
        assert [cost for pair in mine for cost in pair[:2]] == pytest.approx(
            [cost for pair in theirs for cost, _ in pair], abs=1e-5
        )
        assert [pair.exact for pair in mine] == [
            *(new for (_, new), _ in [*rewrite, *paraphrases]),
            *(true for _, (_, true) in neighbourhood),
        ]


def test_attribute_prompts_are_asked_if_wanted() -> None:
    asked = dataclasses.replace(FULL, attributes=("The capital of Italy is", "The piano is in"))
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    adapter = find_adapter(model)
    (plain,) = score_records(adapter, tokenizer, [asked])
    (score,) = score_records(adapter, tokenizer, [asked], attributes=True)
    assert plain.shares()["as"] is None and plain.attributes == ()
    assert count_questions([asked]) == 12 and count_questions([asked], attributes=True) == 16
    found = literal_costs(model, tokenizer, asked.attributes, [" Rome", " Paris"])
    for pair, (new, true) in zip(score.attributes, found, strict=True):
        assert pair[:2] == pytest.approx((new[0], true[0]), abs=1e-5)
    assert score.shares()["as"] == sum(new[0] < true[0] for new, true in found) / 2
    assert score.rewrite[:2] == pytest.approx(plain.rewrite[:2], abs=1e-5)


@pytest.mark.real
@pytest.mark.slow
def test_real_records_score_as_they_do_literally(data_dir: Path, smollm2: tuple[Any, Any]) -> None:
    from fastmemit.data import load_records

    model, tokenizer = smollm2
    records = load_records(data_dir / "counterfact_1400.json")[:3]
    for score, asked in zip(score_records(find_adapter(model), tokenizer, records), records, strict=True):
        parts = literal_record(model, tokenizer, asked)
        mine = [score.rewrite, *score.paraphrases, *score.neighbourhood]
        theirs = [pair for part in parts for pair in part]
        assert len(mine) == 13
        assert [cost for pair in mine for cost in pair[:2]] == pytest.approx(
            [cost for pair in theirs for cost, _ in pair], abs=1e-4
        )


def test_a_record_without_a_true_answer() -> None:
    lacking = Record(41, EditRequest("{} is", "x", "y"))
    with pytest.raises(BadData, match=r"Record 41 has no true answer to 'x is'.*add it"):
        score_records(None, None, [lacking])  # type: ignore[arg-type]  # the answers are made up, no model is asked


def test_no_records() -> None:
    assert score_records(find_adapter(tiny_model("llama")), tiny_tokenizer(), []) == []
