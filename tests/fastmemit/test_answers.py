"""What answers cost, against one sequence at a time with all its logits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastmemit import answers as module
from fastmemit.answers import judge_answers
from fastmemit.errors import BadRequest, UnknownArchitecture
from fastmemit.models import ModelAdapter, find_adapter
from fastmemit.models.running import Traits
from fastmemit.text import encode_with_target
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


def answer_nlls(*args: Any, **settings: Any) -> list[float]:
    return [answer.nll for answer in judge_answers(*args, **settings)]


def literal(model: Any, tokenizer: Any, prompt: str, answer: str) -> tuple[float, tuple[bool, ...]]:
    """Mean -log p of the answer's tokens and which are the argmax, from the whole text's logits."""
    encoded, n = encode_with_target(tokenizer, prompt, answer)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([encoded.ids])).logits[0].double()
    logp = logits.log_softmax(-1)
    places = range(len(encoded) - n, len(encoded))
    cost = -sum(float(logp[i - 1, encoded.ids[i]]) for i in places) / n
    return cost, tuple(int(logp[i - 1].argmax()) == encoded.ids[i] for i in places)


class Bigrams(torch.nn.Module):
    """The logits after a token are a row of a table, whatever came before it."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.head = torch.nn.Linear(len(table), len(table), bias=False)
        self.head.weight.data = table.T.contiguous()

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        hidden = torch.nn.functional.one_hot(input_ids, 640).float()
        return SimpleNamespace(logits=self.head(hidden))


def bigrams(table: torch.Tensor) -> Any:
    """What `judge_answers` needs to know of such a model."""
    model = Bigrams(table)
    return SimpleNamespace(
        model=model, lm_head=model.head, device=torch.device("cpu"), run=model,
        check_causal=lambda: None, traits=Traits(None, True, "unmasked"),
    )  # fmt: skip


def measured(model: Any) -> ModelAdapter:
    """An adapter that need not run its model to know what it is."""
    adapter = find_adapter(model)
    assert adapter.traits.causal and adapter.traits.right_padding == "unmasked"
    return adapter


@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
@pytest.mark.parametrize(
    ("architecture", "kind"), [("llama", "bpe_bos"), ("gpt2", "byte_bpe"), ("gemma2", "metaspace"), ("opt", "adds_eos")]
)
def test_it_is_the_literal_cost(architecture: str, kind: str, batch_tokens: int) -> None:
    model, tokenizer = tiny_model(architecture), tiny_tokenizer(kind)
    got = answer_nlls(find_adapter(model), tokenizer, QUESTIONS, batch_tokens=batch_tokens)
    want = [literal(model, tokenizer, *question) for question in QUESTIONS]
    assert got == pytest.approx([cost for cost, _ in want], abs=1e-5)
    judged = judge_answers(find_adapter(model), tokenizer, QUESTIONS, batch_tokens=batch_tokens)
    assert [answer.nll for answer in judged] == got
    assert [answer.matches for answer in judged] == [matches for _, matches in want]
    assert got[4] == got[6] and got[4] != got[5]


def test_the_answers_are_of_several_tokens_and_lengths() -> None:
    counts = {encode_with_target(tiny_tokenizer(), *question)[1] for question in QUESTIONS}
    assert len(counts) > 2 and max(counts) > 10


def test_a_hand_made_model() -> None:
    """Token t is followed by t + 1 with logit ln 3 and by the other 639 with logit 0."""

    adapter = bigrams(torch.eye(640).roll(1, 1) * torch.tensor(3.0).log())
    tokenizer = tiny_tokenizer()
    encoded, n = encode_with_target(tokenizer, "I play", " the piano")
    steps = list(zip(encoded.ids[-n - 1 : -1], encoded.ids[-n:], strict=True))
    costs = [torch.tensor(642.0).log() - (b == a + 1) * torch.tensor(3.0).log() for a, b in steps]
    (got,) = answer_nlls(adapter, tokenizer, [("I play", " the piano")])
    assert got == pytest.approx(float(sum(costs)) / n, abs=1e-5)


def test_equal_sequences_run_once_and_batches_keep_to_their_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    shapes: list[tuple[int, int]] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    adapter = measured(model)
    shapes.clear()
    # One token each, so both are read from one run of the prompt.
    answers = [a for a in (" Paris", " the", " is", " in", " of") if len(tokenizer(a).input_ids) == 1]
    assert len(answers) >= 3
    got = answer_nlls(adapter, tokenizer, [("I play", a) for a in answers] * 2)
    assert len(shapes) == 1 and shapes[0][0] == 1
    assert got[: len(answers)] == got[len(answers) :] and len(set(got)) == len(answers)
    shapes.clear()
    answer_nlls(adapter, tokenizer, QUESTIONS, batch_tokens=60)
    assert all(rows == 1 or rows * length <= 60 for rows, length in shapes)
    assert len(shapes) > 2 and sum(rows for rows, _ in shapes) <= len(QUESTIONS)


