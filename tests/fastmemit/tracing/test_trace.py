"""The batched trace against the literal one, on every architecture."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fastmemit.errors import BadConfig, BadRequest, FastmemitError
from fastmemit.models import find_adapter
from fastmemit.request import EditRequest
from fastmemit.tracing import GROUPS, KINDS, TraceSettings, choose_facts, count_states, subject_noise, trace
from reference.literal_tracing import literal_effects
from tiny_models import ARCHITECTURES, LAYERS, tiny_model, tiny_tokenizer

REQUESTS = (
    EditRequest("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris"),
    EditRequest("The mother tongue of {} is", "Danielle Darrieux", "English", "French"),
    EditRequest("When asked, everybody in the small town knew that {} plays", "Ann", "x", "piano"),
    EditRequest("{} is", "Paris", "x", "y"),
)
#: Where each architecture keeps its MLP and its attention; not asked of the package.
PARTS = {
    "gpt2": ("transformer.h", "mlp", "attn"),
    "gptj": ("transformer.h", "mlp", "attn"),
    "gpt_neox": ("gpt_neox.layers", "mlp", "attention"),
    "opt": ("model.decoder.layers", "fc2", "self_attn"),
}
ALL = TraceSettings(samples=2, window=2, only_known=False, positions="all", batch_tokens=200)


def modules_of(model: Any, architecture: str) -> dict[str, list[Any]]:
    blocks, mlp, attention = PARTS.get(architecture, ("model.layers", "mlp", "self_attn"))
    hidden = list(model.get_submodule(blocks))
    return {
        "mlp": [block.get_submodule(mlp) for block in hidden],
        "attention": [block.get_submodule(attention) for block in hidden],
        "hidden": hidden,
    }


def literal(model: Any, architecture: str, facts: Any, settings: TraceSettings, windows: dict, std: float) -> list[Any]:
    width = model.get_input_embeddings().weight.shape[1]
    found = []
    for fact in facts:
        noise = subject_noise(fact, settings.samples, width, std, settings.seed)
        modules = modules_of(model, architecture)
        found.append(literal_effects(model, modules, fact.ids, fact.first, fact.answer, noise, windows))
    return found


def grouped(facts: Any, found: list[Any], kind: str, group: str) -> np.ndarray:
    rows = []
    for fact, (_, _, effects) in zip(facts, found, strict=True):
        here = [p for p, name in fact.groups().items() if name == group]
        if here:
            rows.append([np.mean([effects[kind, p, layer] for p in here]) for layer in range(LAYERS)])
    return np.array(rows)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_the_literal_computation(architecture: str) -> None:
    model = tiny_model(architecture)
    adapter = find_adapter(model)
    # Between them they have every group; two of four facts, for the literal way is slow.
    facts = choose_facts(adapter, tiny_tokenizer("byte_bpe"), REQUESTS[::3], ALL).facts
    done = trace(adapter, facts, ALL)
    pairs = [[0], [0, 1], [1, 2]]  # a window of 2: the layer below and the layer
    windows = {"mlp": pairs, "attention": pairs, "hidden": [[0], [1], [2]]}
    found = literal(model, architecture, facts, ALL, windows, done.std)
    np.testing.assert_allclose(done.clean, [f[0] for f in found], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(done.corrupted, [f[1] for f in found], rtol=1e-4, atol=1e-7)
    assert done.windows == {"mlp": 2, "attention": 2, "hidden": 1}
    seen = {group for fact in facts for group in fact.groups().values()}
    assert seen == set(GROUPS)
    for kind in KINDS:
        assert list(done.effects[kind]) == list(GROUPS)
        for group, effects in done.effects[kind].items():
            expected = grouped(facts, found, kind, group)
            assert effects.shape == expected.shape
            np.testing.assert_allclose(effects, expected, rtol=1e-3, atol=2e-7)
    moved = np.abs(done.effects["mlp"]["last subject"])[:, :-1].max()
    assert moved > 1e-5  # there was something to compare


@pytest.mark.parametrize(
    ("settings", "windows"),
    [
        (TraceSettings(samples=3, window=3, hidden_window=2, only_known=False),
         {"mlp": [[0, 1], [0, 1, 2], [1, 2]], "hidden": [[0], [0, 1], [1, 2]]}),
        (TraceSettings(samples=1, window=1, only_known=False, seed=5),
         {"mlp": [[0], [1], [2]], "hidden": [[0], [1], [2]]}),
    ],
)  # fmt: skip
def test_other_windows_at_the_last_subject_token(settings: TraceSettings, windows: dict) -> None:
    model = tiny_model("llama")
    adapter = find_adapter(model)
    facts = choose_facts(adapter, tiny_tokenizer("bpe_bos"), REQUESTS, settings).facts
    done = trace(adapter, facts, settings)
    windows = {**windows, "attention": windows["mlp"]}
    found = literal(model, "llama", facts, settings, windows, done.std)
    for kind in KINDS:
        assert list(done.effects[kind]) == ["last subject"]
        expected = grouped(facts, found, kind, "last subject")
        np.testing.assert_allclose(done.effects[kind]["last subject"], expected, rtol=1e-3, atol=2e-7)


def test_batching_changes_nothing_and_states_are_counted() -> None:
    adapter = find_adapter(tiny_model("llama"))
    settings = TraceSettings(samples=2, only_known=False, positions="all", kinds=("mlp",))
    facts = choose_facts(adapter, tiny_tokenizer(), REQUESTS, settings).facts
    done: list[int] = []
    one = trace(adapter, facts, settings, progress=done.append)
    few = TraceSettings(**{**vars(settings), "batch_tokens": 1})
    other = trace(adapter, facts, few)
    assert sum(done) == count_states(adapter, facts, settings)
    for group, effects in one.effects["mlp"].items():
        np.testing.assert_allclose(effects, other.effects["mlp"][group], rtol=1e-3, atol=2e-7)


def test_a_clean_state_above_all_blocks_restores_the_answer() -> None:
    # The hidden state at the last token of the last layer is all that the answer is read from.
    adapter = find_adapter(tiny_model("gpt2"))
    facts = choose_facts(adapter, tiny_tokenizer(), REQUESTS, ALL).facts
    done = trace(adapter, facts, ALL)
    effect = done.effects["hidden"]["last"][:, -1]
    np.testing.assert_allclose(effect, done.clean - done.corrupted, rtol=1e-4, atol=1e-7)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("gptj").train()
    adapter = find_adapter(model)
    settings = TraceSettings(samples=1, only_known=False)
    facts = choose_facts(adapter, tiny_tokenizer(), REQUESTS, settings).facts
    trace(adapter, facts, settings)
    assert model.training
    assert all(not module._forward_hooks for module in model.modules())
    assert all("forward" not in vars(module) for module in model.modules())


def test_nan_is_refused_and_the_place_is_named() -> None:
    model = tiny_model("llama")
    adapter = find_adapter(model)
    settings = TraceSettings(samples=1, only_known=False)
    facts = choose_facts(adapter, tiny_tokenizer(), REQUESTS, settings).facts
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(FastmemitError, match="is not finite in the clean run; load"):
        trace(adapter, facts, settings)
    assert all(not module._forward_hooks for module in model.modules())


def test_no_facts_and_windows_that_are_too_large() -> None:
    adapter = find_adapter(tiny_model("llama"))
    with pytest.raises(BadRequest, match="no fact to trace"):
        trace(adapter, [], TraceSettings())
    settings = TraceSettings(window=4, only_known=False)
    with pytest.raises(BadConfig, match="window of 4 layers is more than the model's 3"):
        choose_facts(adapter, tiny_tokenizer(), REQUESTS, settings)
