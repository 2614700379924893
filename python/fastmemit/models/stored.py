"""The tensors that a model consists of, wherever its weights are and however they are packed.

Weights may be in memory, offloaded to the CPU or the disk by accelerate, which leaves tensors without values behind, or
quantised: packed, with their scales beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

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
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield from _parts(name, parameter)
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield from _parts(name, buffer)
    # bitsandbytes keeps scales neither as parameters nor as buffers, but saves them.
    packed = (p for p in module._parameters.values() if p is not None and type(p) not in _PLAIN)
    if any(not hasattr(p, "__tensor_flatten__") for p in packed):
        for name, value in module.state_dict().items():
            if isinstance(value, Tensor) and name not in module._parameters:
                yield name, value


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
    config = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return set()
    both = []
    for get in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(model, get, lambda: None)()
        weight = getattr(module, "weight", None)
        both += [name for name, tensor in found.items() if tensor is weight]
    return set(both) if any(found[name].is_meta for name in both) else set()


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
