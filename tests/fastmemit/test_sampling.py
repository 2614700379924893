"""Continuations: greedy and seeded ones, whatever the model's own settings and the padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastmemit.errors import BadConfig, BadRequest, FastmemitError
from fastmemit.text import continue_rows, continue_texts
from tiny_models import tiny_model, tiny_tokenizer

ROWS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16]]


def greedy(model: Any, row: list[int], n: int) -> list[int]:
    """The most probable tokens, one full forward at a time; token 2 (EOS) may not come."""
    ids = list(row)
    for _ in range(n):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        logits[2] = -torch.inf
        ids.append(int(logits.argmax()))
    return ids[len(row) :]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_greedy_is_the_literal_argmax_in_spite_of_padding(architecture: str) -> None:
    model = tiny_model(architecture)
    assert continue_rows(model, tiny_tokenizer(), ROWS, 6) == [greedy(model, r, 6) for r in ROWS]


def test_the_models_own_settings_do_not_matter() -> None:
    model, plain = tiny_model("llama"), tiny_model("llama")
    own = model.generation_config
    own.do_sample, own.temperature, own.top_p, own.repetition_penalty = True, 0.1, 0.2, 5.0
    own.no_repeat_ngram_size, own.min_p, own.num_beams = 1, 0.9, 3
    own.suppress_tokens, own.bad_words_ids = list(range(4, 300)), [[301]]
    own.max_length, own.num_return_sequences = 9, 2
    asked = own.to_dict()
    for settings in ({}, {"top_k": 50, "seed": 1}):
        mine = continue_rows(model, tiny_tokenizer(), ROWS, 12, **settings)
        assert mine == continue_rows(plain, tiny_tokenizer(), ROWS, 12, **settings)
    assert model.generation_config is own and own.to_dict() == asked


@pytest.mark.parametrize("n", [1, 20])
def test_every_row_gets_exactly_as_many_tokens(n: int) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        # A model that would say EOS (token 2) at once.
        model.lm_head.weight[2] = 50 * model.lm_head.weight[3:].mean(0)
    for settings in ({}, {"top_k": 5}):
        rows = continue_rows(model, tiny_tokenizer(), ROWS, n, **settings)
        assert [len(row) for row in rows] == [n] * 4
        assert all(2 not in row for row in rows)


def test_sampling_depends_on_the_seed_alone() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    first = continue_rows(model, tokenizer, ROWS, 8, top_k=20, seed=4)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert continue_rows(model, tokenizer, ROWS, 8, top_k=20, seed=4) == first
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's numbers were drawn
    assert continue_rows(model, tokenizer, ROWS, 8, top_k=20, seed=5) != first


def test_top_k_bounds_the_choice_and_zero_does_not() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(0.01)  # nearly uniform
        logits = model(input_ids=torch.tensor([ROWS[0]])).logits[0, -1]
    logits[2] = -torch.inf
    allowed = set(logits.topk(3).indices.tolist())
    many = [ROWS[0]] * 200
    drawn = {row[0] for row in continue_rows(model, tiny_tokenizer(), many, 1, top_k=3)}
    assert drawn == allowed
    free = {row[0] for row in continue_rows(model, tiny_tokenizer(), many, 1, top_k=0)}
    assert len(free) > 60


def test_the_model_keeps_its_mode() -> None:
    model = tiny_model("gpt2").train()
    dropped = continue_rows(model, tiny_tokenizer(), ROWS, 5)
    assert model.training
    assert dropped == continue_rows(tiny_model("gpt2"), tiny_tokenizer(), ROWS, 5)


@pytest.mark.parametrize("kind", ["byte_bpe", "bpe_bos", "adds_eos"])
def test_texts_are_continued_from_their_end(kind: str) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer(kind)
    text = "The capital of France is"
    ids = tokenizer(text)["input_ids"]
    if kind == "adds_eos":
        ids = ids[:-1]  # what follows EOS would be another text
    wanted = tokenizer.decode(greedy(model, ids, 7), skip_special_tokens=True)
    assert continue_texts(model, tokenizer, [text, "I"], 7)[0] == wanted


def test_nothing_to_continue() -> None:
    assert continue_texts(tiny_model("llama"), tiny_tokenizer(), [], 5) == []
    with pytest.raises(BadRequest, match="text '' gives no token to continue"):
        continue_texts(tiny_model("llama"), tiny_tokenizer(), ["I", ""], 5)
    # A tokenizer that puts a token in front has one to continue.
    assert len(continue_texts(tiny_model("llama"), tiny_tokenizer("bpe_bos"), [""], 5)) == 1


@pytest.mark.parametrize("n", [0, -2])
def test_a_number_of_tokens_that_is_none(n: int) -> None:
    with pytest.raises(BadConfig, match=f"must be 1 or more but is {n}"):
        continue_rows(tiny_model("llama"), tiny_tokenizer(), ROWS, n)


def test_rows_that_padding_changes_are_continued_by_themselves() -> None:
    """The same words as row by row, although a batch would change them."""
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    model.transformer.h[1].mlp.register_forward_hook(
        lambda _m, _a, out: out + 30 * out[:, :1].detach()  # the first column, padding or not
    )
    rows = [(5, 6, 7, 8, 9, 10), (11, 12), (13, 14, 15), (16, 17)]
    alone = [continue_rows(model, tokenizer, [row], 1)[0] for row in rows]
    assert continue_rows(model, tokenizer, rows, 1) == alone
    calls: list[int] = []
    model.register_forward_pre_hook(lambda _m, _a, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True)
    continue_rows(model, tokenizer, rows, 1)
    assert calls[-3:] == [2, 1, 1]  # rows of one length together


@pytest.mark.parametrize("end", [None, [2, 5]])
def test_odd_generation_settings(end: object) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    want = continue_rows(model, tokenizer, [(5, 6, 7)], 6)
    model.generation_config.eos_token_id = end
    model.generation_config.cache_implementation = "static"
    assert continue_rows(model, tokenizer, [(5, 6, 7)], 6) == want
    model.generation_config = None
    assert continue_rows(model, tokenizer, [(5, 6, 7)], 6) == want
    with pytest.raises(FastmemitError, match="LlamaModel has no generate"):
        continue_rows(model.model, tokenizer, [(5, 6, 7)], 6)
