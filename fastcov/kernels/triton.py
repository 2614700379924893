"""The rank-k update in Triton, for NVIDIA GPUs of compute capability 8.0 and above.

C is cut into square tiles and only those of the lower triangle are computed: half the arithmetic of a full product. One
program a multiprocessor takes tiles in turn, ordered so that programs that run at the same time share keys in the L2
cache. In tiles on the diagonal only what is on and below it is read and written.

Sums. Tensor cores truncate when they add, so a long chain of products comes out too small, on the diagonal always.
After at most 1024 rows the chain is therefore added to a second float32 sum and starts again at zero. Float32 keys are
split into three bfloat16 each and the six larger of the nine products are summed, which leaves out 2^-24 of a product;
their chain is promoted after 64 rows. (tf32x3 costs the same and keeps 22 bits; plain tf32 keeps 11.)

Loads. On compute capability 9 and 10 aligned keys are brought by TMA, in blocks of rows: no addresses in registers, and
what lies beyond the edges comes as zeros. A mask becomes two lists on the device: the blocks whose rows are all kept,
and the other kept rows, which are read one by one through pointers, as all keys are elsewhere. What is not kept is
never read. The device code is in `fastcov.kernels.triton_code`, which alone imports triton.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_OLDEST = (3, 6)  # the oldest triton whose code for this kernel is known to be free of spills
_ROWS_OF_CHAIN = {2: 1024, 4: 64}  # bytes of a key: rows until promotion
_BAND = 8  # tile rows that share a stretch of columns


@dataclass(frozen=True)
class Config:
    """How the work is cut up."""

    tile: int  # width of a tile of C, a power of two from 16
    depth: int  # rows of X in one step, a power of two from 16
    warps: int  # of a program
    stages: int  # steps whose keys are on their way at once
    programs: int  # on a multiprocessor at once


# By route, see `_route`, and bytes of a key. The two sums of a tile fill half the registers, so
# these are the largest steps for which neither triton 3.6 nor 3.7 spills any.
_WIDE = {
    ("tma", 2): Config(tile=128, depth=64, warps=8, stages=4, programs=1),
    ("tma", 4): Config(tile=128, depth=16, warps=8, stages=3, programs=1),
    ("mma", 2): Config(tile=128, depth=32, warps=8, stages=4, programs=1),
    ("mma listed", 2): Config(tile=128, depth=16, warps=8, stages=5, programs=1),
}
# Where wide tiles are too few to share out evenly; and pointers to float32 keys, which need room.
_NARROW = {
    ("tma", 2): Config(tile=64, depth=64, warps=4, stages=4, programs=2),
    ("tma", 4): Config(tile=64, depth=16, warps=4, stages=3, programs=2),
    ("wgmma", 4): Config(tile=64, depth=16, warps=4, stages=3, programs=2),
    ("mma", 2): Config(tile=64, depth=32, warps=4, stages=4, programs=2),
    ("mma", 4): Config(tile=64, depth=16, warps=4, stages=3, programs=2),
    ("mma listed", 2): Config(tile=64, depth=32, warps=4, stages=4, programs=2),
    ("mma listed", 4): Config(tile=64, depth=16, warps=4, stages=3, programs=2),
}
# Where rows start anywhere, keys are loaded one by one and pass through registers.
_RAGGED = Config(tile=64, depth=16, warps=4, stages=3, programs=2)
_INTERPRETED = Config(tile=32, depth=32, warps=4, stages=1, programs=3)


def interpreting() -> bool:
    """Whether TRITON_INTERPRET is set: the kernel then runs on the CPU, to check its meaning."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")


@lru_cache
def _missing(interpreted: bool) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreted:
        return None
    if torch.version.hip is not None:
        return "it is written for CUDA and this torch is built for ROCm"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < _OLDEST:
        return f"it needs triton {_OLDEST[0]}.{_OLDEST[1]} and {triton.__version__} is installed"
    best = max(_device(index)[0] for index in range(torch.cuda.device_count()))
    if best < (8, 0):
        return f"it needs compute capability 8.0 and the device has {best[0]}.{best[1]}"
    return None


@lru_cache
def _device(index: int) -> tuple[tuple[int, int], int]:
    """Compute capability and number of multiprocessors."""
    device: Any = torch.cuda.get_device_properties(index)
    return (device.major, device.minor), device.multi_processor_count


def why_not(C: Tensor | None = None, X: Tensor | None = None) -> str | None:
    """Why it cannot run on this machine, or not with a sum C (d, d) and keys X (n, d); None if it can."""
    reason = _missing(interpreting())
    if reason is not None or C is None or X is None:
        return reason
    if C.dtype != torch.float32:
        return f"it sums in float32 and the sum is {C.dtype}"
    if X.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float32, float16 and bfloat16 keys and these are {X.dtype}"
    device = "cpu" if interpreting() else "cuda"
    if X.device.type != device:
        return f"it runs on {device} tensors here and these are on {X.device}"
    if device == "cuda" and _device(X.device.index)[0] < (8, 0):
        return f"it needs compute capability 8.0 and {X.device} is older"
    for name, tensor in (("keys", X), ("sum", C)):
        # One element at a time would be far slower than the other kernels.
        if tensor.shape[1] > 1 and tensor.stride(1) != 1:
            return f"neighbours in a row of the {name} are {tensor.stride(1)} elements apart"
    if X.shape[0] >= 1 << 31 or X.shape[1] >= 1 << 21:
        return f"keys of shape {tuple(X.shape)} are too large for its 32-bit counts"
    return None


