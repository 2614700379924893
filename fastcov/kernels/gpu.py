"""Which kernel a GPU gets: the order of their measured times there, and a right result before one is chosen.

*Measured.* ``measured.json`` has for each measured compute capability ("9.0") the seconds of each kernel by dtype and
width, taken over from ``make gpu-check`` by ``python benchmarks/gpu_check.py --adopt FILE``. Elsewhere the order in
`fastcov.ops` holds, but that on 9.0 keys of 16 bits go to the CUDA kernel first, which has instructions of that
capability there and is expected to be the fastest. That is not measured yet.

*Checked.* Devices, drivers and compilers are many. Two small updates of a kernel that is compiled for a device, one of
them with a mask, compared with float64, turn a wrong second moment into a warning and another kernel. A kernel asked
for by name is not checked.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from fastcov.files import parse_json

logger = logging.getLogger(__name__)


# Tiles on, beside and off the diagonal, with edges in every direction; rows begin at whole 16
# bytes, so that a kernel takes its fastest way of reading them.
_ROWS, _NARROW = 1203, 400
# Kernels take larger tiles for wide keys: other code, checked on its own where it is to be used. So
# wide that a device of 150 multiprocessors takes them too.
_WIDE = 4464
_IS_WIDE = 2048
_TOLERANCE = 1e-5  # of the relative error; what a GPU kernel has to keep to everywhere
_BLOCK = 1024  # rows compared at a time

_failures: dict[tuple[str, torch.device, torch.dtype, int], str | None] = {}

Update = Callable[[Tensor, Tensor, Tensor | None, float], None]  # of C, X, mask and alpha


def failure(name: str, update: Update, device: torch.device, dtype: torch.dtype, d: int) -> str | None:
    """Why a kernel must not be chosen on a device for keys of a dtype, or None; found out once a process.

    A kernel for wide keys must pass with narrow and with wide ones. Without memory to check it there is no reason not
    to.
    """
    for width in _widths(d):
        key = (name, device, dtype, width)
        if key not in _failures:
            try:
                _failures[key] = found = _try(update, device, dtype, width)
            except torch.OutOfMemoryError:
                # Says nothing of the kernel. It is chosen, and checked when there is room.
                logger.info("no memory on %s to check the kernel %s", device, name)
                continue
            if found is not None:
                logger.warning(
                    "the kernel %s is not used on %s for %s keys about %d wide: %s; please report it, "
                    "and name another kernel to silence this",
                    name, device, str(dtype).removeprefix("torch."), width, found,
                )  # fmt: skip
        if _failures[key] is not None:
            return _failures[key]
    return None


def done(name: str, device: torch.device, dtype: torch.dtype, d: int) -> bool:
    """Whether `failure` has an answer that stays: there was memory to check the kernel."""
    return all((name, device, dtype, width) in _failures for width in _widths(d))


def _widths(d: int) -> tuple[int, ...]:
    return (_NARROW, _WIDE) if d >= _IS_WIDE else (_NARROW,)


def _try(update: Update, device: torch.device, dtype: torch.dtype, d: int) -> str | None:
    # Drawn on the CPU by a generator of its own, so that no caller's random state moves.
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(_ROWS, d, generator=generator).to(dtype).to(device)
    mask = (torch.rand(_ROWS, generator=generator) < 0.9).to(device)
    spoilt = X.masked_fill(~mask[:, None], float("nan"))
    C = torch.ones(d, d, device=device)
    C.masked_fill_(_above(0, C), float("nan"))
    try:
        update(C, spoilt, mask, 0.5)
        update(C, X, None, 0.25)
        C.sum().item()  # waits, so that what fails on the device fails here
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler or a driver may raise anything
        return f"it fails there ({type(error).__name__}: {str(error).partition(chr(10))[0]:.200})"
    return _compared(C, X, mask)


def _compared(C: Tensor, X: Tensor, mask: Tensor) -> str | None:
    """What is wrong with C (d, d), block by block: float64 takes no second matrix of that size."""
    keys = X.double()  # (n, d)
    weighted = keys * (0.25 + 0.5 * mask.double())[:, None]
    wrong, size = 0.0, 0.0
    for start in range(0, C.shape[0], _BLOCK):
        block = C[start : start + _BLOCK]  # (b, d)
        above = _above(start, block)
        if not bool(block[above].isnan().all()):
            return "it writes above the diagonal there"
        wanted = (keys[:, start : start + _BLOCK].mT @ weighted).add_(1).masked_fill_(above, 0)
        wrong += float((block.double().masked_fill(above, 0) - wanted).square().sum())
        size += float(wanted.square().sum())
    off = (wrong / size) ** 0.5
    # Written so that NaN fails.
    return None if off < _TOLERANCE else f"its relative error is {off:.2g} there"


def _above(start: int, block: Tensor) -> Tensor:
    """Where a block of rows from `start` on lies above the diagonal, bool (b, d)."""
    return torch.ones_like(block, dtype=torch.bool).triu_(start + 1)


_NAME = "measured.json"


def order(device: torch.device, dtype: torch.dtype, d: int) -> list[str]:
    """Kernels in the order of their measured times on devices of this one's compute capability, the fastest first.

    Of the widths that were measured for this dtype of keys the nearest one to d, by ratio, decides. Where none was,
    what is expected to be the fastest, or nothing.
    """
    major, minor = torch.cuda.get_device_capability(device)
    return list(_order(f"{major}.{minor}", str(dtype).removeprefix("torch."), d))


@functools.cache
def _order(capability: str, dtype: str, d: int) -> tuple[str, ...]:
    rows = [row for row in _table().get(capability, []) if row["dtype"] == dtype]
    if not rows:
        return ("cuda",) if capability == "9.0" and dtype in ("float16", "bfloat16") else ()
    nearest = min(rows, key=lambda row: abs(math.log(row["d"] / d)))
    seconds: dict[str, float] = nearest["seconds"]
    return tuple(sorted(seconds, key=lambda kernel: seconds[kernel]))


@functools.cache
def _table() -> dict[str, list[dict[str, Any]]]:
    text = (files("fastcov.kernels") / _NAME).read_text(encoding="utf-8")
    capabilities: dict[str, list[dict[str, Any]]] = parse_json(text)["capabilities"]
    return capabilities
