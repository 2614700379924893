"""What is taken where a matrix is asked for: tensors of numbers, and NumPy arrays of them; and what all do with one."""

from __future__ import annotations

import math
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcov.errors import BadInput

_MIRRORED = 64  # rows mirrored at a time, few enough for the cache
_LOOKED_AT = 1 << 16  # entries searched for NaN at a time


def matrix(x: Any, name: str, *, meta: bool = False) -> Tensor:
    """A floating-point tensor of what a caller gave, without its gradient, which is read and never written to.

    It may be a dense tensor of any shape and strides, on the meta device only where `meta` says so, or a NumPy array,
    which gives a tensor on the CPU that shares its memory where possible. A message begins with `name`.

    Raises:
        BadInput: It is something else, or its entries are not real floating-point numbers.
    """
    found = x if isinstance(x, Tensor) else _from_array(x, name)
    if found.layout is not torch.strided or found.is_nested:
        layout = "nested" if found.is_nested else str(found.layout).removeprefix("torch.")
        raise BadInput(f"{name} must be a dense tensor, not {layout}; call its to_dense().")
    if found.is_meta and not meta:
        raise BadInput(f"{name} cannot lie on the device meta, which holds no numbers; load it.")
    if not found.is_floating_point():
        raise BadInput(
            f"{name} must be of real floating-point numbers, not "
            f"{str(found.dtype).removeprefix('torch.')}; convert to float64."
        )
    return found.detach() if found.requires_grad else found


def square(x: Any, name: str, *, meta: bool = False) -> Tensor:
    """As `matrix`, of shape (d, d) with d at least 1; another shape is BadInput."""
    found = matrix(x, name, meta=meta)
    if found.dim() != 2 or found.shape[0] != found.shape[1] or found.shape[0] == 0:
        raise BadInput(f"{name} must be a square matrix but has shape {tuple(found.shape)}; pass (d, d).")
    return found


def non_finite(A: Tensor, *, lower: bool = False) -> tuple[int, tuple[int, int]] | None:
    """How many entries of a matrix, or of its lower triangle, hold NaN or infinity, and row and column of the first."""
    entries, first = 0, None
    rows = max(64, _LOOKED_AT // max(1, A.shape[1]))
    for start in range(0, A.shape[0], rows):
        bad = ~A[start : start + rows].isfinite()
        if bool((bad.tril_(start) if lower else bad).any()):
            entries += int(bad.sum())
            row, column = bad.nonzero()[0].tolist()
            first = first or (start + row, column)
    return None if first is None else (entries, first)


def shares_entries(x: Tensor) -> bool:
    """Whether two entries of a matrix are the same place in memory, as in an expanded one."""
    (rows, columns), (down, right) = x.shape, x.stride()
    if right == 1 and down >= columns:  # the usual layout, answered first
        return False
    if rows < 2 or columns < 2:
        return (rows > 1 and down == 0) or (columns > 1 and right == 0)
    if not (down and right):
        return True
    common = math.gcd(down, right)
    # Going `right / common` rows down leads where going `down / common` columns to the right does.
    return right // common < rows and down // common < columns


def mirror(A: Tensor) -> Tensor:
    """Write the lower triangle of A (d, d) over its upper one, in place, and return A; of A.mT, the other way round."""
    d = A.shape[0]
    for start in range(0, d, _MIRRORED):
        stop = min(start + _MIRRORED, d)
        corner = A[start:stop, start:stop]
        corner.copy_(corner.tril() + corner.tril(-1).mT)
        # Through a contiguous copy: reading columns a power of two apart misses the cache.
        A[start:stop, stop:] = A[stop:, start:stop].contiguous().mT
    return A


def place_of_float64(device: torch.device) -> torch.device:
    """Where float64 numbers for a matrix on this device live: Apple's GPUs have none."""
    return torch.device("cpu") if device.type == "mps" else device


def free_memory(device: torch.device) -> float:
    """The bytes that may still be taken on a device; infinity where nothing says how many.

    On a CUDA device what torch has reserved and does not use counts as free. On a CPU it is what Linux calls
    available, or what is left of the limit of the process' group (a container's) where that is less.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused)
    if device.type != "cpu":
        return math.inf
    found = math.inf
    with suppress(OSError, StopIteration, ValueError):
        line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
        found = float(line.split()[1]) * 1024
    with suppress(OSError, ValueError):  # "max" where there is no limit
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        found = min(found, float(limit - used))
    return found


def _from_array(x: Any, name: str) -> Tensor:
    numpy: Any = sys.modules.get("numpy")  # who has not imported it has no array
    if numpy is None or not isinstance(x, (numpy.ndarray, numpy.floating)):
        mean = hasattr(type(x), "second_moment")
        fix = "pass its second_moment" if mean else "pass a torch tensor or a NumPy array"
        raise BadInput(f"{name} must be a matrix of numbers, not a {type(x).__name__}; {fix}.")
    if isinstance(x, numpy.ma.MaskedArray):
        raise BadInput(f"{name} must have all entries, not be a masked array; call filled().")
    if x.dtype.kind != "f" or x.dtype.itemsize > 8:
        raise BadInput(f"{name} must be of real floating-point numbers, not an array of {x.dtype}; convert to float64.")
    # Torch knows neither negative strides nor the other order of bytes.
    plain = numpy.ascontiguousarray(x, x.dtype.newbyteorder("=")).reshape(x.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that an array is read-only; it is only read
        return torch.from_numpy(plain)
