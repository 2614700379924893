"""Peak memory of one call beyond what there was before it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak_beyond(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that a call needs at its peak beyond what is allocated before it.

    On a GPU torch's allocator counts them. On Linux the kernel's high-water mark of the process is reset and read,
    which sees the workspaces of every library. What malloc keeps of earlier calls is given back first: a workspace that
    it lends again would not show.

    Returns:
        Bytes, or None where nothing here can measure them.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
        if trim is None:
            return None
        trim(0)
        _CLEAR.write_text("5", encoding="ascii")
        before = _kilobytes("VmRSS")
        run()
        return max(0, _kilobytes("VmHWM") - before) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _kilobytes(field: str) -> int:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0])
    raise KeyError(field)
