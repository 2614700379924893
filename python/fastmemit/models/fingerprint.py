"""Which model is this: a short text that changes with every bit of its weights.

Statistics and edits belong to one exact model; an edited copy, another revision or another dtype bear the same name.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fastcov.hooks import isolated
from fastmemit.errors import WrongModel

_PLAIN = (nn.Parameter, torch.Tensor)


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, persistent buffers and scales of quantised weights, sorted, each storage once.

    What accelerate has offloaded is read where it lies, one tensor at a time. What cannot be read comes as it is, on
    the device meta.
    """
    found: dict[str, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, tensor in _own(module):
            found[f"{prefix}.{name}".lstrip(".")] = tensor
    tied = _tied(model, found)
    seen: set[Any] = set()
    for name in sorted(found):
        tensor = found[name]
        place: Any = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if name in tied:
            place = "tied"
        elif tensor.is_meta or tensor.numel() == 0:
            place = name
        if place not in seen:
            seen.add(place)
            yield name, _value(model, name, tensor)


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own tensors: parts of packed ones, and what its weights need beside them."""
    for name, tensor in _persistent(module):
        yield from _parts(name, tensor)
    # bitsandbytes keeps scales neither as parameters nor as buffers, but saves them.
    packed = (p for p in module._parameters.values() if p is not None and type(p) not in _PLAIN)
    if any(not hasattr(p, "__tensor_flatten__") for p in packed):
        for name, value in module.state_dict().items():
            if isinstance(value, Tensor) and name not in module._parameters:
                yield name, value


def _persistent(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and persistent buffers."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and name not in module._non_persistent_buffers_set:
            yield name, tensor


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a tensor of a class of its own is made of (torchao), or itself."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if type(tensor) in _PLAIN or flatten is None:
        yield name, tensor
        return
    for inner in flatten()[0]:
        yield from _parts(f"{name}.{inner}", getattr(tensor, inner))


def _tied(model: nn.Module, found: dict[str, Tensor]) -> set[str]:
    """Names of embeddings and head where they are one matrix but offloading took them apart."""
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return set()
    both = set()
    for get in ("get_input_embeddings", "get_output_embeddings"):
        weight = getattr(getattr(model, get, lambda: None)(), "weight", None)
        both |= {name for name, tensor in found.items() if tensor is weight}
    return both if any(found[name].is_meta for name in both) else set()


def _value(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A tensor's values, from where accelerate has put them if they are not in it."""
    if not tensor.is_meta:
        return tensor
    path, _, own = name.rpartition(".")
    hook = getattr(model.get_submodule(path), "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        weights = getattr(each, "weights_map", None)
        if weights is not None:
            value: Tensor = weights[own]
            return value
    return tensor


RECIPE = 2  # goes up with every change of how a fingerprint is computed
_WORDS = 1 << 17  # 64-bit words in a block: 1 MB, which stays in the caches
_CPU = torch.device("cpu")
_TOGETHER = 32  # blocks that an accelerator takes at a time
# Fields of a config that say nothing about the function a model in evaluation mode computes. That embeddings are tied
# shows in the tensors.
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
    "tie_word_embeddings",
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
        WrongModel: The tensor is not in memory.
    """
    return checksums([("", tensor)])[""]


@isolated()
def checksums(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """The checksum of each tensor by name, with one wait for each device.

    Raises:
        WrongModel: A tensor is not in memory.
    """
    kinds: dict[str, str] = {}  # name -> dtype and shape
    pending: dict[torch.device, list[tuple[str, Tensor]]] = {}
    with _Summing() as summing:
        for name, tensor in tensors:
            if tensor.is_meta:
                raise WrongModel(
                    f"A tensor {name!r} on the device meta has no values to identify; load it without offloading."
                )
            sums = summing(_words(tensor))
            kinds[name] = f"{str(tensor.dtype).removeprefix('torch.')}[{'x'.join(map(str, tensor.shape))}]"
            pending.setdefault(sums.device, []).append((name, sums))
    digests: dict[str, str] = {}
    for parts in pending.values():
        together = torch.cat([sums for _, sums in parts]).cpu().split([len(sums) for _, sums in parts])
        for (name, _), values in zip(parts, together, strict=True):
            content = values.numpy().astype("<i8").tobytes()
            digests[name] = hashlib.blake2b(content, digest_size=16).hexdigest()
    return {name: f"{kind}:{digests[name]}" for name, kind in kinds.items()}


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
    """The sums (blocks, 2) of words (n,), on their device."""

    # On the CPU each of torch's threads takes blocks of its own, in buffers that stay in its caches: torch computes the
    # product of two integer vectors in one thread alone.

    def __enter__(self) -> _Summing:
        number = torch.get_num_threads()
        self._threads = ThreadPoolExecutor(number) if number > 1 else None
        self._buffers: list[Any] = [None] * number
        return self

    def __exit__(self, *_: object) -> None:
        if self._threads is not None:
            self._threads.shutdown()

    def __call__(self, words: Tensor) -> Tensor:
        if words.device.type != "cpu":
            return self.on_accelerator(words)
        blocks = words.split(_WORDS)
        number = len(self._buffers)
        if self._threads is None or len(blocks) < 2:
            return torch.stack(self._in_caches(0, blocks)).view(-1, 2)
        size = -(-len(blocks) // number)
        shares = [blocks[i : i + size] for i in range(0, len(blocks), size)]
        found = self._threads.map(self._in_caches, range(number), shares)
        return torch.stack([each for sums in found for each in sums]).view(-1, 2)

    def _in_caches(self, thread: int, blocks: Sequence[Tensor]) -> list[Tensor]:
        keys = _keys(_CPU)
        if self._buffers[thread] is None:
            self._buffers[thread] = torch.empty_like(keys), torch.empty_like(keys)
        y, high = self._buffers[thread]
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

    It changes with any bit of any parameter, persistent buffer or scale of a quantised weight, and with those fields of
    the config that change what the model computes. The same weights loaded again, on any device or offloaded, have the
    same fingerprint; in another dtype, or quantised, they have another.

    Raises:
        WrongModel: Some weight is neither in memory nor where accelerate offloads to.
    """
    return fingerprint_of(model, checksums(stored_tensors(model)))


def fingerprint_of(model: Any, tensors: dict[str, str]) -> str:
    """The fingerprint of a model whose stored tensors have these checksums."""
    return _digest({"recipe": RECIPE, "config": _essence(model.config.to_dict()), "tensors": tensors})


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
    return _digest(content)


def _essence(config: dict[str, Any]) -> dict[str, Any]:
    """A config without what is volatile, unset or about training and generation only."""
    from transformers import PretrainedConfig

    # The base class gains and loses fields between versions of transformers; none changes the weights' function.
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


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class Watch:
    """The checksums of a model's stored tensors when it was identified, and where they lay then.

    Writes that no version counter sees (``weight.data``, NumPy arrays of the same memory) are not noticed here; an edit
    looks at the bytes of the weights that it touches as well.
    """

    def __init__(self) -> None:
        self._checksums: dict[str, str] = {}
        self._named: dict[str, int] = {}  # stored name -> id of the tensor
        self._config: dict[str, Any] = {}
        self._marks: dict[int, Any] = {}  # id of a tensor -> its mark when its content was known
        # Kept, so that no other storage gets the number of one that is gone.
        self._storages: dict[int, StorageWeakRef] = {}

    def identify(self, model: Any, doubted: Collection[str] | None = None) -> str:
        """The fingerprint of the model as it is, which is the one to be watched from now on.

        Read are all its tensors; or, where some are `doubted`, those of these names and what was written or replaced
        since the last time.

        Raises:
            WrongModel: A weight is neither in memory nor where accelerate offloads to.
        """
        tensors, named = _tensors(model), {}

        def stale() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in stored_tensors(model):  # one at a time, where they are offloaded
                named[name] = id(tensor)
                if doubted is None or name in doubted or not self._known(tensor, name):
                    yield name, tensor

        read = checksums(stale())
        self._checksums = {name: read[name] if name in read else self._checksums[name] for name in named}
        self._named, self._config = named, _essence(model.config.to_dict())
        self._note(tensors)
        return fingerprint_of(model, self._checksums)

    def trust(self, tensors: Iterable[Tensor]) -> None:
        """Take it that these of the watched tensors have the content that they shall have."""
        for tensor in tensors:
            if id(tensor) in self._marks:
                self._marks[id(tensor)] = mark = _mark(tensor)
                if mark is not None:
                    self._storages[id(tensor)] = StorageWeakRef(tensor.untyped_storage())

    def _note(self, tensors: list[Tensor]) -> None:
        self._marks, self._storages = {id(tensor): None for tensor in tensors}, {}
        self.trust(tensors)

    def changed(self, model: Any, edited: Mapping[str, tuple[Tensor, str]]) -> list[str]:
        """What is not as it was when the model was identified: fields of its config, and tensors, by name.

        Args:
            model: The model.
            edited: Parameter -> (itself, the checksum that it shall have instead).
        """
        config = _essence(model.config.to_dict())
        if config != self._config:
            names = sorted({*config, *self._config})
            return [f"config.{name}" for name in names if config.get(name) != self._config.get(name)]
        tensors = _tensors(model)
        if [id(tensor) for tensor in tensors] == list(self._marks) and all(map(self._known, tensors)):
            return []
        stored = dict(stored_tensors(model))
        if stored.keys() != self._checksums.keys():
            return sorted(stored.keys() ^ self._checksums.keys())
        # An edited parameter may be stored under the name of another that shares its memory.
        instead = {weight.data_ptr(): wanted for weight, wanted in edited.values()}
        found = checksums((name, t) for name, t in stored.items() if not self._known(t, name))
        wanted = {name: instead.get(stored[name].data_ptr(), self._checksums[name]) for name in found}
        differ = sorted(name for name in found if found[name] != wanted[name])
        if not differ:
            self._note(tensors)
        return differ

    def _known(self, tensor: Tensor, name: str | None = None) -> bool:
        """Whether a tensor, under this stored name if it is given, has the content that it had."""
        mark = self._marks.get(id(tensor))
        here = name is None or self._named.get(name) == id(tensor)
        return here and mark is not None and mark == _mark(tensor)


def _tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and persistent buffers, each once."""
    found: dict[int, Tensor] = {}
    for module in model.modules():  # as `_persistent` has them; most modules have no buffer, and this runs often
        for tensor in module._parameters.values():
            if tensor is not None:
                found[id(tensor)] = tensor
        if module._buffers:
            found.update({id(tensor): tensor for _, tensor in _persistent(module)})
    return list(found.values())


def _mark(tensor: Tensor) -> Any:
    """What differs when a tensor was written or replaced; None where that cannot be told."""
    try:
        storage = tensor.untyped_storage()
        where = (storage._cdata, storage.data_ptr(), tensor.storage_offset(), tensor.device)
        return (*where, tensor._version, tensor.dtype, tensor.shape, tensor.stride())
    except (RuntimeError, NotImplementedError):  # of inference mode, or of a class of its own
        return None
