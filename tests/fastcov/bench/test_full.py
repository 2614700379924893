from __future__ import annotations

import functools
import sys
import types

import pytest
import torch

from benchmarks import full
from fastcov import ops
from fastcov.bench import suites
from fastcov.bench.measure import expected_lower, lower_error

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def routes(device, dtype):
    return {**suites.torch_routes(device, dtype), **full.routes(device, dtype, threads=1)}


NAMED = [pytest.param(dtype, name, id=f"{name} {dtype}") for dtype in DTYPES for name in routes(CPU, dtype)]


@pytest.mark.parametrize(("dtype", "name"), NAMED)
def test_every_route_adds_the_lower_triangle(monkeypatch, dtype, name):
    route = routes(CPU, dtype)[name]
    if isinstance(route, str):
        pytest.skip(route)
    monkeypatch.setattr(suites, "_BLOCK", 7)  # several blocks, the last one smaller
    if name.startswith("oneDNN block"):
        route = functools.partial(full._onednn, block=7)
    X = torch.randn(33, 20).to(dtype)
    C = torch.randn(20, 20, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    wanted = expected_lower(C, X)
    result = route(C, X)
    error, _ = lower_error(result if isinstance(result, torch.Tensor) else C, wanted)
    assert error < (1e-14 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_panels_of_the_gpu_add_the_lower_triangle(dtype):
    X, C = torch.randn(9, 1300, dtype=dtype), torch.randn(1300, 1300, dtype=dtype)
    wanted = expected_lower(C, X)
    full._panels(C, X, narrow=False)
    assert lower_error(C, wanted)[0] < 1e-6


def test_what_is_not_installed_says_so(monkeypatch):
    for name in ("scipy", "scipy.linalg", "scipy.linalg.blas", "numpy"):
        monkeypatch.setitem(sys.modules, name, None)
    found = full.routes(CPU, torch.float32, threads=1)
    assert found["scipy ssyrk"] == "scipy is not installed"
    assert found["numpy X.T @ X"] == "numpy is not installed"


def test_the_first_route_is_the_baseline():
    cuda = torch.device("cuda")
    for device in (CPU, cuda):
        assert next(iter(routes(device, torch.float32))) == "torch.addmm"
    assert list(routes(cuda, torch.bfloat16)) == ["torch.addmm out_dtype", "row panels (8)"]


def test_the_loop_of_a_kernel_is_asked_for_by_its_name(monkeypatch):
    asked = []

    def fma_peak(kernel, threads, dtype):
        asked.append((kernel, threads, dtype))
        return 120.0 + len(asked) % 3

    monkeypatch.setattr(ops, "kernels", lambda: {"avx2": None, "amx_bf16": None, "avx512_bf16": None, "avx512f": "no"})
    monkeypatch.setitem(sys.modules, "fastcov.kernels.cpu", types.SimpleNamespace(fma_peak=fma_peak))
    probe = full.fma_probe("avx2", torch.bfloat16, 2)
    assert (probe.name, probe.measure()) == ("FMA loop avx2 float32", 122.0)
    full.fma_probe("avx2", torch.float64, 1).measure()
    full.fma_probe("avx512_bf16", torch.bfloat16, 1).measure()
    tiles = full.fma_probe("amx_bf16", torch.float16, 1)
    assert (tiles.name, tiles.measure()) == ("tile loop amx_bf16 / 4", 122.0)
    assert full.fma_probe("amx_bf16", torch.float32, 1).name == "tile loop amx_bf16 / 6"
    assert asked[::3] == [
        ("avx2", 2, torch.float32),
        ("avx2", 1, torch.float64),
        ("avx512_bf16", 1, torch.bfloat16),
        ("amx_bf16", 1, torch.float16),
    ]
    assert full.fma_probe("avx512f", torch.float32, 2) is None  # it cannot run
    assert full.fma_probe("reference", torch.float32, 2) is None  # it has none
