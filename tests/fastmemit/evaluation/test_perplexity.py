"""Perplexity against one window and one token at a time, with all logits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmemit.errors import BadConfig, FastmemitError, UnknownArchitecture
from fastmemit.evaluation import perplexity as module
from fastmemit.evaluation.perplexity import PerplexityResult, PerplexityText, count_tokens, perplexity, read_text
from fastmemit.models import find_adapter
from reference.literal_perplexity import literal_perplexity
from tiny_editors import texts
from tiny_models import ARCHITECTURES, VOCAB_SIZE, tiny_model, tiny_tokenizer


@pytest.fixture
def ids() -> tuple[int, ...]:
    return tuple(tiny_tokenizer()(" ".join(texts(12)))["input_ids"][:203])


def text_of(ids: tuple[int, ...], **settings: Any) -> PerplexityText:
    return PerplexityText("text", "0" * 64, ids, **settings)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "settings",
    [{"context": 40}, {"context": 33, "stride": 10}, {"context": 50, "lead": (1,)}],
    ids=["apart", "overlapping", "bos"],
)
def test_it_is_the_literal_one(
    architecture: str, settings: dict[str, Any], ids: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOGIT_BYTES", 4 * VOCAB_SIZE * 17)  # pieces of 17 positions
    model = tiny_model(architecture)
    got = perplexity(find_adapter(model), text_of(ids, **settings), batch_tokens=100)
    want, tokens = literal_perplexity(model, ids, **settings)
    assert got.perplexity == pytest.approx(want, rel=1e-5)
    assert got.tokens == tokens == count_tokens(find_adapter(model), text_of(ids, **settings))
    assert got.context == settings["context"]


def test_what_a_model_does_to_its_logits_is_done(ids: tuple[int, ...]) -> None:
    """Gemma's soft caps come after the head; without them the literal value is another."""
    model = tiny_model("gemma2", final_logit_softcapping=2.0)
    plain = tiny_model("gemma2", final_logit_softcapping=None)
    got = perplexity(find_adapter(model), text_of(ids, context=40)).perplexity
    assert got == pytest.approx(literal_perplexity(model, ids, 40)[0], rel=1e-5)
    assert got != pytest.approx(literal_perplexity(plain, ids, 40)[0], rel=1e-2)


