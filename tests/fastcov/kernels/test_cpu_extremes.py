"""Keys that are hard to sum in parts: large means, far scales, extremes, NaN and infinity."""

from __future__ import annotations

import pytest
import torch

from fastcov import rank_k_update
from fastcov.kernels import cpu

HERE = [name for name in (one.name for one in (*cpu.FAST, cpu.PORTABLE)) if cpu.CpuKernel(name).why_not() is None]

if not HERE:
    pytest.skip(f"no native kernel: {cpu.native_missing()}", allow_module_level=True)


def drawn(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def summed(name, X):
    """The lower triangle of X^T X by a variant, and in float64."""
    C = torch.zeros(X.shape[1], X.shape[1])
    if cpu.CpuKernel(name).why_not(C, X) is not None:
        pytest.skip("other keys")
    rank_k_update(C, X, kernel=name)
    return C.double(), (X.double().mT @ X.double()).tril()


KEYS = {
    "a large mean": drawn(3000, 100) + 300,
    "columns of far scales": drawn(3000, 100) * 10.0 ** torch.linspace(-9, 6, 100),
    "rows of far scales": drawn(3000, 100) * 10.0 ** torch.linspace(-12, 3, 3000)[:, None],
    "all bits set": (drawn(3000, 100).view(torch.int32) | 0x00FFFF).view(torch.float32),
    "near the largest": drawn(700, 100) * 2.0**58,
    "near the smallest": drawn(700, 100) * 2.0**-60,
    "some very small": torch.where(drawn(700, 100) > 1, 2.0**-40, 1.0) * drawn(700, 100, 1),
    "a few beside zeros": torch.nn.functional.relu(drawn(700, 100) - 3),
}


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("kind", KEYS)
def test_float32_keys_of_every_kind(name, kind):
    C, wanted = summed(name, KEYS[kind])
    assert float((C - wanted).norm() / wanted.norm()) < 1e-6
    diagonal = wanted.diagonal().clamp(min=1e-300)
    bias = float((C.diagonal() / diagonal - 1)[wanted.diagonal() > 0].mean())
    assert abs(bias) < 1e-6


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("kind", KEYS)
def test_numbers_are_right_each_for_itself(name, kind):
    # Beside the norms of their two columns, as a sum in float32 is.
    C, wanted = summed(name, KEYS[kind])
    norms = wanted.diagonal().sqrt()
    assert float(((C - wanted).abs() / torch.outer(norms, norms).clamp(min=1e-300)).max()) < 3e-6


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_not_finite_stays_where_it_is(name, dtype):
    X = drawn(700, 80).to(dtype)
    X[3, 7], X[650, 50], X[651, 50] = float("nan"), float("inf"), 2.0
    X[3, 50] = 0.5
    C = torch.zeros(80, 80)
    if cpu.CpuKernel(name).why_not(C, X) is not None:
        pytest.skip("other keys")
    rank_k_update(C, X, kernel=name)
    whole = C + C.tril(-1).mT
    others = [i for i in range(80) if i not in (7, 50)]
    assert whole[7].isnan().all()
    assert whole[50, 50] == float("inf")
    assert torch.equal(whole[50, others], float("inf") * X[650, others].float().sign())
    assert whole[others][:, others].isfinite().all()


def test_float16_keys_of_a_large_mean_have_no_bias():
    # The product of what rounding to bfloat16 leaves is 1e-6 of the diagonal.
    X = (drawn(4096, 64) + 1.75).half()
    for name in HERE:
        if cpu.CpuKernel(name).why_not(torch.zeros(64, 64), X) is None:
            C, wanted = summed(name, X)
            assert abs(float((C.diagonal() / wanted.diagonal() - 1).mean())) < 2e-7
