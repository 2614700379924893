"""What cannot be told from the structure is refused with what was found, and can be named."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from fastmemit.errors import BadLayer, UnknownArchitecture, WrongModel
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


def test_a_mixture_of_experts_is_refused_without_advice_that_fails() -> None:
    model = build("MixtralConfig", num_local_experts=2)
    with pytest.raises(UnknownArchitecture, match=r"MixtralDecoderLayer.*mlp\.experts\.down_proj") as e:
        find_adapter(model)
    assert "--module" not in str(e.value) and "q_proj" not in str(e.value)


def test_experts_in_a_list_are_refused_as_well() -> None:
    def experts() -> nn.ModuleList:
        return nn.ModuleList([Block(down=nn.Linear(6, 4)) for _ in range(2)])

    blocks = [Block(mlp=Block(experts=experts())) for _ in range(3)]
    with pytest.raises(UnknownArchitecture, match=r"mlp\.experts\.0\.down") as e:
        find_adapter(Foreign(*blocks, num_hidden_layers=3, hidden_size=4))
    assert "--module" not in str(e.value)


def test_mamba_is_told_apart_from_experts_and_its_own_map_is_the_example() -> None:
    model = build("MambaConfig", state_size=4, expand=2, time_step_rank=2)
    example = 'MambaBlock has no MLP.*--module "backbone.layers.{}.mixer.out_proj"'
    with pytest.raises(UnknownArchitecture, match=example) as e:
        find_adapter(model)
    assert "expert" not in str(e.value)
    assert find_adapter(model, "backbone.layers.{}.mixer.out_proj").layers == list(range(LAYERS))


@pytest.mark.parametrize("dense", [(0,), (1,), (0, 2)])
def test_blocks_without_the_projection_do_not_hide_those_that_have_it(dense: Any) -> None:
    model = build(
        "Qwen2MoeConfig", moe_intermediate_size=16, shared_expert_intermediate_size=48,
        num_experts=2, num_experts_per_tok=1, mlp_only_layers=list(dense),
    )  # fmt: skip
    adapter = find_adapter(model)
    assert adapter.template == "model.layers.{}.mlp.down_proj"
    assert adapter.layers == list(dense)
    assert [adapter.block(layer) for layer in range(LAYERS)] == list(model.model.layers)


def test_blocks_of_several_classes_are_one_list() -> None:
    model = build(
        "JambaConfig", num_experts=1, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4,
        mamba_dt_rank=2, use_mamba_kernels=False, intermediate_size=2 * D,
    )  # fmt: skip
    assert len({type(block) for block in model.model.layers}) == 2
    # The mixer's own way out is as wide as the MLP's, and is not taken for it.
    adapter = find_adapter(model)
    assert adapter.template == "model.layers.{}.feed_forward.down_proj"
    assert adapter.layers == list(range(LAYERS))


def test_a_shared_transformer_inside_its_blocks_is_not_taken_for_attention() -> None:
    fields = {
        "attention_head_dim": 16, "mamba_d_state": 8, "mamba_ngroups": 1, "n_mamba_heads": 8,
        "mamba_headdim": 8, "num_mem_blocks": 1, "adapter_rank": 4, "num_key_value_heads": 4,
        "layers_block_type": ["mamba", "hybrid", "hybrid"],
    }  # fmt: skip
    adapter = find_adapter(build("Zamba2Config", **fields))
    assert adapter.template.endswith("shared_transformer.feed_forward.down_proj")
    assert adapter.layers == []
    with pytest.raises(BadLayer, match=r"layers 1, 2 share"):
        adapter.check_layer(2)


def test_widths_stated_for_each_block_tell_candidates_apart() -> None:
    blocks = [Block(side=nn.Linear(3, 4), mlp=Block(down=nn.Linear(n, 4))) for n in (6, 8)]
    with pytest.raises(UnknownArchitecture, match=r'--module "stack\.{}\.mlp\.down"'):
        find_adapter(Foreign(*blocks, num_hidden_layers=2, hidden_size=4))
    stated = Foreign(*blocks, num_hidden_layers=2, hidden_size=4, intermediate_size=[6, 8])
    assert find_adapter(stated).template == "stack.{}.mlp.down"


def test_vectors_of_three_dimensions_are_no_experts() -> None:
    model = build("RwkvConfig", attention_hidden_size=D, context_length=64)
    assert model.rwkv.blocks[0].feed_forward.time_mix_key.ndim == 3
    assert find_adapter(model).template == "rwkv.blocks.{}.feed_forward.value"


def test_blocks_that_share_a_projection_are_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    adapter = find_adapter(model)
    assert adapter.layers == [2]
    with pytest.raises(BadLayer, match=r"layers 0, 1 share one 'mlp.down_proj'.*own are 2\."):
        adapter.weight(1)


def test_blocks_that_share_a_weight_alone_are_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[2].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    with pytest.raises(BadLayer, match=r"layers 0, 2 share"):
        find_adapter(model).projection(0)


@pytest.mark.parametrize(
    "wrapped", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel], ids=["compile", "dp"]
)
def test_a_wrapper_is_taken_off(wrapped: Any) -> None:
    model = tiny_model("llama")
    adapter = find_adapter(wrapped(model))
    assert adapter.model is model
    assert adapter.weight_name(0) == "model.layers.0.mlp.down_proj.weight"


def test_a_model_with_an_adapter_in_it_has_its_own_names() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    settings = {"r": 2, "task_type": "CAUSAL_LM"}
    on_attention = peft.LoraConfig(target_modules=["q_proj"], **settings)
    adapter = find_adapter(peft.get_peft_model(model, on_attention))
    assert adapter.weight_name(0) == "model.layers.0.mlp.down_proj.weight"
    assert adapter.weight(0).data_ptr() == model.model.layers[0].mlp.down_proj.weight.data_ptr()
    on_edited = peft.LoraConfig(target_modules=["down_proj"], **settings)
    adapter = find_adapter(peft.get_peft_model(tiny_model("llama"), on_edited))
    with pytest.raises(WrongModel, match=r"adapter.*merge_and_unload"):
        adapter.weight(0)
    prompt = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(UnknownArchitecture, match="give the base model"):
        find_adapter(peft.get_peft_model(tiny_model("llama"), prompt))


def test_a_model_compiled_in_parts_is_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    with pytest.raises(UnknownArchitecture, match=r"model\.layers\.1 was compiled in place"):
        find_adapter(model)
    model = tiny_model("llama")
    model.model.layers[2].compile(backend="eager")
    with pytest.raises(UnknownArchitecture, match=r"model\.layers\.2 was compiled in place"):
        find_adapter(model)


MIXTURE = {
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 48, "num_experts": 2, "num_experts_per_tok": 1,
}  # fmt: skip


def test_the_shared_expert_of_a_mixture_can_be_named() -> None:
    model = build("Qwen2MoeConfig", **MIXTURE)
    with pytest.raises(UnknownArchitecture, match=r"mlp\.shared_expert\.down_proj"):
        find_adapter(model)
    adapter = find_adapter(model, "model.layers.{}.mlp.shared_expert.down_proj")
    assert (adapter.n_layers, adapter.d, adapter.d_k(0)) == (LAYERS, D, 48)


def test_blocks_that_differ_are_refused_and_named_one_by_one() -> None:
    model = build("Qwen2MoeConfig", **MIXTURE, mlp_only_layers=[1])
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
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = transformers.Gemma3ForConditionalGeneration(config)
    adapter = find_adapter(model)
    assert "vision" not in adapter.template
    assert adapter.template.endswith("layers.{}.mlp.down_proj")
    assert not adapter.adds_plainly(0)


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
    blocks = [Block(side=nn.Sequential(nn.Linear(3, 4)), mlp=nn.Sequential(nn.Linear(6, 4))) for _ in range(2)]
    with pytest.raises(UnknownArchitecture, match=r"2 modules.*side\.0, mlp\.0"):
        find_adapter(Foreign(*blocks, num_hidden_layers=2, hidden_size=4))
    stated = Foreign(*blocks, num_hidden_layers=2, hidden_size=4, intermediate_size=6)
    assert find_adapter(stated).template == "stack.{}.mlp.0"


def test_lists_inside_the_blocks_are_not_the_blocks() -> None:
    blocks = [Block(experts=nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])) for _ in range(2)]
    foreign = Foreign(*(Block(mlp=block) for block in blocks), num_hidden_layers=2, hidden_size=4)
    assert find_adapter(foreign, "stack.{}.mlp.experts.1").d_k(0) == 4
    with pytest.raises(UnknownArchitecture, match=r"side by side.*mlp\.experts\.0, mlp\.experts\.1"):
        find_adapter(foreign)


def test_no_candidate_no_list_and_no_config_are_refused() -> None:
    narrow = Foreign(Block(a=nn.Linear(4, 3)), num_hidden_layers=1, hidden_size=4)
    with pytest.raises(UnknownArchitecture, match="lists of that length: none"):
        find_adapter(narrow)
    attention = Foreign(Block(attn=Block(o=nn.Linear(4, 4))), num_hidden_layers=1, hidden_size=4)
    with pytest.raises(UnknownArchitecture, match=r'no MLP.*found attn\.o.*"stack\.{}\.attn\.o"'):
        find_adapter(attention)
    with pytest.raises(UnknownArchitecture, match="no num_hidden_layers"):
        find_adapter(Foreign(Block(a=nn.Linear(4, 4)), hidden_size=4))
    with pytest.raises(UnknownArchitecture, match="Linear has no config"):
        find_adapter(nn.Linear(2, 2))