def test_uniform_logits_give_the_size_of_the_vocabulary(ids: tuple[int, ...]) -> None:
    model = tiny_model("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    got = perplexity(find_adapter(model), text_of(ids, context=40))
    assert got.perplexity == pytest.approx(VOCAB_SIZE, rel=1e-6)
    assert got.nll == pytest.approx(math.log(VOCAB_SIZE), rel=1e-6)


@pytest.mark.parametrize("batch_tokens", [1, 100, 4096])
def test_batches_keep_to_their_bound_and_have_no_mask(
    ids: tuple[int, ...], batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOGIT_BYTES", 4 * VOCAB_SIZE * 17)
    model = tiny_model("llama")
    adapter = find_adapter(model)
    inputs: list[tuple[int, ...]] = []
    heads: list[tuple[int, ...]] = []
    block = model.model.layers[0]
    block.register_forward_pre_hook(lambda _, args, kwargs: inputs.append(tuple(args[0].shape[:2])), with_kwargs=True)
    masks: list[Any] = []
    block.self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    model.lm_head.register_forward_hook(lambda _, args, out: heads.append(tuple(out.shape)))
    adapter.look()
    assert adapter.traits.causal  # measured before what is run is counted
    for seen in (inputs, heads, masks):
        seen.clear()
    got = perplexity(adapter, text_of(ids, context=40), batch_tokens=batch_tokens)
    assert all(rows == 1 or rows * length <= batch_tokens for rows, length in inputs)
    assert sum(rows for rows, _ in inputs) == got.windows == 6
    assert len(inputs) == {1: 6, 100: 4, 4096: 2}[batch_tokens]
    assert all(mask is None for mask in masks)
    assert max(shape[1] for shape in heads) == 17
    # One more position a batch, which shows how wide logits are.
    assert sum(shape[1] for shape in heads) == got.tokens + len(inputs)


def test_the_cost_is_that_of_the_model_as_it_is(ids: tuple[int, ...]) -> None:
    model = tiny_model("llama")
    adapter, text = find_adapter(model), text_of(ids, context=40)
    before = perplexity(adapter, text)
    with torch.no_grad():
        adapter.weight(1).mul_(1.5)
    after = perplexity(adapter, text)
    assert after.perplexity == pytest.approx(literal_perplexity(model, ids, 40)[0], rel=1e-5)
    assert after.nll != before.nll


def test_half_precision_costs_are_summed_in_double(ids: tuple[int, ...]) -> None:
    model = tiny_model("llama").bfloat16()
    got = perplexity(find_adapter(model), text_of(ids, context=40), batch_tokens=1)
    assert got.perplexity == pytest.approx(literal_perplexity(model, ids, 40)[0], rel=1e-3)


def test_progress_counts_tokens_and_modes_are_kept(ids: tuple[int, ...]) -> None:
    model = tiny_model("gpt2", attn_pdrop=0.5).train()
    model.transformer.h[1].eval()
    modes = [part.training for part in model.modules()]
    done: list[int] = []
    text = text_of(ids, context=40)
    got = perplexity(find_adapter(model), text, batch_tokens=80, progress=done.append)
    assert sum(done) == got.tokens and len(done) == 4
    assert [part.training for part in model.modules()] == modes
    assert got == perplexity(find_adapter(tiny_model("gpt2")), text, batch_tokens=80)


def test_an_error_leaves_no_hook_no_forward_and_the_modes(ids: tuple[int, ...]) -> None:
    model = tiny_model("llama").train()
    calls: list[int] = []

    def second(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise ZeroDivisionError

    model.lm_head.register_forward_hook(second)
    with pytest.raises(ZeroDivisionError):
        perplexity(find_adapter(model), text_of(ids, context=40))
    assert all(part.training for part in model.modules())
    assert "forward" not in model.model.__dict__ and not model.model._forward_hooks
    assert not model.lm_head._forward_pre_hooks


def test_nan_is_refused_with_its_place(ids: tuple[int, ...]) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(FastmemitError, match="not finite between the tokens 0 and 39 of text"):
        perplexity(find_adapter(model), text_of(ids, context=40), batch_tokens=40)


def test_a_context_beyond_the_models_is_refused_before_it_runs(ids: tuple[int, ...]) -> None:
    model = tiny_model("llama")
    model.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(BadConfig, match="context is 300 tokens but the model takes 256"):
        perplexity(find_adapter(model), text_of(ids, context=300))


def test_a_cost_too_large_for_a_float_is_infinite() -> None:
    assert PerplexityResult(nll=1000.0, tokens=1, windows=1, context=2).perplexity == math.inf


@pytest.mark.real
def test_the_real_model_on_real_text(data_dir: Path, smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    text = read_text(data_dir / "wikitext2_test.txt", tokenizer, tokens=512, context=256)
    got = perplexity(find_adapter(model), text)
    want, tokens = literal_perplexity(model, text.ids, 256)
    assert got.perplexity == pytest.approx(want, rel=1e-5) and got.tokens == tokens == 510


def test_a_model_that_sees_what_comes_has_no_perplexity() -> None:
    model = tiny_model("gemma3", use_bidirectional_attention=True)
    with pytest.raises(UnknownArchitecture, match="not causal"):
        perplexity(find_adapter(model), text_of(tuple(range(4, 64)), context=20))


def test_a_head_that_is_not_the_same_apart_from_its_blocks_is_refused() -> None:
    """What a model does to logits may depend on where they stand; pieces would lose that."""
    model = tiny_model("llama")
    model.model.register_forward_hook(lambda _m, _a, out: setattr(model, "length", out.last_hidden_state.shape[1]))
    model.lm_head.register_forward_hook(lambda _m, _a, out: out.roll(model.length % 7, -1))
    with pytest.raises(UnknownArchitecture, match="head runs apart"):
        perplexity(find_adapter(model), text_of(tuple(range(4, 64)), context=20))
