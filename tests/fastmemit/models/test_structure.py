"""What cannot be told from the structure is refused with what was found, and can be named."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from fastmemit.errors import BadLayer, UnknownArchitecture
from fastmemit.models import find_adapter
from tiny_models import D_K, LAYERS, VOCAB_SIZE, D, tiny_model

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": D,
    "intermediate_size": D_K,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def build(config: str, **fields: Any) -> Any:
    settings = getattr(transformers, config)(**{**SIZES, **fields})
    return transformers.AutoModelForCausalLM.from_config(settings).eval()


def test_a_mixture_of_experts_is_refused() -> None:
    model = build("MixtralConfig", num_local_experts=2)
    with pytest.raises(UnknownArchitecture, match=r"MixtralDecoderLayer.*experts.*--module"):
        find_adapter(model)


def test_the_shared_expert_of_a_mixture_can_be_named() -> None:
    model = build(
        "Qwen2MoeConfig",
        moe_intermediate_size=16,
        shared_expert_intermediate_size=48,
        num_experts=2,
        num_experts_per_tok=1,
    )
    with pytest.raises(UnknownArchitecture, match=r"mlp\.shared_expert\.down_proj"):
        find_adapter(model)
    adapter = find_adapter(model, "model.layers.{}.mlp.shared_expert.down_proj")
    assert (adapter.n_layers, adapter.d, adapter.d_k(0)) == (LAYERS, D, 48)


def test_blocks_that_differ_are_refused_and_named_one_by_one() -> None:
    model = build(
        "Qwen2MoeConfig",
        moe_intermediate_size=16,
        shared_expert_intermediate_size=48,
        num_experts=2,
        num_experts_per_tok=1,
        mlp_only_layers=[1],
    )
    adapter = find_adapter(model, "model.layers.{}.mlp.down_proj")
    assert adapter.d_k(1) == D_K
    with pytest.raises(BadLayer, match=r"Layer 0 has no linear map 'mlp.down_proj'.*are 1\."):
        adapter.weight(0)


@pytest.mark.parametrize(
    ("module", "why"),
    [
        ("model.layers.0.mlp.down_proj", r"exactly one \{\}"),
        ("model.{}.{}.mlp.down_proj", r"exactly one \{\}"),
        ("model.layers.{}.mlp.c_proj", "leads to no linear map"),
        ("transformer.h.{}.mlp.c_proj", "leads to no linear map"),
        ("model.layers.{}", "leads to no linear map"),
        ("model.layers.{}.mlp", "leads to no linear map"),
        ("{}", "leads to no linear map"),
        ("", r"exactly one \{\}"),
    ],
)
def test_a_wrong_module_name_is_answered_with_what_exists(module: str, why: str) -> None:
    with pytest.raises(UnknownArchitecture, match=rf"{why}.*model\.layers\.\{{\}}\.mlp\.down_proj"):
        find_adapter(tiny_model("llama"), module)


def test_a_named_module_is_taken_also_where_another_would_be_found() -> None:
    adapter = find_adapter(tiny_model("llama"), "model.layers.{}.self_attn.o_proj")
    assert adapter.weight(1).shape == (D, D)
    assert adapter.weight_name(1) == "model.layers.1.self_attn.o_proj.weight"


def test_an_mlp_as_wide_as_the_model_still_has_one_projection() -> None:
    adapter = find_adapter(tiny_model("llama", intermediate_size=D))
    assert adapter.template == "model.layers.{}.mlp.down_proj"


def test_the_text_decoder_is_told_from_a_vision_tower_of_the_same_depth() -> None:
    text = {**SIZES, "head_dim": 8, "query_pre_attn_scalar": 8}
    vision = {**SIZES, "image_size": 8, "patch_size": 4}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    adapter = find_adapter(model)
    assert "vision" not in adapter.template
    assert adapter.template.endswith("layers.{}.mlp.down_proj")
    assert adapter.post_norm(0) is not None


def test_an_encoder_decoder_is_refused() -> None:
    config = transformers.T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=16, num_layers=2)
    with pytest.raises(UnknownArchitecture, match="encoder-decoder"):
        find_adapter(transformers.T5ForConditionalGeneration(config))


class Block(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


class Foreign(nn.Module):
    """A model that transformers does not know."""

    def __init__(self, *blocks: nn.Module, **config: Any) -> None:
        super().__init__()
        self.stack = nn.ModuleList(blocks)
        self.config = SimpleNamespace(**config)


def test_a_foreign_model_is_found_by_its_structure() -> None:
    blocks = [Block(up=nn.Linear(4, 6), back=nn.Linear(6, 4)) for _ in range(2)]
    adapter = find_adapter(Foreign(*blocks, num_hidden_layers=2, hidden_size=4))
    assert (adapter.template, adapter.d_k(1)) == ("stack.{}.back", 6)
    assert torch.equal(adapter.weight(1), blocks[1].back.weight)


def test_two_candidates_of_one_block_are_told_apart_by_the_stated_width() -> None:
    blocks = [
        Block(side=nn.Sequential(nn.Linear(3, 4)), mlp=nn.Sequential(nn.Linear(6, 4)))
        for _ in range(2)
    ]
    with pytest.raises(UnknownArchitecture, match=r"2 modules.*side\.0, mlp\.0"):
        find_adapter(Foreign(*blocks, num_hidden_layers=2, hidden_size=4))
    stated = Foreign(*blocks, num_hidden_layers=2, hidden_size=4, intermediate_size=6)
    assert find_adapter(stated).template == "stack.{}.mlp.0"


def test_lists_inside_the_blocks_are_not_the_blocks() -> None:
    blocks = [Block(experts=nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])) for _ in range(2)]
    foreign = Foreign(*(Block(mlp=block) for block in blocks), num_hidden_layers=2, hidden_size=4)
    assert find_adapter(foreign, "stack.{}.mlp.experts.1").d_k(0) == 4
    with pytest.raises(UnknownArchitecture, match=r"2 modules.*mlp\.experts\.0, mlp\.experts\.1"):
        find_adapter(foreign)


def test_no_candidate_no_list_and_no_config_are_refused() -> None:
    narrow = Foreign(Block(a=nn.Linear(4, 3)), num_hidden_layers=1, hidden_size=4)
    with pytest.raises(UnknownArchitecture, match="lists of that length: none"):
        find_adapter(narrow)
    attention = Foreign(Block(attn=Block(o=nn.Linear(4, 4))), num_hidden_layers=1, hidden_size=4)
    with pytest.raises(UnknownArchitecture, match=r"outside its attention.*found attn\.o"):
        find_adapter(attention)
    with pytest.raises(UnknownArchitecture, match="no num_hidden_layers"):
        find_adapter(Foreign(Block(a=nn.Linear(4, 4)), hidden_size=4))
    with pytest.raises(UnknownArchitecture, match="Linear has no config"):
        find_adapter(nn.Linear(2, 2))
