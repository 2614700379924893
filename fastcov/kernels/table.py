"""Which kernel is the fastest on a GPU: what was measured, and nothing else.

``measured.json`` beside this file holds, for each device that was measured, the seconds of each kernel by dtype and
width; benchmarks/gpu_check.py writes it. Where a device is not in it, the order of the ranks in `fastcov.ops` holds.
"""

from __future__ import annotations

import functools
import math
from importlib.resources import files
from typing import Any

import torch

from fastcov.parsing import parse_json

_NAME = "measured.json"


def order(device: torch.device, dtype: torch.dtype, d: int) -> list[str]:
    """Kernels in the order of their measured times, the fastest first; empty if none was measured.

    Args:
        device: A CUDA device.
        dtype: Of the keys.
        d: Their width; the nearest measured width, by ratio, decides.
    """
    return list(_order(torch.cuda.get_device_name(device), str(dtype).removeprefix("torch."), d))


@functools.cache
def _order(name: str, dtype: str, d: int) -> tuple[str, ...]:
    rows = [row for row in _table().get(name, []) if row["dtype"] == dtype]
    if not rows:
        return ()
    nearest = min(rows, key=lambda row: abs(math.log(row["d"] / d)))
    seconds: dict[str, float] = nearest["seconds"]
    return tuple(sorted(seconds, key=lambda kernel: seconds[kernel]))


@functools.cache
def _table() -> dict[str, list[dict[str, Any]]]:
    text = (files("fastcov.kernels") / _NAME).read_text(encoding="utf-8")
    devices: dict[str, list[dict[str, Any]]] = parse_json(text)["devices"]
    return devices
