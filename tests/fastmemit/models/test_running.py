"""What a model is, is measured: whether later tokens matter, and what padding does to a row."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from fastmemit.errors import UnknownArchitecture
from fastmemit.models import find_adapter, running
from fastmemit.models.running import accepted, agrees, difference, is_causal, padding, remembered, tolerance, traits
from tiny_models import ARCHITECTURES, D_K, LAYERS, VOCAB_SIZE, D, tiny_model

IDS = torch.arange(4, 11)[None]


def bert(**fields: Any) -> Any:
    config = transformers.BertConfig(
        vocab_size=VOCAB_SIZE, hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=4,
        intermediate_size=D_K, **fields,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.BertLMHeadModel(config).eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_usual_models_are_causal_and_right_padding_needs_no_mask(architecture: str) -> None:
    adapter = find_adapter(tiny_model(architecture))
    assert adapter.traits.causal
    assert adapter.traits.right_padding == "unmasked"
    assert padding(adapter.model, "left") != "none"
    adapter.check_causal()


def test_a_config_that_says_nothing_of_attention_is_not_believed() -> None:
    model = bert()
    adapter = find_adapter(model, "bert.encoder.layer.{}.output.dense")
    assert not hasattr(model.config, "use_bidirectional_attention")
    assert not adapter.traits.causal
    assert adapter.traits.right_padding == "masked"
    with pytest.raises(UnknownArchitecture, match=r"BertLMHeadModel is not causal.*is_decoder=True"):
        adapter.check_causal()
    assert is_causal(bert(is_decoder=True))


def test_a_bidirectional_gemma_is_refused_with_the_field_to_change() -> None:
    adapter = find_adapter(tiny_model("gemma3", use_bidirectional_attention=True))
    with pytest.raises(UnknownArchitecture, match="use_bidirectional_attention=False"):
        adapter.check_causal()
    model = tiny_model("llama")
    model.config.use_bidirectional_attention = True  # llama does not look at it
    find_adapter(model).check_causal()


class OneAhead(nn.Module):
    """A model whose every token sees the next one, and no later ones."""

    def __init__(self, words: int = 40) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(words, 8)
        self.head = nn.Linear(8, words)
        self.config = None

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None) -> torch.Tensor:
        hidden = self.embeddings(input_ids)
        return self.head(hidden + 0.1 * hidden.roll(-1, 1))


def test_one_token_of_foresight_is_seen_and_unknown_inputs_are_left_out() -> None:
    assert not is_causal(OneAhead())


class Summing(OneAhead):
    """A causal model that adds up padding on its left, whatever the mask says."""

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None) -> torch.Tensor:
        return self.head(self.embeddings(input_ids).cumsum(1))


def test_padding_that_no_mask_helps_against() -> None:
    assert is_causal(Summing())
    assert padding(Summing(), "left") == "none"
    assert padding(Summing(), "right") == "unmasked"


class Sighted(nn.Module):
    """A block whose tokens see so many later ones."""

    def __init__(self, block: nn.Module, ahead: int) -> None:
        super().__init__()
        self.block, self.ahead = block, ahead

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = self.block(hidden_states, *args, **kwargs)
        return sum((out.roll(-n, 1) for n in range(1, self.ahead + 1)), out)


def blocks_that_run(model: Any) -> list[int]:
    """The numbers of the blocks whose attention runs from now on, in their order."""
    ran: list[int] = []
    for number, block in enumerate(model.model.layers):
        attention = block.get_submodule("block.self_attn" if isinstance(block, Sighted) else "self_attn")
        attention.register_forward_hook(Noting(ran, number), with_kwargs=True)
    return ran


class Noting:
    def __init__(self, ran: list[int], number: int) -> None:
        self.ran, self.number = ran, number

    def __call__(self, *_: Any) -> None:
        self.ran.append(self.number)


def alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the hooks that count tell no block from another."""
    plain = running._settings
    monkeypatch.setattr(running, "_settings", lambda m: [(k, v) for k, v in plain(m) if not k.startswith("_forward")])


