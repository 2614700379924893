"""The rank-k update on NVIDIA GPUs, in CUDA C++ (csrc/cuda): two kernels in one.

On compute capability 9.0, 16-bit keys in rows of aligned 16-byte units are multiplied by wgmma from tiles that the
tensor memory accelerator fetches; a mask is applied to the tiles on their way. All other keys (float32, odd strides)
and all other devices from 8.0 on are served by mma.sync. float32 keys are split into three products of TF32 parts,
which keeps what a product in float32 would keep. The tensor cores' sums are moved into a second float32 sum at least
every 1024 rows, because tensor cores round towards zero. Results are the same in every run on a device.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastcov.kernels import cpu

# The codes of csrc/cuda/rank_k.h.
_CODES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 3}
_ROUTES = {"auto": 0, "mma": 1, "wgmma": 2}

_LARGEST_WIDTH = 1 << 21
_TURNS = 4  # for every multiprocessor, see csrc/cuda/arguments.h


@functools.cache
def _missing() -> str | None:
    """Why it cannot run on this machine, as a clause, or None."""
    module = cpu.native()
    if module is None:
        return cpu.native_missing()
    if not hasattr(module, "cuda_rank_k"):
        return "the native module was built without CUDA"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    # Loading the code takes memory on a device, so only one is tried; `why_not` tries the others.
    new = [index for index in range(torch.cuda.device_count()) if _too_old(index) is None]
    if not new:
        return _too_old(0)
    current = torch.cuda.current_device()
    return _unfit(current if current in new else new[0])


def _too_old(index: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) >= (8, 0):
        return None
    return f"cuda:{index} has compute capability {major}.{minor} and 8.0 or higher is needed"


@functools.cache
def _unfit(index: int) -> str | None:
    """Why one CUDA device cannot run it, or None."""
    reason = _too_old(index)
    if reason is not None:
        return reason
    with torch.cuda.device(index):
        error = cpu.native().cuda_check_device(device=index)
    if error != 0:
        return f"its code does not load on cuda:{index} ({cpu.native().cuda_error(error=error)})"
    return None


def why_not(C: Tensor | None = None, X: Tensor | None = None) -> str | None:
    """Why it cannot run on this machine, or not with a sum C (d, d) and keys X (n, d); None if it can."""
    reason = _missing()
    if reason is not None or C is None or X is None:
        return reason
    if C.device.type != "cuda" or X.device != C.device:
        return (
            "it runs on a CUDA device with keys and sum on the same one, and the sum is on "
            f"{C.device}, the keys on {X.device}"
        )
    if X.dtype not in _CODES or C.dtype != torch.float32:
        return f"it takes float32, float16 or bfloat16 keys and a float32 sum, not {X.dtype} and {C.dtype}"
    if C.shape[0] > _LARGEST_WIDTH:
        return f"it counts tiles of sums up to {_LARGEST_WIDTH} wide and this one is {C.shape[0]}"
    return _unfit(_index(C))


def update(C: Tensor, X: Tensor, mask: Tensor | None, alpha: float, route: str = "auto") -> None:
    """Lower triangle of C (d, d) += alpha * X^T X over the kept rows of X (n, d), in place.

    Rows that a mask leaves out may hold anything, NaN included. The route is "mma" or "wgmma".

    Raises:
        RuntimeError: The launch failed; it has CUDA's own name of the error.
    """
    if X.shape[0] == 0:
        return
    with torch.cuda.device(C.device):
        # Zeroed on the same stream before the launch; by these, workers that share a tile of C
        # add to it one after another.
        processors: int = torch.cuda.get_device_properties(C.device).multi_processor_count
        turns = torch.zeros(_TURNS * processors, dtype=torch.int32, device=C.device)
        if mask is not None:
            mask = mask.to(torch.bool).contiguous()  # (n,)
        error = cpu.native().cuda_rank_k(**_arguments(C, X, mask, alpha, turns, route))
    if error != 0:
        raise RuntimeError(
            f"The CUDA kernel failed for {X.dtype} keys {tuple(X.shape)} on {X.device} by route "
            f"{route!r}: {cpu.native().cuda_error(error=error)}; name another kernel."
        )


def route(C: Tensor, X: Tensor) -> str:
    """Which of the two kernels these tensors take on their device: "mma" or "wgmma"."""
    with torch.cuda.device(C.device):
        code = cpu.native().cuda_route(**_arguments(C, X, None, 1.0, None, "auto"))
    if code < 0:
        raise RuntimeError(
            f"The device {C.device} could not be asked: {cpu.native().cuda_error(error=-code)}; see python -m fastcov."
        )
    return next(name for name, number in _ROUTES.items() if number == code)


def _arguments(
    C: Tensor, X: Tensor, mask: Tensor | None, alpha: float, turns: Tensor | None, route: str
) -> dict[str, int | float]:
    """What the native functions take: addresses, sizes, and strides in elements."""
    return {
        "device": _index(C), "stream": torch.cuda.current_stream(C.device).cuda_stream,
        "c": C.data_ptr(), "c_row_stride": C.stride(0), "c_col_stride": C.stride(1),
        "x": X.data_ptr(), "x_row_stride": X.stride(0), "x_col_stride": X.stride(1),
        "dtype": _CODES[X.dtype], "n": X.shape[0], "d": X.shape[1],
        "mask": 0 if mask is None else mask.data_ptr(),
        "rows": 0, "count": 0,  # a list of rows in place of a mask, and its length
        "alpha": alpha,
        "turns": 0 if turns is None else turns.data_ptr(), "turns_count": 0 if turns is None else turns.shape[0],
        "route": _ROUTES[route],
    }  # fmt: skip


def _index(C: Tensor) -> int:
    return torch.cuda.current_device() if C.device.index is None else C.device.index