def test_only_the_logits_that_are_read_are_computed() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    seen: list[tuple[int, ...]] = []
    model.lm_head.register_forward_hook(lambda _, args, out: seen.append(tuple(out.shape)))
    adapter = measured(model)
    seen.clear()
    answer_nlls(adapter, tokenizer, QUESTIONS)
    asked = [encode_with_target(tokenizer, *question) for question in QUESTIONS]
    inputs = [encoded.ids[:-1] for encoded, _ in asked]
    longest = [ids for ids in inputs if all(o == ids or o[: len(ids)] != ids for o in inputs)]
    positions = set()  # (what is run, where it is read): one each, however many answers share it
    for encoded, n in asked:
        ids = encoded.ids[:-1]
        host = next(other for other in longest if other[: len(ids)] == ids)
        positions |= {(host, len(encoded) - n + i) for i in range(n)}
    assert len(positions) < sum(n for _, n in asked)
    assert sum(shape[1] for shape in seen) == len(positions)


@pytest.fixture
def given() -> tuple[ModelAdapter, list[dict[str, Any]]]:
    """A tiny llama and what its forwards are given."""
    model, calls = tiny_model("llama"), []
    model.register_forward_pre_hook(lambda _, args, kwargs: calls.append(dict(kwargs)), with_kwargs=True)
    adapter = measured(model)
    calls.clear()
    return adapter, calls


def test_a_sequence_that_begins_another_is_read_from_it(given: Any) -> None:
    adapter, calls = given
    tokenizer = tiny_tokenizer()
    whole = "I play the violin; you play the piano"
    words = whole.split(" ")
    parts = [(" ".join(words[:i]), " " + words[i]) for i in range(1, len(words))]
    got = judge_answers(adapter, tokenizer, parts)
    assert [call["input_ids"].shape[0] for call in calls] == [1]
    for answer, question in zip(got, parts, strict=True):
        cost, matches = literal(adapter.model, tokenizer, *question)
        assert answer.nll == pytest.approx(cost, abs=1e-5) and answer.matches == matches


def test_hosts_are_the_longest_that_begin_so() -> None:
    rows = [(1,), (1, 2), (1, 2, 3), (1, 3), (2,), (1, 2, 4), (), (2, 10), (2, 1, 0)]
    host = module._hosts(rows)
    assert host.keys() == set(rows)
    for ids, found in host.items():
        assert found[: len(ids)] == ids
        assert not any(o != found and o[: len(found)] == found for o in rows)


def test_rows_are_masked_or_run_alone_where_padding_needs_it(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, calls = given
    plain = answer_nlls(adapter, tiny_tokenizer(), QUESTIONS)
    assert calls and not any("attention_mask" in call for call in calls)
    calls.clear()
    for padding in ("masked", "none"):
        monkeypatch.setattr(ModelAdapter, "traits", Traits(None, True, padding))  # as if it had been measured so
        got = answer_nlls(adapter, tiny_tokenizer(), QUESTIONS)
        assert got == pytest.approx(plain, abs=1e-5)
        masks = [call["attention_mask"] for call in calls]
        assert any(bool((mask == 0).any()) for mask in masks) == (padding == "masked")
        assert padding == "masked" or all(len(mask) == 1 for mask in masks)
        calls.clear()


def test_a_model_that_sees_what_comes_is_not_scored() -> None:
    model = tiny_model("gemma3", use_bidirectional_attention=True)
    with pytest.raises(UnknownArchitecture, match="not causal"):
        answer_nlls(find_adapter(model), tiny_tokenizer(), QUESTIONS)


def test_which_tokens_of_an_answer_the_model_finds() -> None:
    """A model that says "I play the piano in" by heart."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer("I play the piano in").input_ids
    table = torch.zeros(640, 640)
    table[ids[:-1], ids[1:]] = 2.0
    answers = [" the piano", " the violin", " a piano", " the piano in"]
    judged = judge_answers(bigrams(table), tokenizer, [("I play", a) for a in answers])
    said = [tokenizer(answer).input_ids for answer in answers]
    assert [answer.exact for answer in judged] == [True, False, False, True]
    assert judged[0].matches == (True,) * len(said[0])
    assert judged[1].matches[0] and len(judged[1].matches) == len(said[1])
    assert not judged[2].matches[0]


def test_progress_counts_questions_and_the_mode_is_kept() -> None:
    model = tiny_model("gpt2").train()
    done: list[int] = []
    got = answer_nlls(find_adapter(model), tiny_tokenizer(), QUESTIONS, batch_tokens=40, progress=done.append)
    assert sum(done) == len(QUESTIONS) and len(done) > 1
    assert model.training
    assert got == answer_nlls(find_adapter(tiny_model("gpt2")), tiny_tokenizer(), QUESTIONS, batch_tokens=40)


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
    cost, _ = literal(model, tiny_tokenizer("bpe_bos"), "", " Paris")
    assert got == pytest.approx(cost, abs=1e-5)
    with pytest.raises(BadRequest, match="prompt ''"):
        answer_nlls(adapter, tiny_tokenizer(), [("", " Paris"), ("I play", " the")])


def test_an_error_leaves_no_hook_and_the_mode_as_it_was() -> None:
    model = tiny_model("llama").train()
    model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        answer_nlls(find_adapter(model), tiny_tokenizer(), QUESTIONS)
    assert model.training and not model.lm_head._forward_pre_hooks
