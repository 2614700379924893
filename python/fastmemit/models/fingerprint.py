"""Which model is this: a short text that changes with every bit of its weights.

Statistics and edits belong to one exact model.  The name says little: an edited copy, another
revision or another dtype bear the same one.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from fastmemit.errors import OffloadedWeight
from fastmemit.models.stored import stored_tensors

_WORDS = 1 << 20  # 64-bit words at a time: 8 MB, which stays in the caches
_MODULUS = 1 << 64
# Fields of a config that say nothing about the function a model in evaluation mode computes.
_VOLATILE = {
    "architectures",
    "attn_implementation",
    "auto_map",
    "dtype",
    "initializer_range",
    "name_or_path",
    "pretraining_tp",
    "quantization_config",
    "task_specific_params",
    "tie_word_embeddings",  # shows in the tensors
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_PROBE = "The 3 quick brown foxes, naïve 日本 🙂\n"


def checksum(tensor: torch.Tensor) -> str:
    """A text that changes with any bit of a tensor, its shape or its dtype.

    Two sums modulo 2^64 over the tensor's bytes, read as 64-bit words: a plain one, and one with
    each word weighted by its place.  Both are linear, so they tell apart what happens to weights;
    they are no protection against someone who constructs a collision.  They are computed on the
    tensor's own device and do not depend on it.

    Raises:
        OffloadedWeight: The tensor is not in memory.
    """
    if tensor.is_meta:
        raise OffloadedWeight(
            "A tensor on the device meta has no values to identify; load it without offloading."
        )
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    plain = weighted = 0
    places: torch.Tensor | None = None
    for start in range(0, flat.numel(), 8 * _WORDS):
        piece = flat[start : start + 8 * _WORDS]
        lacking = -piece.numel() % 8
        if lacking or piece.storage_offset() % 8:  # the last bytes, or a view between two words
            piece = torch.cat([piece, piece.new_zeros(lacking)])
        words = piece.view(torch.int64)
        if places is None:
            places = torch.arange(1, words.numel() + 1, device=words.device)
        total = int(words.sum())
        plain += total
        # Integer arithmetic of torch wraps around, which is the modulus wanted here.
        weighted += int((words * places[: words.numel()]).sum()) + start // 8 * total
    shape = "x".join(map(str, tensor.shape))
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype}[{shape}]:{plain % _MODULUS:016x}{weighted % _MODULUS:016x}"


def fingerprint(model: Any) -> str:
    """The identity of a model: 64 hexadecimal digits.

    It changes with any bit of any parameter, persistent buffer or scale of a quantised weight, and
    with those fields of the config that change what the model computes.  The same weights loaded
    again, on any device or offloaded, have the same fingerprint; in another dtype, or quantised,
    they have another.

    Raises:
        OffloadedWeight: Some weight is neither in memory nor where accelerate offloads to.
    """
    content = {
        "config": _essence(model.config.to_dict()),
        "tensors": {name: checksum(tensor) for name, tensor in stored_tensors(model)},
    }
    return hashlib.sha256(_canonical(content)).hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """The identity of a tokenizer: 64 hexadecimal digits.

    Fast tokenizers by their whole definition, slow ones by vocabulary, special tokens and what they
    make of a sample text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        # Every call with padding or truncation leaves its settings behind in the definition.
        content.pop("padding", None)
        content.pop("truncation", None)
    else:
        content = {
            "class": type(tokenizer).__name__,
            "vocab": {**tokenizer.get_vocab(), **tokenizer.get_added_vocab()},
            "special": tokenizer.all_special_tokens,
            "sample": list(tokenizer(_PROBE)["input_ids"]),
        }
    return hashlib.sha256(_canonical(content)).hexdigest()


def _essence(config: dict[str, Any]) -> dict[str, Any]:
    """A config without what is volatile, unset or about training and generation only.

    Fields that every config has are left out: the base class gains and loses them between versions
    of transformers, and none changes the weights' function.
    """
    from transformers import PretrainedConfig

    common = set(PretrainedConfig().to_dict()) - {"model_type"}
    kept = _without(config, common | _VOLATILE)
    # Version 5 of transformers puts into one dict what version 4 kept in two fields.
    rope = {"rope_theta": kept.pop("rope_theta", None), **kept.pop("rope_scaling", {})}
    rope.update(kept.pop("rope_parameters", {}))
    if rope.get("rope_type") == "default":
        del rope["rope_type"]
    kept["rope"] = {name: value for name, value in rope.items() if value is not None}
    return kept


def _without(config: dict[str, Any], names: set[str]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in config.items():
        trained = "dropout" in name or name.endswith(("_pdrop", "_token_id", "_token_ids"))
        if value is None or name in names or name.startswith("_") or trained:
            continue
        kept[name] = _without(value, names) if isinstance(value, dict) else value
    return kept


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, ensure_ascii=True, default=str).encode()
