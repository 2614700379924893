"""The real harness on the model in memory: its scores are those of the weights as they are."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval")

from fastmemit.errors import BadConfig
from fastmemit.evaluation.downstream import evaluate_tasks, find_tasks
from tiny_editors import FACTS, tiny_editor
from tiny_models import tiny_model, tiny_tokenizer
from tiny_tasks import QUESTIONS, task_folder


def literal_accuracy(model: Any, tokenizer: Any, questions: Any) -> float:
    """How often the right choice has the highest summed log-probability after its question."""
    right = 0
    for question, choices, answer in questions:
        begin = tokenizer(question)["input_ids"]
        sums = []
        for choice in choices:
            ids = tokenizer(f"{question} {choice}")["input_ids"]
            assert ids[: len(begin)] == begin
            with torch.no_grad():
                logp = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            sums.append(sum(float(logp[i - 1, ids[i]]) for i in range(len(begin), len(ids))))
        right += max(range(len(sums)), key=sums.__getitem__) == answer
    return right / len(questions)


def test_scores_are_the_literal_ones_and_follow_the_weights(tmp_path: Path) -> None:
    editor = tiny_editor(tmp_path / "cache")
    tasks = find_tasks(["tiny_facts"], include_path=task_folder(tmp_path))

    edited = QUESTIONS[: len(FACTS)]

    def accuracy() -> float:
        found = evaluate_tasks(editor, None, tasks, limit=len(edited))
        return found["scores"]["tiny_facts"]["acc"]

    def literal() -> float:
        return literal_accuracy(editor.model, editor.tokenizer, edited)

    before = accuracy()
    assert before == literal()
    edit = editor.edit(FACTS, "memit", layers=(0, 1), steps=25, clamp=4)
    after = accuracy()
    assert after == literal() > before
    edit.undo()
    assert accuracy() == before


def test_what_is_returned(tmp_path: Path) -> None:
    found = evaluate_tasks(
        tiny_model("gpt2"),
        tiny_tokenizer(),
        ["tiny_facts"],
        limit=4,
        num_fewshot=1,
        include_path=task_folder(tmp_path),
        batch_size=2,
    )
    assert found["scores"].keys() == {"tiny_facts"}
    assert found["scores"]["tiny_facts"].keys() == {"acc", "acc_stderr"}
    assert found["samples"] == {"tiny_facts": 4} and found["limit"] == 4
    assert found["num_fewshot"] == {"tiny_facts": 1}
    assert found["task_versions"] == {"tiny_facts": 1.0} and found["lm_eval"].startswith("0.4.")


def test_nothing_else_is_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = tiny_model("llama").train(), tiny_tokenizer("bpe_bos")
    model.model.layers[1].eval()
    modes = [part.training for part in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    side = tokenizer.padding_side
    evaluate_tasks(model, tokenizer, ["tiny_facts"], include_path=task_folder(tmp_path))
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert random.getstate() == states[0] and (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])
    assert tokenizer.padding_side == side
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"limit": 0}, "limit must be 1 question or more but is 0"),
        ({"num_fewshot": -1}, "num_fewshot must be 0 or more but is -1"),
        ({"batch_size": 0}, "batch size must be 1 or more, or auto, but is 0"),
        ({"batch_size": "many"}, "but is 'many'"),
        ({"tokenizer": None}, "A model without its tokenizer"),
        ({"tasks": "tiny_facts"}, "list of names, not the text 'tiny_facts'"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], says: str) -> None:
    given = {"tokenizer": tiny_tokenizer(), "tasks": ["tiny_facts"], **settings}
    with pytest.raises(BadConfig, match=says):
        evaluate_tasks(tiny_model("llama"), **given)