def test_the_trial_runs_one_block_of_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    alike(monkeypatch)
    model = tiny_model("llama")
    ran = blocks_that_run(model)
    assert traits(model) == running.Traits(None, True, "unmasked") and ran == [0, 0]
    ran.clear()
    assert padding(model, "left") != "none" and set(ran) == {0}
    model = tiny_model("gemma3", layer_types=["full_attention", "sliding_attention", "full_attention"])
    ran = blocks_that_run(model)
    assert traits(model).causal and ran == [0, 1, 0, 1]


@pytest.mark.parametrize("number", range(3))
def test_one_block_of_another_kind_is_seen(number: int) -> None:
    model = tiny_model("llama")
    for place, block in enumerate(model.model.layers):
        model.model.layers[place] = Sighted(block, int(place == number))
    assert not traits(model).causal
    model.model.layers[number].ahead = 0
    assert traits(model).causal


class Masked(nn.Module):
    """A block that shows its tokens later ones, as a mask of its own says."""

    def __init__(self, block: nn.Module, mask: torch.Tensor) -> None:
        super().__init__()
        self.block = block
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        length = hidden_states.shape[1]
        return self.mask[:length, :length] @ self.block(hidden_states, *args, **kwargs)


def test_blocks_of_which_a_constant_differs_are_not_alike() -> None:
    model = tiny_model("llama")
    for place, block in enumerate(model.model.layers):
        model.model.layers[place] = Masked(block, torch.ones(16, 16).tril())
    assert traits(model).causal
    model.model.layers[2].mask.fill_(1.0)  # and what was measured is measured again
    assert not traits(model).causal


def test_where_blocks_cannot_hand_on_the_whole_model_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_args: Any, **_named: Any) -> Any:
        raise TypeError("no states")

    monkeypatch.setattr(running, "_handed_on", failing)
    alike(monkeypatch)
    model = tiny_model("llama")
    ran = blocks_that_run(model)
    assert traits(model) == running.Traits(None, True, "unmasked") and ran == [0, 0, 1, 2, 0, 1, 2]
    assert not any("forward" in vars(block) for block in model.model.layers)


def test_the_measures_leave_the_mode_and_no_gradient() -> None:
    model = tiny_model("llama", attention_dropout=0.5).train()
    model.model.layers[1].eval()
    assert is_causal(model) and padding(model, "right") == "unmasked"
    assert model.training and not model.model.layers[1].training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_difference_is_a_share_of_the_rows_own_length() -> None:
    want = torch.tensor([[1.0, -1.0, 5.0, -5.0], [100.0, 104.0, 100.0, 96.0]])
    assert difference(want, want) == 0
    got = want.clone()
    got[1, 0] += 2.0  # the row's length around its mean is sqrt(16 + 16)
    assert difference(got, want) == pytest.approx(2 / 32**0.5)
    got[0, 1] = float("nan")
    assert difference(got, want) == float("inf")
    want[0, 1] = want[1, 0] = float("nan")  # a broken word is not judged
    assert difference(got, want) == 0
    assert difference(torch.zeros(1, 3), torch.zeros(1, 3)) == 0
    assert difference(torch.ones(1, 3), torch.zeros(1, 3)) == float("inf")


def test_tolerance_follows_the_dtype_and_bfloat16_is_no_disagreement() -> None:
    model = tiny_model("llama")
    assert tolerance(model) == 1e-3
    exact = model(IDS).logits[0]
    half = model.bfloat16()
    assert tolerance(half) == pytest.approx(12 * 2**-7)
    rounded = half(IDS).logits[0].float()
    assert 1e-3 < difference(rounded, exact) < tolerance(half)
    assert agrees(half, rounded, exact) and not agrees(half, rounded[1:], exact)
    assert find_adapter(half).traits.right_padding == "unmasked" and find_adapter(half).traits.causal


def test_names_that_a_forward_does_not_know_are_left_out() -> None:
    model = tiny_model("gpt2")
    want = model(input_ids=IDS).logits
    got = model(**accepted(model, {"input_ids": IDS, "position_ids": torch.arange(7)[None], "use_cache": False}))
    assert torch.equal(got.logits, want)
    with pytest.raises(TypeError):
        OneAhead()(**accepted(OneAhead(), {"input_ids": IDS, "something_else": 1}))


