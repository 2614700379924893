"""How a model is spread over devices, and how it is quantised, as it is loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch

from fastmemit import parallel
from fastmemit.errors import BadConfig

#: What accelerate can be asked to work out by itself.
MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
LOAD_IN = ("8bit", "4bit")


def checked_map(device_map: str | Mapping[str, Any], device: str | torch.device | None) -> str | dict[str, Any]:
    """A device map that `from_pretrained` takes.

    Args:
        device_map: One of `MAPS`, or a device for each module.
        device: The single device that was asked for.

    Raises:
        BadConfig: It is neither, a single device was asked for too, or accelerate is missing.
    """
    if device is not None:
        raise BadConfig(
            f"The device {str(device)!r} and the device map {device_map!r:.80} contradict each other; give one of them."
        )
    if isinstance(device_map, str) and device_map not in MAPS:
        raise BadConfig(
            f"There is no device map {device_map!r}; choose {', '.join(MAPS)}, or in Python a device for each module."
        )
    needs_accelerate(f"the device map {device_map!r:.80}")
    return device_map if isinstance(device_map, str) else dict(device_map)


def memory_of_own_gpus() -> dict[int | str, int] | None:
    """Free bytes of the GPUs of this process and of the CPU; None where it may take all GPUs.

    Raises:
        BadConfig: There are more processes on this machine than GPUs.
    """
    own = parallel.own_gpus()
    if own is None:
        return None
    from accelerate.utils import get_max_memory

    free: dict[int | str, int] = get_max_memory()
    return {place: size for place, size in free.items() if place == "cpu" or place in own}


def quantised(load_in: str, dtype: str | torch.dtype) -> Any:
    """The configuration that quantises weights as they are loaded.

    Args:
        load_in: One of `LOAD_IN`.
        dtype: That of the model's other tensors, in which 4-bit weights are multiplied too.

    Raises:
        BadConfig: There is no such form, or bitsandbytes or accelerate is missing.
    """
    if load_in not in LOAD_IN:
        raise BadConfig(f"Weights cannot be loaded in {load_in!r}; choose {' or '.join(LOAD_IN)}, or leave it out.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise BadConfig(f"To load in {load_in} needs the package bitsandbytes; pip install 'fastmemit[quantised]'.")
    needs_accelerate(f"to load in {load_in}")
    from transformers import BitsAndBytesConfig

    if load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=compute)


def needs_accelerate(what: str) -> None:
    """Refuse what cannot be done without accelerate.

    Raises:
        BadConfig: It is not installed.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise BadConfig(f"{what[0].upper()}{what[1:]} needs the package accelerate; pip install accelerate.")