def update(C: Tensor, X: Tensor, mask: Tensor | None, alpha: float) -> None:
    """Lower triangle of C (d, d) += alpha * X^T X over the kept rows of X (n, d), in place."""
    aligned = _aligned(C, X)
    if interpreting():
        launch(C, X, mask, alpha, _INTERPRETED, tma=aligned)
        return
    capability, processors = _device(C.device.index)
    route = _route(capability, aligned, mask is not None, X.element_size())
    config = choose(route, aligned, processors, X)
    with torch.cuda.device(C.device):
        launch(C, X, mask, alpha, config, route == "tma", processors)


def _aligned(C: Tensor, X: Tensor) -> bool:
    """Whether the compiler may load and store 16 bytes at a time, and TMA can take the keys."""
    numbers = (C.data_ptr(), X.data_ptr(), C.stride(0), X.stride(0), X.shape[1])
    return all(number % 16 == 0 for number in numbers) and X.stride(0) >= X.shape[1]


def _route(capability: tuple[int, int], aligned: bool, masked: bool, key_bytes: int) -> str:
    """How keys are read, and by which instruction multiplied, where they are masked."""
    # Consumer devices have TMA too, but a third of the shared memory, and multiply as 8.0 does.
    if capability[0] in (9, 10):
        # Compiled for 10.0, float32 keys by TMA need more tensor memory than there is, and trap.
        fits = capability[0] == 9 or key_bytes == 2
        return "tma" if aligned and fits else "wgmma"
    return "mma listed" if masked else "mma"


def choose(route: str, aligned: bool, processors: int, X: Tensor) -> Config:
    """The config for keys X (n, d): narrow tiles where wide ones are too few to share evenly."""
    if not aligned:
        return _RAGGED
    key = (route, X.element_size())
    if key not in _WIDE:
        return _NARROW[key]
    tiles = -(-X.shape[1] // _WIDE[key].tile)
    return (_WIDE if tiles * (tiles + 1) // 2 >= 4 * processors else _NARROW)[key]


def launch(
    C: Tensor, X: Tensor, mask: Tensor | None, alpha: float,
    config: Config, tma: bool, processors: int = 1, chain: int | None = None,
) -> None:  # fmt: skip
    """Run the kernel as told; see `update`, which decides.

    With `tma` whole blocks of rows are brought through a tensor descriptor; `processors` multiprocessors are filled,
    and sums promoted after `chain` rows, a multiple of the config's depth, of which None takes the default.
    """
    n, d = X.shape
    if n == 0 or d == 0:
        return
    from fastcov.kernels import triton_code

    tiled = blocks = rows = counts = None
    if mask is not None:
        blocks, rows, counts = _kept(mask, config.depth if tma else None)
    if tma:
        tiled = triton_code.TensorDescriptor(X, [n, d], [X.stride(0), 1], [config.depth, config.tile])
    pointed = not tma or mask is not None
    tiles = -(-d // config.tile)
    grid = min(processors * config.programs, tiles * (tiles + 1) // 2)
    triton_code.rank_k[(grid,)](
        C, X if pointed else None, tiled, blocks, rows, counts, n, d, float(alpha), X.stride(0), C.stride(0),
        TILED=tma, POINTED=pointed, COUNTED=mask is not None, GATHERED=rows is not None,
        TILE=config.tile, DEPTH=config.depth, EVERY=(chain or _ROWS_OF_CHAIN[X.element_size()]) // config.depth,
        BAND=_BAND, STAGES=config.stages, EMULATED=interpreting(),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def _kept(mask: Tensor, depth: int | None) -> tuple[Tensor | None, Tensor, Tensor]:
    """A mask (n,) as lists made on its device: whole blocks of `depth` rows, other kept rows, both lengths (2,)."""
    if depth is None:
        rows, count = _places(mask)
        return None, rows, torch.cat([torch.zeros_like(count), count])
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[0] % depth)).view(-1, depth)
    whole = padded.all(1)  # (blocks,)
    blocks, whole_count = _places(whole)
    rows, row_count = _places((padded & ~whole[:, None]).flatten())
    return blocks, rows, torch.cat([whole_count, row_count])


def _places(flags: Tensor) -> tuple[Tensor, Tensor]:
    """Where flags (m,) are set, in order, then zeros up to (m + 1,); and how many are, (1,)."""
    m = flags.shape[0]
    counted = flags.cumsum(0)  # (m,)
    # nonzero() would wait for the device to learn its length; what is not set goes to a last slot.
    slots = torch.where(flags, counted - 1, m)
    places = counted.new_zeros(m + 1).scatter_(0, slots, torch.arange(m, device=flags.device))
    places[m] = 0
    return places, counted[-1:]
