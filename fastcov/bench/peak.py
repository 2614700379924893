"""What this machine can do at best, measured: a loop of FMAs, or one large product."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fastcov import ops

# Kernels of the native extension, by what their FMA loop multiplies.
FMA_KERNELS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
# How many products of bfloat16 one of such keys takes in amx_bf16.
_PRODUCTS = {torch.bfloat16: 1, torch.float16: 4}
_LOOPS = 3
_TAKES_AT_LEAST = 0.2  # seconds for which a product is repeated


@dataclass(frozen=True)
class Probe:
    """A measurement that can be repeated.

    Attributes:
        name: What is measured, as printed.
        measure: Returns GFLOP/s.
    """

    name: str
    measure: Callable[[], float]


def fma_probe(kernel: str, threads: int, keys: torch.dtype) -> Probe | None:
    """The FMA loop of a CPU kernel; None where the native extension has none for it.

    Args:
        kernel: Its name.
        threads: How many at once.
        keys: Their dtype. What is multiplied is float64 for float64 keys, pairs of bfloat16 in the kernel made of
            those, and float32 otherwise. The tiles of AMX multiply bfloat16; their rate is divided by the products that
            such keys take, so that it is a limit for useful operations too.
    """
    if kernel not in FMA_KERNELS or ops.kernels().get(kernel, "unknown") is not None:
        return None
    try:
        native: Any = importlib.import_module("fastcov.kernels.cpu")
    except ImportError:
        return None
    if not hasattr(native, "fma_peak"):
        return None
    kind = keys if keys == torch.float64 else torch.float32
    if kernel == "avx512_bf16":
        kind = torch.bfloat16
    name = f"FMA loop {kernel} {str(kind).removeprefix('torch.')}"
    if kernel == "amx_bf16":
        kind = keys
        name = f"tile loop {kernel} / {_PRODUCTS.get(keys, 6)}"
    return Probe(
        name,
        # The best of several, as for a product: what else runs on the machine only slows it down.
        lambda: max(float(native.fma_peak(kernel, threads, kind)) for _ in range(_LOOPS)),
    )


def gemm_probe(device: torch.device, dtype: torch.dtype, *, quick: bool = False) -> Probe:
    """The rate of one large product of torch, the best of several.

    On CUDA it is bfloat16, whatever the keys are, unless they are float64: float32 keys are multiplied on the same
    units, in several parts.
    """
    if device.type == "cuda":
        kind = torch.float64 if dtype == torch.float64 else torch.bfloat16
        width = 1024 if quick else 8192
    else:
        kind = torch.float64 if dtype == torch.float64 else torch.float32
        width = 256 if quick else 2048
    word = str(kind).removeprefix("torch.")
    return Probe(f"GEMM {word} {width}", lambda: _gemm(device, kind, width))


def _gemm(device: torch.device, dtype: torch.dtype, width: int) -> float:
    left = torch.randn(width, width, device=device, dtype=dtype)
    right = torch.randn(width, width, device=device, dtype=dtype)
    out = torch.empty_like(left)
    torch.mm(left, right, out=out)
    best, spent, runs = float("inf"), 0.0, 0
    while spent < _TAKES_AT_LEAST or runs < 3:
        _wait(device)
        begun = time.perf_counter()
        torch.mm(left, right, out=out)
        _wait(device)
        taken = time.perf_counter() - begun
        best, spent, runs = min(best, taken), spent + taken, runs + 1
    return 2 * width**3 / best / 1e9


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
