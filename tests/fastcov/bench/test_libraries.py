from __future__ import annotations

import sys

import pytest
import torch

from fastcov.bench import libraries
from fastcov.bench.oracle import expected_lower, lower_error

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAMED = [
    pytest.param(dtype, place, id=f"{route.name} {dtype}")
    for dtype in DTYPES
    for place, route in enumerate(libraries.routes(CPU, dtype, threads=1))
]


@pytest.mark.parametrize(("dtype", "place"), NAMED)
def test_every_route_adds_the_lower_triangle(monkeypatch, dtype, place):
    monkeypatch.setattr(libraries, "_BLOCK", 7)  # several blocks, the last one smaller
    route = libraries.routes(CPU, dtype, threads=1)[place]
    if route.cannot is not None:
        pytest.skip(route.cannot)
    X = torch.randn(33, 20).to(dtype)
    C = torch.randn(20, 20, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    wanted = expected_lower(C, X)
    result = route.update(C, X)
    error, _ = lower_error(result if isinstance(result, torch.Tensor) else C, wanted)
    assert error < (1e-14 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_panels_of_the_gpu_add_the_lower_triangle(dtype):
    X, C = torch.randn(9, 1300, dtype=dtype), torch.randn(1300, 1300, dtype=dtype)
    wanted = expected_lower(C, X)
    libraries._panels(C, X, narrow=False)
    assert lower_error(C, wanted)[0] < 1e-6


def test_what_is_not_installed_says_so(monkeypatch):
    for name in ("scipy", "scipy.linalg", "scipy.linalg.blas", "numpy"):
        monkeypatch.setitem(sys.modules, name, None)
    routes = {route.name: route for route in libraries.routes(CPU, torch.float32, threads=1)}
    assert routes["scipy ssyrk"].cannot == "scipy is not installed"
    assert routes["numpy X.T @ X"].cannot == "numpy is not installed"


def test_the_first_route_is_the_baseline():
    for device, names in ((CPU, {"torch.addmm"}), (torch.device("cuda"), {"torch.addmm"})):
        assert libraries.routes(device, torch.float32, 1)[0].name in names
    bfloat16 = libraries.routes(torch.device("cuda"), torch.bfloat16, 1)
    assert [route.name for route in bfloat16] == ["torch.addmm out_dtype", "row panels (8)"]
