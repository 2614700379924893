"""Tiny random models of every supported architecture, made from their configs.

from tiny_models import ARCHITECTURES, tiny_model, tiny_tokenizer

model = tiny_model("llama")
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers

from tiny_tokenizers import VOCAB_SIZE, tiny_tokenizer

__all__ = ["ARCHITECTURES", "D_K", "LAYERS", "VOCAB_SIZE", "D", "tiny_model", "tiny_tokenizer"]

LAYERS, D, D_K, HEADS, CONTEXT = 3, 32, 64, 4, 256

_GPT2 = {"n_layer": LAYERS, "n_embd": D, "n_head": HEADS, "n_inner": D_K, "n_positions": CONTEXT}
_LLAMA = {
    "num_hidden_layers": LAYERS,
    "hidden_size": D,
    "intermediate_size": D_K,
    "num_attention_heads": HEADS,
    "max_position_embeddings": CONTEXT,
}
_GROUPED = {**_LLAMA, "num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": D // HEADS, "query_pre_attn_scalar": D // HEADS}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", _GPT2),
    "gptj": ("GPTJConfig", {**_GPT2, "rotary_dim": 4}),
    "gpt_neox": ("GPTNeoXConfig", _LLAMA),
    "llama": ("LlamaConfig", _GROUPED),
    "mistral": ("MistralConfig", _GROUPED),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3Config", {**_GROUPED, "head_dim": D // HEADS}),
    "gemma2": ("Gemma2Config", {**_GEMMA, "sliding_window": 64}),
    "gemma3": ("Gemma3TextConfig", {**_GEMMA, "sliding_window": 64}),
    "phi": ("PhiConfig", _LLAMA),
    "opt": (
        "OPTConfig",
        {
            "num_hidden_layers": LAYERS,
            "hidden_size": D,
            "ffn_dim": D_K,
            "num_attention_heads": HEADS,
            "word_embed_proj_dim": D,
            "max_position_embeddings": CONTEXT,
        },
    ),
}


def tiny_model(architecture: str, seed: int = 0, **overrides: Any) -> Any:
    """A random model in float32 and evaluation mode.

    The weights are larger than a training run's first ones, and norms and biases are not the usual ones and zeros: with
    those, a forgotten gain or bias would not show.

    Args:
        architecture: A key of `ARCHITECTURES`.
        seed: The same seed gives the same weights.
        overrides: Fields of the config to set differently.
    """
    name, fields = _CONFIGS[architecture]
    settings = {
        "vocab_size": VOCAB_SIZE,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **fields,
        **overrides,
    }
    config = getattr(transformers, name)(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                else:  # versions of transformers draw differently
                    parameter.normal_(std=0.2)
    return model.float().eval()


ARCHITECTURES: dict[str, Callable[..., Any]] = {name: functools.partial(tiny_model, name) for name in _CONFIGS}
