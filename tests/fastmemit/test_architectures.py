"""Many architectures of transformers, end to end: right to a literal full forward, or one sentence.

The literal forward runs each row of tokens alone through the whole model, without padding, cache or stages, and puts a
vector in the place of what the edited block or projection gives the subject.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from fastmemit import Editor, EditRequest
from fastmemit.answers import judge_answers
from fastmemit.data import corpus_from_texts
from fastmemit.errors import BadLayer, FastmemitError, UnknownArchitecture
from fastmemit.models.running import hidden_of, with_hidden
from fastmemit.targets import TargetSettings, optimise
from fastmemit.text import request_rows
from tiny_models import tiny_tokenizer
from tiny_tokenizers import VOCAB_SIZE

WIDE = {
    "num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
    "max_position_embeddings": 256,
}  # fmt: skip
GROUPED = {**WIDE, "num_key_value_heads": 2, "head_dim": 8}
GPT = {"n_layer": 4, "n_embd": 32, "n_head": 4, "n_positions": 256}
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}

#: name -> config, its fields, the layers that can be edited, whether targets run whole rows.
RIGHT: dict[str, tuple[str, dict[str, Any], list[int], bool]] = {
    "olmo2": ("Olmo2Config", GROUPED, [0, 1, 2, 3], False),
    "cohere2": ("Cohere2Config", {**GROUPED, **SLIDING}, [0, 1, 2, 3], False),
    "bloom": ("BloomConfig", {"n_layer": 4, "hidden_size": 32, "n_head": 4}, [0, 1, 2, 3], False),
    "falcon": (
        "FalconConfig", {**WIDE, "alibi": True, "new_decoder_architecture": False,
        "parallel_attn": False}, [0, 1, 2, 3], False,
    ),
    "mpt": (
        "MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 4, "expansion_ratio": 2,
        "max_seq_len": 256}, [0, 1, 2, 3], False,
    ),
    "stablelm": ("StableLmConfig", GROUPED, [0, 1, 2, 3], False),
    "nemotron": ("NemotronConfig", GROUPED, [0, 1, 2, 3], False),
    "granite": ("GraniteConfig", {**GROUPED, "residual_multiplier": 0.5}, [0, 1, 2, 3], False),
    "glm4": ("Glm4Config", GROUPED, [0, 1, 2, 3], False),
    "starcoder2": ("Starcoder2Config", GROUPED, [0, 1, 2, 3], False),
    "bert as a decoder": ("BertConfig", {**WIDE, "is_decoder": True}, [0, 1, 2, 3], False),
    "deepseek v3": (
        "DeepseekV3Config", {**WIDE, **LATENT, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_shared_experts": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 2,
        "n_group": 1, "topk_group": 1}, [0, 1], False,
    ),
    "llama 4": (
        "Llama4TextConfig", {**GROUPED, "intermediate_size_mlp": 64, "num_local_experts": 2,
        "num_experts_per_tok": 1, "interleave_moe_layer_step": 2}, [0, 2], False,
    ),
    "lfm2": (
        "Lfm2Config", {**WIDE, "num_key_value_heads": 2,
        "layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 16},
        [0, 1, 2, 3], True,
    ),
    "recurrent gemma": (
        "RecurrentGemmaConfig", {**WIDE, "num_key_value_heads": 1, "lru_width": 32,
        "attention_window_size": 64, "block_types": ["recurrent", "attention"]},
        [0, 1, 2, 3], True,
    ),
    "gpt 1": ("OpenAIGPTConfig", GPT, [0, 1, 2, 3], True),
}  # fmt: skip

REFUSED: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "mixtral": (
        "MixtralConfig", {**GROUPED, "num_local_experts": 4}, UnknownArchitecture,
        r"mlp\.experts\.down_proj.*none that every token goes through",
    ),
    "gpt-oss": (
        "GptOssConfig", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
        UnknownArchitecture, "none that every token goes through",
    ),
    "mamba 2": (
        "Mamba2Config", {"hidden_size": 32, "num_hidden_layers": 4, "state_size": 8,
        "num_heads": 8, "head_dim": 8, "n_groups": 1}, UnknownArchitecture,
        r'has no MLP.*--module "backbone\.layers\.\{\}\.mixer\.out_proj"',
    ),
    "zamba 2": (
        "Zamba2Config", {**WIDE, "num_key_value_heads": 4, "attention_head_dim": 16,
        "mamba_d_state": 8, "mamba_ngroups": 1, "n_mamba_heads": 8, "mamba_headdim": 8,
        "num_mem_blocks": 1, "layers_block_type": ["mamba", "hybrid"] * 2, "adapter_rank": 4},
        BadLayer, "No block of Zamba2ForCausalLM has a projection of its own",
    ),
    "bert": ("BertConfig", WIDE, UnknownArchitecture, "not causal.*is_decoder=True"),
    "xlnet": (
        "XLNetConfig", {"d_model": 32, "n_layer": 4, "n_head": 4, "d_inner": 64},
        UnknownArchitecture, "not causal",
    ),
}  # fmt: skip

REQUESTS = [
    EditRequest("{} is located in the city of", "The Eiffel Tower", "Rome"),
    EditRequest("They say that {} plays", "Ann", "the violin"),
]
CONTEXTS = ("", "The old man said so. ")
TEXTS = [f"{r.text} {r.target_new}, as {a} of {b} said." for r in REQUESTS for a in "ABCDEF"
         for b in ("Rome", "Paris", "the piano", "a small town", "Italy")]  # fmt: skip


def build(config: str, fields: dict[str, Any]) -> Any:
    if not hasattr(transformers, config):
        pytest.skip(f"transformers {transformers.__version__} has no {config}")
    special = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = getattr(transformers, config)(**{**special, **fields})
        model = transformers.AutoModelForCausalLM.from_config(made)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                elif not any(part in name for part in ("A_log", "dt_", "conv", "rg_lru")):
                    parameter.normal_(std=0.2)
    return model.float().eval()


class Literal:
    """The loss of one request, from full forwards of each of its rows alone."""

    def __init__(self, model: Any, module: nn.Module, rows: Any, settings: TargetSettings) -> None:
        self.model, self.module, self.rows, self.settings = model, module, rows, settings
        self.start = torch.zeros(0)
        self.log_p0: Tensor | None = None

    def logits(self, row: Any, delta: Tensor, first: bool) -> Tensor:
        def put(_module: nn.Module, _args: Any, out: Any) -> Any:
            states = hidden_of(out).reshape(len(row.ids), -1)
            if first and not len(self.start):
                self.start = states[row.subject].detach().clone()
            moved = torch.zeros_like(states).index_add(0, torch.tensor([row.subject]), delta[None])
            return with_hidden(out, (states + moved).reshape(hidden_of(out).shape))

        handle = self.module.register_forward_hook(put)
        try:
            ids = torch.tensor([row.ids])
            mask = torch.ones_like(ids)
            return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
        finally:
            handle.remove()

    def loss(self, delta: Tensor) -> Tensor:
        logits = [self.logits(r, delta, not i).log_softmax(-1) for i, r in enumerate(self.rows.rows)]
        costs = [
            -sum(logits[i][place, token] for place, token in row.reads) / len(row.reads)
            for i, row in enumerate(self.rows.rows)
            if row.reads
        ]
        now = logits[self.rows.kl][self.rows.rows[self.rows.kl].subject]
        if self.log_p0 is None:
            self.log_p0 = now.detach()
        divergence = (now.exp() * (now - self.log_p0)).sum()
        decay = self.settings.weight_decay * delta.norm() / self.start.square().sum()
        return sum(costs) / len(costs) + self.settings.kl_factor * divergence + decay


def assert_targets_are_literal(editor: Editor, layer: int, site: Any) -> None:
    adapter, tokenizer = editor.adapter, editor.tokenizer
    settings = TargetSettings(layer, site, steps=2, learning_rate=0.1, clamp=100.0)
    targets = optimise(adapter, tokenizer, REQUESTS, CONTEXTS, settings)
    module = adapter.block(layer) if site == "block" else adapter.projection(layer)
    for request, target in zip(REQUESTS, targets, strict=True):
        rows = request_rows(tokenizer, request, CONTEXTS)
        literal = Literal(editor.model, module, rows, settings)
        delta = torch.zeros(adapter.d, requires_grad=True)
        first = literal.loss(delta)
        assert target.losses[0] == pytest.approx(first.item(), rel=1e-4, abs=1e-4)
        torch.testing.assert_close(target.start, literal.start, rtol=1e-4, atol=1e-5)
        (gradient,) = torch.autograd.grad(first, delta)
        # Adam's first step is the learning rate against the gradient's sign, in each coordinate.
        step = target.vector - target.start
        plain = gradient.abs() > 0.01 * gradient.abs().max()
        assert int(plain.sum()) > adapter.d // 2
        wanted = -settings.learning_rate * gradient.sign()[plain]
        torch.testing.assert_close(step[plain], wanted, rtol=1e-3, atol=1e-4)
        with torch.no_grad():
            last = literal.loss(step).item()
        assert target.losses[1] == pytest.approx(last, rel=1e-3, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", RIGHT)
def test_it_is_edited_as_a_literal_full_forward_says(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, fields, layers, whole = RIGHT[name]
    model, tokenizer = build(config, fields), tiny_tokenizer("bpe_bos")
    editor = Editor(model, tokenizer, cache_dir=tmp_path)
    assert editor.adapter.layers == layers
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        used = sorted({i for m in ("memit", "emmet", "rome") for i in editor.config(m).layers})
        editor.precompute(corpus_from_texts("t", TEXTS), multiplier=1, layers=used)
        for site in ("block", "projection"):
            assert_targets_are_literal(editor, editor.config("emmet").layers[0], site)
    said = [r.getMessage() for r in caplog.records if r.name.startswith("fastmemit")]
    assert any("run whole rows" in line for line in said) == whole
    questions = [(r.text, r.target) for r in REQUESTS]
    unedited = [answer.nll for answer in judge_answers(editor.adapter, tokenizer, questions)]
    for method in ("memit", "emmet", "rome"):
        try:
            edit = editor.edit(REQUESTS, method, steps=3, ridge=0.1)
        except FastmemitError as error:  # a block whose projection cannot carry the move
            assert str(error).endswith(".") and method != "rome"
            continue
        edited = [answer.nll for answer in judge_answers(editor.adapter, tokenizer, questions)]
        literal = [self_cost(model, tokenizer, *question) for question in questions]
        assert edited == pytest.approx(literal, rel=1e-3, abs=1e-3)
        assert edited != unedited
        edit.undo()
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def self_cost(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """Mean cost of the answer's tokens, one text alone."""
    ids = tokenizer(prompt + answer)["input_ids"]
    n = len(ids) - len(tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        tokens = torch.tensor([ids])
        out = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    log_p = out.logits[0].log_softmax(-1)
    return -math.fsum(float(log_p[i - 1, ids[i]]) for i in range(len(ids) - n, len(ids))) / n


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_one_sentence_before_anything_is_collected(name: str, tmp_path: Path) -> None:
    config, fields, error, said = REFUSED[name]
    with pytest.raises(error, match=said) as raised:
        editor = Editor(build(config, fields), tiny_tokenizer("bpe_bos"), cache_dir=tmp_path)
        editor.precompute(corpus_from_texts("t", TEXTS), multiplier=1)
    assert str(raised.value).endswith(".") and "\n" not in str(raised.value)
    assert not list(tmp_path.rglob("*.safetensors"))
