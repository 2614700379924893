"""zsRE's questions: what is asked, and what the model finds, one question at a time beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastmemit.answers import Answer
from fastmemit.data import ZsreRecord
from fastmemit.evaluation import judge_zsre
from fastmemit.evaluation import scores as module
from fastmemit.evaluation.scores import count_questions
from fastmemit.models import find_adapter
from fastmemit.request import EditRequest
from fastmemit.text import encode_with_target
from tiny_models import tiny_model, tiny_tokenizer

RECORDS = [
    ZsreRecord(
        4,
        EditRequest("In which city is {}?", "Eiffel Tower", "the city of Rome"),
        paraphrases=("What city has the Eiffel Tower?",),
        neighbourhood=("nq question: where is the violin?",),
        neighbourhood_answers=("London, in the west",),
    ),
    ZsreRecord(5, EditRequest("Who is {}?", "the poet", "French")),
]


def test_each_question_is_asked_with_its_own_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(True, False), (True, True), (False, False, True), (True,)]

    def fake(adapter: object, tokenizer: object, questions: list, **_: object) -> list[Answer]:
        assert questions == [
            ("In which city is Eiffel Tower?", " the city of Rome"),
            ("What city has the Eiffel Tower?", " the city of Rome"),
            ("nq question: where is the violin?", " London, in the west"),
            ("Who is the poet?", " French"),
        ]
        return [Answer(1.0, matches) for matches in found]

    monkeypatch.setattr(module, "judge_answers", fake)
    first, second = judge_zsre(None, None, RECORDS)  # type: ignore[arg-type]  # the answers are made up, no model is asked
    assert (first.case_id, first.ea, first.pa) == (4, 0.5, 1.0)
    assert first.na == pytest.approx(1 / 3)
    assert (second.case_id, second.ea, second.pa, second.na) == (5, 1.0, None, None)


def literal(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """Share of the answer's tokens that are the argmax of a forward that ends before them."""
    encoded, n = encode_with_target(tokenizer, prompt, answer)
    correct = 0
    for place in range(len(encoded) - n, len(encoded)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([encoded.ids[:place]])).logits[0, -1]
        correct += int(logits.argmax()) == encoded.ids[place]
    return correct / n


def test_it_is_the_accuracy_token_by_token() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama")
    the = tokenizer(" the").input_ids[0]

    def says_the(_module: Any, _args: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits + 1000 * torch.nn.functional.one_hot(torch.tensor(the), logits.shape[-1])

    model.lm_head.register_forward_hook(says_the)  # so that some tokens are found
    done: list[int] = []
    adapter = find_adapter(model)
    found = judge_zsre(adapter, tokenizer, RECORDS, batch_tokens=30, progress=done.append)
    assert sum(done) == count_questions(RECORDS) == 4
    for got, record in zip(found, RECORDS, strict=True):
        target = record.request.target
        assert got.ea == pytest.approx(literal(model, tokenizer, record.request.text, target))
        if record.paraphrases:
            assert got.pa == pytest.approx(literal(model, tokenizer, record.paraphrases[0], target))
            unrelated = (record.neighbourhood[0], " " + record.neighbourhood_answers[0])
            assert got.na == pytest.approx(literal(model, tokenizer, *unrelated))
    assert 0 < found[0].ea < 1 and 0 < found[0].na < 1
