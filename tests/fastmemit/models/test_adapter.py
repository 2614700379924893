"""Every architecture: the projection is found, its weight is the right way round and writable."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.testing import assert_close

from fastmemit.errors import BadLayer, UnknownArchitecture, WrongModel
from fastmemit.models import find_adapter
from fastmemit.models.running import hidden_of, with_hidden
from tiny_models import ARCHITECTURES, D_K, LAYERS, VOCAB_SIZE, D, tiny_model

PROJECTIONS = {
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "gptj": "transformer.h.{}.mlp.fc_out",
    "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    "phi": "model.layers.{}.mlp.fc2",
    "opt": "model.decoder.layers.{}.fc2",
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"), "model.layers.{}.mlp.down_proj"),
}
IDS = torch.arange(4, 11)[None]  # (1, 7)


@pytest.fixture(params=ARCHITECTURES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def run(model: Any, module: nn.Module, change: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and output of a module in a run over IDS; `change` may replace the output."""
    seen: list[torch.Tensor] = []

    def hook(_: nn.Module, inputs: tuple, output: Any) -> Any:
        seen.extend((inputs[0] if inputs else torch.empty(0), hidden_of(output)))
        return None if change is None else with_hidden(output, change(hidden_of(output)))

    handle = module.register_forward_hook(hook)
    with torch.no_grad():
        model(IDS, attention_mask=torch.ones_like(IDS), use_cache=False)
    handle.remove()
    return seen[0], seen[1]


def test_every_architecture_has_its_projection(name: str) -> None:
    adapter = find_adapter(ARCHITECTURES[name]())
    assert adapter.template == PROJECTIONS[name]
    assert adapter.projection_name(1) == PROJECTIONS[name].replace("{}", "1")
    assert adapter.weight_name(1) == adapter.projection_name(1) + ".weight"
    assert (adapter.n_layers, adapter.d, adapter.d_k(2)) == (LAYERS, D, D_K)
    assert adapter.max_context == 256
    assert adapter.device == torch.device("cpu")
    assert adapter.weight_is_transposed(0) == (name == "gpt2")
    assert adapter.adds_plainly(0) == adapter.moves_freely(0) != name.startswith("gemma")


def test_the_weight_maps_keys_to_outputs(name: str) -> None:
    model = ARCHITECTURES[name]()
    adapter = find_adapter(model)
    key, output = run(model, adapter.projection(1))  # (1, 7, d_k), (1, 7, d)
    bias = getattr(adapter.projection(1), "bias", None)
    expected = output if bias is None else output - bias
    assert adapter.weight(1).shape == (D, D_K)
    assert_close(key @ adapter.weight(1).T, expected.detach(), rtol=1e-4, atol=1e-5)


def test_the_weight_is_a_view_of_the_models_own(name: str) -> None:
    model = ARCHITECTURES[name]()
    adapter = find_adapter(model)
    stored = model.state_dict()[adapter.weight_name(2)]
    before = stored.clone()
    adapter.weight(2)[3, 5] += 1.0  # parameters that need gradients take it too
    place = (5, 3) if adapter.weight_is_transposed(2) else (3, 5)
    assert stored[place] == before[place] + 1.0
    assert (stored != before).sum() == 1


def test_the_head_is_found_where_it_is_tied(name: str) -> None:
    model = ARCHITECTURES[name](tie_word_embeddings=True)
    head = find_adapter(model).lm_head
    assert head.weight.shape == (VOCAB_SIZE, D)
    assert head is model.get_output_embeddings()
    if name != "phi":  # its bias makes some versions refuse the tie
        assert head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_a_residual_on_the_projection_moves_the_block(name: str) -> None:
    model = ARCHITECTURES[name]()
    adapter = find_adapter(model)
    _, output = run(model, adapter.projection(1))
    _, before = run(model, adapter.block(1))
    wanted = 0.1 * torch.randn(7, D)
    rows = [IDS[0, : n + 1].tolist() for n in range(7)]
    change = adapter.projection_residual(1, output[0], wanted, rows)  # (7, d)
    handle = adapter.projection(1).register_forward_hook(lambda _m, _i, out: out + change)
    _, after = run(model, adapter.block(1))
    handle.remove()
    moved = (after - before)[0]
    if adapter.adds_plainly(1):
        assert_close(change, wanted, rtol=0, atol=0)
        assert_close(moved, wanted, rtol=1e-4, atol=1e-5)
    else:  # a norm's output cannot take any length
        share = (moved * wanted).sum(1) / wanted.square().sum(1)
        assert float(share.min()) > 0.6 and float(share.mean()) > 0.85


