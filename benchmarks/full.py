"""`python -m fastcov.bench` with more to compare rank_k with: BLAS, oneDNN, and the peak of each kernel.

    python benchmarks/full.py rank_k --sizes 1536,3072,6144 --dtype float32,bfloat16 --threads 2

Routes that need float32 keys convert 16-bit keys once a call, inside of the time: that is what using them costs. They
may write above the diagonal. A CPU kernel is held against a loop of its own instructions on registers.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fastcov import ops  # noqa: E402
from fastcov.bench.__main__ import main  # noqa: E402
from fastcov.bench.measure import Probe  # noqa: E402
from fastcov.bench.suites import Extras, Routes, word  # noqa: E402

_BLOCK = 768
_PANELS = 8
_SYMBOLS = tuple(f"{prefix}openblas_set_num_threads{suffix}" for prefix in ("scipy_", "") for suffix in ("64_", ""))
# Kernels of the native extension, by what their FMA loop multiplies.
FMA_KERNELS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
# How many products of bfloat16 one of such keys takes in amx_bf16.
_PRODUCTS = {torch.bfloat16: 1, torch.float16: 4}


def routes(device: torch.device, dtype: torch.dtype, threads: int) -> Routes:
    """The routes of libraries for keys of a dtype on a device; OpenBLAS is told to use so many threads."""
    if device.type == "cuda":
        narrow = dtype not in (torch.float32, torch.float64)
        return {f"row panels ({_PANELS})": functools.partial(_panels, narrow=narrow)}
    found: Routes = {}
    if dtype != torch.float64:
        backend: Any = torch.backends.mkldnn
        here = backend.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        for name, block in (("oneDNN linear", None), (f"oneDNN block rows {_BLOCK}", _BLOCK)):
            route = functools.partial(_onednn, block=block)
            found[name] = route if here else "this torch is built without oneDNN"
    set_threads = functools.cache(functools.partial(_set_openblas_threads, threads))
    found["numpy X.T @ X"] = _numpy_route(set_threads)
    found["scipy dsyrk" if dtype == torch.float64 else "scipy ssyrk"] = _scipy_route(dtype, set_threads)
    return found


def _panels(C: Tensor, X: Tensor, *, narrow: bool = False) -> None:
    """Rows of C in eight panels, each as wide as its last row: 9/16 of the full product."""
    d = C.shape[0]
    step = max(1, -(-d // (_PANELS * 128)) * 128)  # whole tiles of 128
    for low in range(0, d, step):
        high = min(low + step, d)
        panel, left, right = C[low:high, :high], X[:, low:high].mT, X[:, :high]
        if narrow:
            panel.copy_(torch.addmm(panel, left, right, out_dtype=torch.float32))
        else:
            panel.addmm_(left, right)


def _onednn(C: Tensor, X: Tensor, block: int | None) -> None:
    """The float32 product of oneDNN, which torch reaches only through its linear layer."""
    # Transposed once: slices of columns would go to its reference loops, a hundred times slower.
    keys = X.to(C.dtype).mT.contiguous()  # (d, n)
    linear = torch.ops.mkldnn._linear_pointwise
    d = C.shape[0]
    for low in range(0, d, block or d):
        high = min(low + (block or d), d)
        C[low:high, :high] += linear(keys[low:high], keys[:high], None, "none", [], "")


def _numpy_route(set_threads: Callable[[], object]) -> Callable[[Tensor, Tensor], object] | str:
    try:
        importlib.import_module("numpy")
    except ImportError:
        return "numpy is not installed"

    def update(C: Tensor, X: Tensor) -> None:
        keys = X.to(C.dtype).numpy()  # NumPy notices that both are one array and calls the library's syrk
        C.numpy()[...] += keys.T @ keys

    set_threads()
    return update


def _scipy_route(dtype: torch.dtype, set_threads: Callable[[], object]) -> Callable[[Tensor, Tensor], object] | str:
    try:
        blas: Any = importlib.import_module("scipy.linalg.blas")
    except ImportError:
        return "scipy is not installed"
    syrk = blas.dsyrk if dtype == torch.float64 else blas.ssyrk

    def update(C: Tensor, X: Tensor) -> None:
        # BLAS counts columns first: the row-major X (n, d) is its (d, n), and the lower triangle of
        # C its upper one.
        syrk(1.0, X.to(C.dtype).numpy().T, beta=1.0, c=C.numpy().T, trans=0, lower=0, overwrite_c=1)

    set_threads()
    return update


def _set_openblas_threads(threads: int) -> None:
    """Tell every OpenBLAS in this process how many threads to use; it does not obey torch."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text(encoding="utf-8").splitlines() if maps.exists() else []
    for path in {line.split()[-1] for line in lines if "openblas" in line.lower()}:
        library = ctypes.CDLL(path)
        for symbol in _SYMBOLS:
            if hasattr(library, symbol):
                getattr(library, symbol)(threads)
                break


def fma_probe(kernel: str, keys: torch.dtype, threads: int) -> Probe | None:
    """The FMA loop of a CPU kernel; None where the native extension has none for it.

    What is multiplied is float64 for float64 keys, pairs of bfloat16 in the kernel made of those, and float32
    otherwise. The tiles of AMX multiply bfloat16; their rate is divided by the products that such keys take, so that it
    is a limit for useful operations too.
    """
    if kernel not in FMA_KERNELS or ops.kernels().get(kernel, "unknown") is not None:
        return None
    native: Any = importlib.import_module("fastcov.kernels.cpu")
    kind = keys if keys == torch.float64 else torch.float32
    if kernel == "avx512_bf16":
        kind = torch.bfloat16
    name = f"FMA loop {kernel} {word(kind)}"
    if kernel == "amx_bf16":
        kind = keys
        name = f"tile loop {kernel} / {_PRODUCTS.get(keys, 6)}"
    # The best of several: what else runs on the machine only slows it down.
    return Probe(name, lambda: max(float(native.fma_peak(kernel, threads, kind)) for _ in range(3)))


if __name__ == "__main__":
    raise SystemExit(main(extras=Extras("benchmarks/full.py", routes, fma_probe)))
