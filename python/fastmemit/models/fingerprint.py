"""Which model is this: a short text that changes with every bit of its weights.

Statistics and edits belong to one exact model.  The name says little: an edited copy, another
revision or another dtype bear the same one.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from fastcov.hooks import isolated
from fastmemit.errors import OffloadedWeight
from fastmemit.models.stored import stored_tensors

#: Goes up with every change of how a fingerprint is computed.
RECIPE = 2
_WORDS = 1 << 17  # 64-bit words in a block: 1 MB, which stays in the caches
_CPU = torch.device("cpu")
_TOGETHER = 32  # blocks that an accelerator takes at a time
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


def checksum(tensor: Tensor) -> str:
    """A text that changes with any bit of a tensor, its shape or its dtype.

    The tensor's bytes, in the order of its elements, are read as 64-bit words ``x_i`` in blocks of 131,072. With a
    fixed word ``k_i`` for each place in a block and ``y_i = x_i xor k_i``, a block has two sums modulo 2^64: ``sum y_i
    (y_i >> 32)``, which no change of sign or order leaves as it is, and ``sum y_i``, which every change of a single
    word changes. BLAKE2 makes one text of the sums of all blocks.

    Two tensors that differ in several words have the same checksum with a probability of about 2^-32 for each block in
    which they differ. It is no protection against someone who constructs a collision. The sums are computed on the
    tensor's own device and do not depend on it.

    Raises:
        OffloadedWeight: The tensor is not in memory.
    """
    return checksums([("", tensor)])[""]


@isolated()
def checksums(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """The checksum of each tensor by name, with one wait for each device.

    Raises:
        OffloadedWeight: A tensor is not in memory.
    """
    kinds: dict[str, tuple[str, int]] = {}  # name -> dtype and shape, number of blocks
    pending: dict[torch.device, list[tuple[str, Tensor]]] = {}
    with _Summing() as summing:
        for name, tensor in tensors:
            if tensor.is_meta:
                raise OffloadedWeight(
                    f"A tensor {name!r} on the device meta has no values to identify; load it without offloading."
                )
            sums = summing(_words(tensor))
            shape = "x".join(map(str, tensor.shape))
            dtype = str(tensor.dtype).removeprefix("torch.")
            kinds[name] = (f"{dtype}[{shape}]", len(sums))
            pending.setdefault(sums.device, []).append((name, sums))
    digests: dict[str, str] = {}
    for parts in pending.values():
        values = torch.cat([sums for _, sums in parts]).cpu().numpy().astype("<i8")
        start = 0
        for name, sums in parts:
            block = values[start : start + len(sums)]
            start += len(sums)
            digests[name] = hashlib.blake2b(block.tobytes(), digest_size=16).hexdigest()
    return {name: f"{kind}:{digests[name]}" for name, (kind, _) in kinds.items()}


def _words(tensor: Tensor) -> Tensor:
    """A tensor's bytes in the order of its elements as int64 (n,), the last filled with zeros."""
    # Apple's GPUs lack some operations on 64-bit integers; they share the computer's memory.
    flat = tensor.detach().to("cpu") if tensor.device.type == "mps" else tensor.detach()
    flat = flat.contiguous().reshape(-1).view(torch.uint8)
    lacking = -flat.numel() % 8
    if lacking or flat.storage_offset() % 8:  # a view that begins between two words
        flat = torch.cat([flat, flat.new_zeros(lacking)])
    return flat.view(torch.int64)


class _Summing:
    """The sums (blocks, 2) of words (n,), on their device.

    On the CPU each thread of torch's number takes blocks of its own, in buffers that stay in its caches: the product of
    two integer vectors is computed by one thread alone.
    """

    def __enter__(self) -> _Summing:
        number = torch.get_num_threads()
        self._threads = ThreadPoolExecutor(number) if number > 1 else None
        self._buffers: list[Any] = [None] * number
        return self

    def __exit__(self, *_: object) -> None:
        if self._threads is not None:
            self._threads.shutdown()

    def __call__(self, words: Tensor) -> Tensor:
        return (self.on_cpu if words.device.type == "cpu" else self.on_accelerator)(words)

    def on_cpu(self, words: Tensor) -> Tensor:
        blocks = words.split(_WORDS)
        number = len(self._buffers)
        if self._threads is None or len(blocks) < 2:
            return torch.stack(self._in_caches(0, blocks)).view(-1, 2)
        size = -(-len(blocks) // number)
        shares = [blocks[i : i + size] for i in range(0, len(blocks), size)]
        found = self._threads.map(self._in_caches, range(number), shares)
        return torch.stack([each for sums in found for each in sums]).view(-1, 2)

    def _in_caches(self, thread: int, blocks: Sequence[Tensor]) -> list[Tensor]:
        """The sums of some blocks on the CPU, in the buffer of one thread."""
        if self._buffers[thread] is None:
            self._buffers[thread] = _keys(_CPU).new_empty(_WORDS), _keys(_CPU).new_empty(_WORDS)
        keys, (y, high) = _keys(_CPU), self._buffers[thread]
        sums = []
        for words in blocks:
            if len(words) < _WORDS:
                keys, y, high = (t[: len(words)] for t in (keys, y, high))
            torch.bitwise_xor(words, keys, out=y)
            torch.bitwise_right_shift(y, 32, out=high)
            sums += [torch.dot(y, high), y.sum()]
        return sums

    def on_accelerator(self, words: Tensor) -> Tensor:
        whole = len(words) // _WORDS * _WORDS
        keys, found = _keys(words.device), []
        rest = [words[None, whole:]] if whole < len(words) or not whole else []
        for blocks in (*words[:whole].view(-1, _WORDS).split(_TOGETHER), *rest):
            y = blocks ^ keys[: blocks.shape[1]]
            found.append(torch.stack([(y >> 32).mul_(y).sum(1), y.sum(1)], 1))
        return torch.cat(found)


@functools.cache
def _keys(device: torch.device) -> Tensor:
    """The word of each place in a block: the finaliser of SplitMix64 on its number, (131072,)."""
    z = torch.arange(1, _WORDS + 1, device=device) * -0x61C8864680B583EB  # wraps around
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
    return z ^ (z >> 31 & (1 << 33) - 1)


def fingerprint(model: Any) -> str:
    """The identity of a model: 64 hexadecimal digits.

    It changes with any bit of any parameter, persistent buffer or scale of a quantised weight, and
    with those fields of the config that change what the model computes.  The same weights loaded
    again, on any device or offloaded, have the same fingerprint; in another dtype, or quantised, they have another.

    Raises:
        OffloadedWeight: Some weight is neither in memory nor where accelerate offloads to.
    """
    return fingerprint_of(model, checksums(stored_tensors(model)))


def fingerprint_of(model: Any, tensors: dict[str, str]) -> str:
    """The fingerprint of a model whose stored tensors have these checksums."""
    content = {"recipe": RECIPE, "config": _essence(model.config.to_dict()), "tensors": tensors}
    return hashlib.sha256(_canonical(content)).hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """The identity of a tokenizer: 64 hexadecimal digits.

    Fast tokenizers by their whole definition, slow ones by vocabulary, special tokens and what they make of a sample
    text.
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

    Fields that every config has are left out: the base class gains and loses them between versions of transformers, and
    none changes the weights' function.
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