def test_a_block_can_be_given_other_hidden_states(name: str) -> None:
    model = ARCHITECTURES[name]()
    block, following = find_adapter(model).block(1), find_adapter(model).block(2)
    _, plain = run(model, block)
    arrived: list[torch.Tensor] = []
    handle = following.register_forward_pre_hook(
        lambda _m, args, kwargs: arrived.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    run(model, block, change=lambda hidden: hidden + 2.0)
    handle.remove()
    assert_close(arrived[0], plain + 2.0, rtol=0, atol=0)


def test_a_huge_stated_context_is_not_used() -> None:
    model = tiny_model("llama", max_position_embeddings=131072)
    assert find_adapter(model).max_context == 2048


def test_opt_with_narrow_embeddings_is_found_at_its_inner_width() -> None:
    adapter = find_adapter(tiny_model("opt", word_embed_proj_dim=16))
    assert (adapter.template, adapter.d) == ("model.decoder.layers.{}.fc2", D)


def test_granites_residual_multiplier_is_undone() -> None:
    config = transformers.GraniteConfig(
        vocab_size=VOCAB_SIZE, hidden_size=D, intermediate_size=D_K, num_hidden_layers=2,
        num_attention_heads=4, residual_multiplier=0.5, pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    adapter = find_adapter(model)
    _, before = run(model, adapter.block(1))
    assert not adapter.adds_plainly(1) and adapter.moves_freely(1)
    change = adapter.projection_residual(1, torch.zeros(1, D), torch.full((1, D), 3.0))
    handle = adapter.projection(1).register_forward_hook(lambda _m, _i, out: out + change)
    _, after = run(model, adapter.block(1))
    handle.remove()
    assert_close(after - before, torch.full_like(before, 3.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", [-1, LAYERS, 99])
def test_a_layer_out_of_range_is_refused_with_the_range(layer: int) -> None:
    adapter = find_adapter(tiny_model("llama"))
    for ask in (adapter.block, adapter.weight, adapter.d_k, adapter.projection_name):
        with pytest.raises(BadLayer, match=rf"Layer {layer} is out of range.*0 to 2"):
            ask(layer)


@pytest.mark.parametrize("layer", [True, 1.0, "1", None])
def test_a_layer_that_is_no_integer_is_refused(layer: Any) -> None:
    with pytest.raises(BadLayer, match="must be an integer"):
        find_adapter(tiny_model("llama")).check_layer(layer)


class Packed(torch.Tensor):
    """Stands for the tensor subclasses that keep quantised values."""


def _int8(linear: nn.Linear) -> None:
    del linear.weight
    linear.register_buffer("weight", torch.zeros(D, D_K, dtype=torch.int8))


def _packed_shape(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(torch.zeros(D * D_K // 2, 1))


def _missing(linear: nn.Linear) -> None:
    del linear.weight
    linear.register_buffer("qweight", torch.zeros(4, dtype=torch.int32))


def _subclass(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(torch.zeros(D, D_K).as_subclass(Packed))


def _float8(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(torch.zeros(D, D_K).to(torch.float8_e4m3fn), requires_grad=False)


@pytest.mark.parametrize(
    ("quantise", "what"),
    [
        (_int8, "int8"),
        (_packed_shape, r"shape \(1024, 1\)"),
        (_missing, "no plain weight"),
        (_subclass, "Packed"),
        (_float8, "float8_e4m3fn"),
    ],
)
def test_a_quantised_weight_says_so_when_it_is_asked_for(quantise: Any, what: str) -> None:
    model = tiny_model("llama")
    quantise(model.model.layers[1].mlp.down_proj)
    adapter = find_adapter(model)  # finding and measuring it is possible
    assert adapter.d_k(1) == D_K
    assert adapter.weight(0).shape == (D, D_K)
    with pytest.raises(WrongModel, match=rf"model.layers.1.mlp.down_proj .*{what}.*floating"):
        adapter.weight(1)


def test_an_offloaded_weight_says_so() -> None:
    model = tiny_model("llama")
    model.model.layers[0].mlp.to("meta")
    with pytest.raises(WrongModel, match=r"layers\.0\.mlp\.down_proj.*offloading"):
        find_adapter(model).weight(0)


def test_a_model_without_a_head_says_so() -> None:
    adapter = find_adapter(tiny_model("llama").model)
    assert adapter.template == "layers.{}.mlp.down_proj"
    with pytest.raises(UnknownArchitecture, match="LlamaModel has no output head"):
        _ = adapter.lm_head
