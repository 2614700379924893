from __future__ import annotations

import pytest
import torch

from fastcov import ops
from fastcov.kernels import gpu
from tiny_kernels import offer

ROWS = [
    {"dtype": "bfloat16", "d": 6400, "seconds": {"triton": 3.0, "cuda": 2.0, "panels": 4.0}},
    {"dtype": "bfloat16", "d": 16384, "seconds": {"triton": 3.0, "cuda": 5.0, "panels": 4.0}},
    {"dtype": "float32", "d": 6400, "seconds": {"triton": 9.0}},
]


@pytest.fixture
def measured(monkeypatch):
    gpu._order.cache_clear()
    monkeypatch.setattr(gpu, "_table", lambda: {"8.0": ROWS})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    yield
    gpu._order.cache_clear()


def test_the_shipped_table_can_be_read():
    for rows in gpu._table().values():
        for row in rows:
            assert row["d"] > 0 and all(seconds > 0 for seconds in row["seconds"].values())


def test_the_nearest_measured_width_decides(measured):
    device = torch.device("cuda", 0)
    assert gpu.order(device, torch.bfloat16, 6400) == ["cuda", "triton", "panels"]
    assert gpu.order(device, torch.bfloat16, 1000) == ["cuda", "triton", "panels"]
    # 10240 is the geometric mean of the two: below it the one, above it the other.
    assert gpu.order(device, torch.bfloat16, 10_200)[0] == "cuda"
    assert gpu.order(device, torch.bfloat16, 10_300)[0] == "triton"
    assert gpu.order(device, torch.float32, 99) == ["triton"]
    assert gpu.order(device, torch.float16, 6400) == []


@pytest.mark.parametrize(
    ("capability", "dtype", "wanted"),
    [
        ((8, 9), torch.bfloat16, []),
        ((9, 0), torch.bfloat16, ["cuda"]),
        ((9, 0), torch.float16, ["cuda"]),
        ((9, 0), torch.float32, []),
        ((10, 0), torch.bfloat16, []),
    ],
)
def test_where_none_was_measured_hopper_has_a_kernel_of_its_own(measured, monkeypatch, capability, dtype, wanted):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert gpu.order(torch.device("cuda", 0), dtype, 6400) == wanted


@pytest.mark.parametrize(
    ("dtype", "d", "first"),
    [(torch.bfloat16, 6400, "cuda"), (torch.bfloat16, 16384, "triton"), (torch.float16, 64, "high")],
)
def test_what_was_measured_comes_first(measured, monkeypatch, dtype, d, first):
    kernels = [
        ops.Kernel(name, lambda *a: None, lambda C=None, X=None: None) for name in ("high", "triton", "panels", "cuda")
    ]
    offer(monkeypatch, *kernels, devices=("cuda",))

    class Somewhere:
        """Stands in for a tensor on a device that is not here."""

        device = torch.device("cuda", 0)
        shape = (d, d)

    Somewhere.dtype = dtype
    assert ops._best(Somewhere(), Somewhere())[0].name == first
