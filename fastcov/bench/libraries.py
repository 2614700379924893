"""What others offer for ``C += X^T X``: every library route that is here, each in its best form.

Routes that need float32 keys convert 16-bit keys once a call, inside of the time: that is what using them costs. They
may write above the diagonal.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_BLOCK = 768
_PANELS = 8
_SYMBOLS = tuple(f"{prefix}openblas_set_num_threads{suffix}" for prefix in ("scipy_", "") for suffix in ("64_", ""))


@dataclass(frozen=True)
class Route:
    """One library route.

    Attributes:
        name: As printed.
        update: Adds ``X^T X`` to the lower triangle of C (d, d) for X (n, d).
        cannot: Why it is not to be had for this case, or None.
    """

    name: str
    update: Callable[[Tensor, Tensor], object]
    cannot: str | None = None


def routes(device: torch.device, dtype: torch.dtype, threads: int) -> list[Route]:
    """The routes for keys of a dtype on a device; the first is the baseline, torch.addmm.

    Args:
        device: Where C and X are.
        dtype: Of X.
        threads: What OpenBLAS, which keeps threads of its own, is told to use.
    """
    if device.type == "cuda":
        return _cuda_routes(dtype)
    found = [
        Route("torch.addmm", lambda C, X: C.addmm_(_as(C, X).mT, _as(C, X))),
        Route(f"torch block rows {_BLOCK}", _block_rows),
    ]
    if dtype != torch.float64:
        missing = None if _has_onednn() else "this torch is built without oneDNN"
        found.append(Route("oneDNN linear", lambda C, X: _onednn(C, X, C.shape[0]), missing))
        found.append(Route(f"oneDNN block rows {_BLOCK}", lambda C, X: _onednn(C, X, _BLOCK), missing))
    set_openblas = functools.cache(functools.partial(_set_openblas_threads, threads))
    found.append(_numpy_route(set_openblas))
    found.append(_scipy_route(dtype, set_openblas))
    return found


def _as(C: Tensor, X: Tensor) -> Tensor:
    return X.to(C.dtype)


def _block_rows(C: Tensor, X: Tensor) -> None:
    keys = _as(C, X)
    for low in range(0, C.shape[0], _BLOCK):
        high = min(low + _BLOCK, C.shape[0])
        C[low:high, :high].addmm_(keys[:, low:high].mT, keys[:, :high])


def _has_onednn() -> bool:
    backend: Any = torch.backends.mkldnn
    return bool(backend.is_available()) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _onednn(C: Tensor, X: Tensor, block: int) -> None:
    """The float32 product of oneDNN, which torch reaches only through its linear layer."""
    # Transposed once: slices of columns would go to its reference loops, a hundred times slower.
    keys = _as(C, X).mT.contiguous()  # (d, n)
    linear = torch.ops.mkldnn._linear_pointwise
    for low in range(0, C.shape[0], block):
        high = min(low + block, C.shape[0])
        C[low:high, :high] += linear(keys[low:high], keys[:high], None, "none", [], "")


def _numpy_route(set_threads: Callable[[], object]) -> Route:
    name = "numpy X.T @ X"  # NumPy notices that both are one array and calls the library's syrk
    try:
        importlib.import_module("numpy")
    except ImportError:
        return Route(name, lambda C, X: None, "numpy is not installed")

    def update(C: Tensor, X: Tensor) -> None:
        keys = _as(C, X).numpy()
        C.numpy()[...] += keys.T @ keys

    set_threads()
    return Route(name, update)


def _scipy_route(dtype: torch.dtype, set_threads: Callable[[], object]) -> Route:
    name = "scipy dsyrk" if dtype == torch.float64 else "scipy ssyrk"
    try:
        blas: Any = importlib.import_module("scipy.linalg.blas")
    except ImportError:
        return Route(name, lambda C, X: None, "scipy is not installed")
    syrk = blas.dsyrk if dtype == torch.float64 else blas.ssyrk

    def update(C: Tensor, X: Tensor) -> None:
        # BLAS counts columns first: the row-major X (n, d) is its (d, n), and the lower triangle of
        # C its upper one.
        syrk(1.0, _as(C, X).numpy().T, beta=1.0, c=C.numpy().T, trans=0, lower=0, overwrite_c=1)

    set_threads()
    return Route(name, update)


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


def _cuda_routes(dtype: torch.dtype) -> list[Route]:
    if dtype in (torch.float32, torch.float64):
        return [
            Route("torch.addmm", lambda C, X: C.addmm_(X.mT, X)),
            Route(f"row panels ({_PANELS})", lambda C, X: _panels(C, X, narrow=False)),
        ]
    return [
        Route(
            "torch.addmm out_dtype",
            # Not with out=: that form gives wrong results.
            lambda C, X: torch.addmm(C, X.mT, X, out_dtype=torch.float32),
        ),
        Route(f"row panels ({_PANELS})", lambda C, X: _panels(C, X, narrow=True)),
    ]


def _panels(C: Tensor, X: Tensor, *, narrow: bool) -> None:
    """Rows of C in eight panels, each as wide as its last row: 9/16 of the full product."""
    d = C.shape[0]
    step = max(1, -(-d // (_PANELS * 128)) * 128)  # whole tiles of 128
    for low in range(0, d, step):
        high = min(low + step, d)
        panel = C[low:high, :high]
        if narrow:
            left, right = X[:, low:high].mT, X[:, :high]
            panel.copy_(torch.addmm(panel, left, right, out_dtype=torch.float32))
        else:
            panel.addmm_(X[:, low:high].mT, X[:, :high])
