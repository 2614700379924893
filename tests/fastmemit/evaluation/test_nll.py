"""What answers cost, against one sequence at a time with all its logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastmemit.errors import BadRequest
from fastmemit.evaluation import answer_nlls
from fastmemit.models import find_adapter
from fastmemit.tokens import encode_with_target
from tiny_models import tiny_model, tiny_tokenizer

QUESTIONS = [
    ("The Eiffel Tower is located in the city of", " Paris"),
    ("The Eiffel Tower is located in the city of", " Berlin, in the west"),  # several tokens
    ("I", " play"),
    ("The mother tongue of the poet is", " Українська 🙂"),
    ("The capital of France is", " Paris"),
    ("The capital of France is", " Rome"),
    ("The capital of France is", " Paris"),  # asked twice
    ("A language that is spoken by many people is English. The capital of Italy is", " Rome"),
    ("x", " a"),
]


def literal(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """Mean -log p of the answer's tokens, from the logits of the whole text."""
    encoded, n = encode_with_target(tokenizer, prompt, answer)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([encoded.ids])).logits[0].double()
    logp = logits.log_softmax(-1)
    places = range(len(encoded) - n, len(encoded))
    return -sum(float(logp[i - 1, encoded.ids[i]]) for i in places) / n


@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("llama", "bpe_bos"), ("gpt2", "byte_bpe"), ("gemma2", "metaspace"), ("opt", "adds_eos")],
)
def test_it_is_the_literal_cost(architecture: str, kind: str, batch_tokens: int) -> None:
    model, tokenizer = tiny_model(architecture), tiny_tokenizer(kind)
    got = answer_nlls(find_adapter(model), tokenizer, QUESTIONS, batch_tokens=batch_tokens)
    want = [literal(model, tokenizer, *question) for question in QUESTIONS]
    assert got == pytest.approx(want, abs=1e-5)
    assert got[4] == got[6] and got[4] != got[5]


def test_the_answers_are_of_several_tokens_and_lengths() -> None:
    counts = {encode_with_target(tiny_tokenizer(), *question)[1] for question in QUESTIONS}
    assert len(counts) > 2 and max(counts) > 10


def test_a_hand_made_model() -> None:
    """Token t is followed by t + 1 with logit ln 3 and by the other 639 with logit 0."""

    class Counting(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            hidden = torch.nn.functional.one_hot(input_ids, 640).float()
            return type("Out", (), {"logits": self.head(hidden)})

        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(640, 640, bias=False)
            self.head.weight.data = torch.eye(640).roll(1, 0) * torch.tensor(3.0).log()

    class Adapter:
        model = Counting()
        lm_head = model.head
        device = torch.device("cpu")

    tokenizer = tiny_tokenizer()
    encoded, n = encode_with_target(tokenizer, "I play", " the piano")
    steps = list(zip(encoded.ids[-n - 1 : -1], encoded.ids[-n:], strict=True))
    costs = [torch.tensor(642.0).log() - (b == a + 1) * torch.tensor(3.0).log() for a, b in steps]
    (got,) = answer_nlls(Adapter(), tokenizer, [("I play", " the piano")])  # type: ignore[arg-type]
    assert got == pytest.approx(float(sum(costs)) / n, abs=1e-5)


def test_equal_sequences_run_once_and_batches_keep_to_their_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    shapes: list[tuple[int, int]] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    # One token each, so both are read from one run of the prompt.
    answers = [
        a for a in (" Paris", " the", " is", " in", " of") if len(tokenizer(a).input_ids) == 1
    ]
    assert len(answers) >= 3
    got = answer_nlls(find_adapter(model), tokenizer, [("I play", a) for a in answers] * 2)
    assert len(shapes) == 1 and shapes[0][0] == 1
    assert got[: len(answers)] == got[len(answers) :] and len(set(got)) == len(answers)
    shapes.clear()
    answer_nlls(find_adapter(model), tokenizer, QUESTIONS, batch_tokens=60)
    assert all(rows == 1 or rows * length <= 60 for rows, length in shapes)
    assert len(shapes) > 2 and sum(rows for rows, _ in shapes) <= len(QUESTIONS)


def test_only_the_logits_that_are_read_are_computed() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    seen: list[tuple[int, ...]] = []
    model.lm_head.register_forward_hook(lambda _, args, out: seen.append(tuple(out.shape)))
    answer_nlls(find_adapter(model), tokenizer, QUESTIONS)
    positions = set()  # (what is run, where it is read): one each, however many answers share it
    for question in QUESTIONS:
        encoded, n = encode_with_target(tokenizer, *question)
        positions |= {(encoded.ids[:-1], len(encoded) - n + i) for i in range(n)}
    assert sum(shape[1] for shape in seen) == len(positions)


def test_progress_counts_questions_and_the_mode_is_kept() -> None:
    model = tiny_model("gpt2").train()
    done: list[int] = []
    got = answer_nlls(
        find_adapter(model), tiny_tokenizer(), QUESTIONS, batch_tokens=40, progress=done.append
    )
    assert sum(done) == len(QUESTIONS) and len(done) > 1
    assert model.training
    assert got == answer_nlls(
        find_adapter(tiny_model("gpt2")), tiny_tokenizer(), QUESTIONS, batch_tokens=40
    )


def test_nothing_asked() -> None:
    assert answer_nlls(find_adapter(tiny_model("llama")), tiny_tokenizer(), []) == []


def test_an_answer_without_tokens() -> None:
    with pytest.raises(BadRequest, match="target '' yields no token"):
        answer_nlls(find_adapter(tiny_model("llama")), tiny_tokenizer(), [("I play", "")])


def test_a_prompt_without_tokens_before_the_answer() -> None:
    adapter = find_adapter(tiny_model("llama"))
    # With BOS there is something to predict from; without there is nothing.
    (got,) = answer_nlls(adapter, tiny_tokenizer("bpe_bos"), [("", " Paris")])
    model = tiny_model("llama")
    assert got == pytest.approx(literal(model, tiny_tokenizer("bpe_bos"), "", " Paris"), abs=1e-5)
    with pytest.raises(BadRequest, match="prompt ''"):
        answer_nlls(adapter, tiny_tokenizer(), [("", " Paris"), ("I play", " the")])


def test_an_error_leaves_no_hook_and_the_mode_as_it_was() -> None:
    model = tiny_model("llama").train()
    model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        answer_nlls(find_adapter(model), tiny_tokenizer(), QUESTIONS)
    assert model.training and not model.lm_head._forward_pre_hooks