def test_a_model_that_changes_its_own_weights_is_refused() -> None:
    def rwkv(**fields: Any) -> Any:
        return transformers.AutoModelForCausalLM.from_config(
            transformers.RwkvConfig(
                vocab_size=VOCAB_SIZE, hidden_size=D, attention_hidden_size=D,
                intermediate_size=D_K, context_length=64, **fields,
            )
        ).eval()  # fmt: skip

    model = rwkv(num_hidden_layers=7)
    with pytest.raises(UnknownArchitecture, match=r"own weights.*blocks\.0\..*rescale_every=0"):
        find_adapter(model).check_constant()
    find_adapter(rwkv(num_hidden_layers=7, rescale_every=0)).check_constant()
    find_adapter(tiny_model("llama")).check_constant()


def _hooked(model: Any) -> None:
    model.model.layers[1].register_forward_hook(lambda *_: None)


def _other_attention(model: Any) -> None:
    model.config._attn_implementation = "eager" if model.config._attn_implementation != "eager" else "sdpa"


def _replaced_forward(model: Any) -> None:
    block = model.model.layers[0]
    block.forward = partial(type(block).forward, block)


def _one_weight(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(2.0)


def _loaded(model: Any) -> None:
    model.load_state_dict(tiny_model("llama", seed=1).state_dict())


@pytest.mark.parametrize(
    ("change", "always"),
    [
        (lambda model: model.eval(), None),
        (_hooked, True),
        (_replaced_forward, True),
        (_other_attention, True),
        (lambda model: setattr(model.model.layers[0].mlp, "scale", 2.0), True),
        (lambda model: setattr(model.model, "norm", torch.nn.Identity()), True),
        (lambda model: model.bfloat16(), True),
        (lambda model: model.to("meta"), True),
        (lambda model: model.model.rotary_emb.inv_freq.mul_(2.0), True),
        (_loaded, False),
        (_one_weight, False),
    ],
    ids=[
        "mode",
        "hook",
        "forward",
        "attention",
        "attribute",
        "module",
        "bfloat16",
        "device",
        "buffer",
        "loaded",
        "weight",
    ],
)
def test_what_was_measured_holds_for_as_long_as_the_model_is_what_it_was(change: Any, always: bool | None) -> None:
    # None: nothing is measured again. False: only what depends on the weights is.
    model, found = tiny_model("llama"), []

    def ask() -> list[int]:
        number = len(found)
        for weights in (False, True):
            remembered(model, ("test", weights), lambda w=weights: found.append(w), weights=weights)
        return found[number:]

    assert ask() == [False, True] and ask() == []
    with torch.no_grad():
        change(model)
    assert ask() == {None: [], True: [False, True], False: [True]}[always]
    assert ask() == []


def test_an_adapter_follows_its_model() -> None:
    model = tiny_model("llama")
    adapter = find_adapter(model)
    assert adapter.traits.causal and adapter.adds_plainly(1) and adapter.measured
    model.model.layers[1].mlp.register_forward_hook(lambda _m, _a, out: 2.0 * out)
    adapter.look()
    assert not adapter.measured and not adapter.adds_plainly(1)
    model.model.layers = nn.ModuleList([*model.model.layers][:2])
    assert adapter.n_layers == 2 and adapter.layers == [0, 1] and adapter.block(1) is model.model.layers[1]
    for block in model.model.layers:
        block.self_attn.is_causal = False
    with pytest.raises(UnknownArchitecture, match="not causal"):
        adapter.check_causal()


def test_weights_that_are_offloaded_are_other_objects_each_time() -> None:
    model, found = tiny_model("llama").to("meta"), []
    for _ in range(2):
        remembered(model, "test", lambda: found.append(1))
        for module in model.modules():
            for name, weight in module._parameters.items():
                module._parameters[name] = None if weight is None else nn.Parameter(weight.detach().clone())
    assert found == [1]
