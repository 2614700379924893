"""Compiles the programs of this folder and runs the CUDA kernels in them, on CPU tensors."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
CODES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 3}
ROUTES = {"auto": 0, "mma": 1, "wgmma": 2}


def compiled(source: str, folder: Path) -> Path:
    """The program made of one file of this folder, or a skip where there is no compiler."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    program = folder / source.removesuffix(".cpp")
    here, sources = ROOT / "tests" / "native", ROOT / "csrc" / "cuda"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    if not sources.is_dir():
        pytest.skip("the C++ sources are not there")
    built = subprocess.run(
        [compiler, *flags, f"-I{here}", f"-I{sources}", here / source, "-o", program], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return program


def emulate(
    program: Path,
    folder: Path,
    C: Tensor,
    X: Tensor,
    mask: Tensor | None = None,
    rows: Tensor | None = None,
    alpha: float = 1.0,
    *,
    route: str = "auto",
    hopper: bool = True,
    cluster: int = 2,
    processors: int = 4,
    divide: bool = True,
    seed: int = 0,
    late: bool = True,
    truncate: bool = False,
    shift: int = 0,
) -> tuple[Tensor, str]:
    """The update of C (d, d) by X (n, d), both with any strides, and the kernel that ran.

    Args:
        program: emulate_cuda, compiled.
        folder: Where the arrays go.
        C: The sum; not changed.
        X: Keys.
        mask: Rows to keep, bool (n,).
        rows: Rows to keep, int64 (m,).
        alpha: A factor.
        route: "auto", "mma" or "wgmma".
        hopper: Whether the device would be one.
        cluster: Blocks that share keys in the wgmma kernel.
        processors: Of the device.
        divide: Whether tiles may be divided among workers.
        seed: Of the order in which threads run and copies arrive.
        late: Whether asynchronous work is done as late as it may be, or at once.
        truncate: Whether sums are rounded towards zero, as tensor cores do.
        shift: Bytes by which X lies off a multiple of 16.
    """
    (folder / "x.bin").write_bytes(_bytes(X))
    (folder / "c.bin").write_bytes(_bytes(C))
    if mask is not None:
        (folder / "mask.bin").write_bytes(_bytes(mask.to(torch.uint8)))
    if rows is not None:
        (folder / "rows.bin").write_bytes(_bytes(rows))
    options = {
        "route": ROUTES[route],
        "hopper": int(hopper),
        "cluster": cluster,
        "processors": processors,
        "divide": int(divide),
        "seed": seed,
        "late": int(late),
        "truncate": int(truncate),
        "shift": shift,
        "dtype": CODES[X.dtype],
        "n": X.shape[0],
        "d": X.shape[1],
        "x_row_stride": X.stride(0),
        "x_col_stride": X.stride(1),
        "c_row_stride": C.stride(0),
        "c_col_stride": C.stride(1),
        "alpha": alpha,
        "mask": int(mask is not None),
        "rows": int(rows is not None),
    }
    words = [f"{name}={value}" for name, value in options.items()]
    ran = subprocess.run([program, folder, *words], capture_output=True, text=True, timeout=600)
    if ran.returncode != 0:
        raise RuntimeError(f"exit {ran.returncode}: {ran.stderr.strip()}")
    result = torch.frombuffer(bytearray((folder / "c.bin").read_bytes()), dtype=torch.float32)
    return result.as_strided(C.shape, C.stride()), ran.stdout.strip()


def _bytes(t: Tensor) -> bytes:
    """What lies between the first and the last element of a tensor, gaps included."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage(), t.storage_offset(), (span,))
    return whole.view(torch.uint8).numpy().tobytes()


def listed(program: Path, kernel: str, d: int, steps: int, workers: int, divide: bool) -> list[list[int]]:
    """The pieces of all workers: worker, row, col, begin, end, turn, parts, slot."""
    words = [kernel, *map(str, (d, steps, workers, int(divide)))]
    ran = subprocess.run([program, *words], capture_output=True, text=True, check=True)
    return [[int(word) for word in line.split()] for line in ran.stdout.splitlines()]
