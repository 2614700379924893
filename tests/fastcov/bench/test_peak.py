from __future__ import annotations

import sys
import types

import pytest
import torch

from fastcov import ops
from fastcov.bench.peak import fma_probe, gemm_probe

CPU = torch.device("cpu")


@pytest.mark.parametrize(("dtype", "word"), [("float64", "float64"), ("bfloat16", "float32")])
def test_a_large_product_of_the_cpu_is_of_a_full_precision(dtype, word):
    probe = gemm_probe(CPU, getattr(torch, dtype), quick=True)
    assert probe.name == f"GEMM {word} 256"
    assert 0.01 < probe.measure() < 1e5


def test_what_a_gpu_multiplies_is_named():
    cuda = torch.device("cuda")
    assert gemm_probe(cuda, torch.float32).name == "GEMM bfloat16 8192"
    assert gemm_probe(cuda, torch.float64).name == "GEMM float64 8192"


def test_the_loop_of_a_kernel_is_asked_for_by_its_name(monkeypatch):
    asked = []

    def fma_peak(kernel, threads, dtype):
        asked.append((kernel, threads, dtype))
        return 120.0 + len(asked) % 3

    monkeypatch.setattr(ops, "kernels", lambda: {"avx2": None, "amx_bf16": None, "avx512_bf16": None, "avx512f": "no"})
    monkeypatch.setitem(sys.modules, "fastcov.kernels.cpu", types.SimpleNamespace(fma_peak=fma_peak))
    probe = fma_probe("avx2", 2, torch.bfloat16)
    assert (probe.name, probe.measure()) == ("FMA loop avx2 float32", 122.0)
    fma_probe("avx2", 1, torch.float64).measure()
    fma_probe("avx512_bf16", 1, torch.bfloat16).measure()
    tiles = fma_probe("amx_bf16", 1, torch.float16)
    assert (tiles.name, tiles.measure()) == ("tile loop amx_bf16 / 4", 122.0)
    assert fma_probe("amx_bf16", 1, torch.float32).name == "tile loop amx_bf16 / 6"
    assert asked[::3] == [
        ("avx2", 2, torch.float32),
        ("avx2", 1, torch.float64),
        ("avx512_bf16", 1, torch.bfloat16),
        ("amx_bf16", 1, torch.float16),
    ]
    assert fma_probe("avx512f", 2, torch.float32) is None  # it cannot run
    assert fma_probe("reference", 2, torch.float32) is None  # it has none
