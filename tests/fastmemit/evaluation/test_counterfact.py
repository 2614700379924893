"""CounterFact's questions: which prompts are asked with which answers, and what they count for."""

from __future__ import annotations

import pytest

from fastmemit.data import Record
from fastmemit.errors import BadData
from fastmemit.evaluation import counterfact as module
from fastmemit.evaluation import score_records
from fastmemit.evaluation.counterfact import count_questions
from fastmemit.evaluation.nll import answer_nlls
from fastmemit.models import find_adapter
from fastmemit.request import EditRequest
from tiny_editors import FACTS, record
from tiny_models import tiny_model, tiny_tokenizer

FULL = record(7, FACTS[0])
BARE = Record(9, FACTS[1])
RECORDS = [FULL, BARE, record(8, FACTS[2])]


def test_each_prompt_is_asked_with_both_answers_in_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    costs = {"Rome": 1.0, "Paris": 2.0}  # the new answer is always the cheaper one

    def fake(adapter: object, tokenizer: object, questions: list, **_: object) -> list[float]:
        prompts = [FULL.request.text, *FULL.paraphrases, *FULL.neighbourhood]
        assert questions == [(p, a) for p in prompts for a in (" Rome", " Paris")]
        return [costs[answer.strip()] for _, answer in questions]

    monkeypatch.setattr(module, "answer_nlls", fake)
    (score,) = score_records(None, None, [FULL])  # type: ignore[arg-type]
    assert (score.case_id, score.es, score.ps, score.ns) == (7, 1.0, 1.0, 0.0)
    costs.update(Rome=3.0)
    (score,) = score_records(None, None, [FULL])  # type: ignore[arg-type]
    assert (score.es, score.ps, score.ns) == (0.0, 0.0, 1.0)
    assert score.rewrite == (3.0, 2.0) and len(score.paraphrases) == 2
    assert len(score.neighbourhood) == 3


def test_scores_are_those_of_the_costs() -> None:
    adapter, tokenizer = find_adapter(tiny_model("llama")), tiny_tokenizer("bpe_bos")
    done: list[int] = []
    scores = score_records(adapter, tokenizer, RECORDS, batch_tokens=100, progress=done.append)
    assert sum(done) == count_questions(RECORDS) == 2 * (6 + 1 + 6)
    for score, asked in zip(scores, RECORDS, strict=True):

        def pairs(prompts: tuple[str, ...], request: EditRequest) -> list[tuple[float, float]]:
            both = (request.target, f" {request.target_true}")
            return [
                tuple(answer_nlls(adapter, tokenizer, [(p, a)])[0] for a in both) for p in prompts
            ]

        assert score.case_id == asked.case_id
        ((new, true),) = pairs((asked.request.text,), asked.request)
        assert score.es == float(new < true)
        assert score.rewrite == pytest.approx((new, true), abs=1e-5)
        said = pairs(asked.paraphrases, asked.request)
        near = pairs(asked.neighbourhood, asked.request)
        if asked is BARE:
            assert score.ps is None and score.ns is None
            continue
        assert score.ps == sum(new < true for new, true in said) / 2
        assert score.ns == sum(true < new for new, true in near) / 3


def test_a_record_without_a_true_answer() -> None:
    lacking = Record(41, EditRequest("{} is", "x", "y"))
    with pytest.raises(BadData, match=r"Record 41 has no target_true.*add it"):
        score_records(None, None, [lacking])  # type: ignore[arg-type]


def test_no_records() -> None:
    assert score_records(find_adapter(tiny_model("llama")), tiny_tokenizer(), []) == []
