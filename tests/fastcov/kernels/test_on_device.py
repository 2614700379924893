"""Every GPU kernel against float64 on the device itself: shapes, masks, strides, long sums.

The gate is that of docs/results/performance.md: a relative Frobenius error of at most 1e-5, and a diagonal
that is off by at most 3e-6 in the mean.
"""

from __future__ import annotations

import pytest
import torch

from fastcov import KernelUnavailable, ops, rank_k_update
from fastcov.bench.measure import expected_lower, failure, lower_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]

KERNELS = ["triton", "cuda", "panels"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
WIDTHS = [1, 7, 64, 127, 128, 129, 384, 1000, 2056]


@pytest.fixture(params=KERNELS)
def kernel(request):
    """The name of a kernel that can run here; the reason of a skip where it cannot."""
    reason = ops.kernels()[request.param]
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def drawn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def start(d, n=1, seed=1):
    """A sum as large as what is added to it, with a positive diagonal and NaN above."""
    C = drawn(d, d, seed=seed) * n**0.5
    C.diagonal().abs_().add_(n)
    return C.masked_fill_(torch.ones_like(C, dtype=torch.bool).triu_(1), float("nan"))


def checked(kernel, C, X, kept=None, **arguments):
    """Update C, and compare it with `kept`, the rows that count, in float64."""
    wanted = expected_lower(C, X if kept is None else kept)
    try:
        rank_k_update(C, X, kernel=kernel, **arguments)
    except KernelUnavailable as error:
        pytest.skip(str(error))
    error, bias = lower_error(C, wanted)
    assert failure(C.device, C.dtype, error, bias) is None
    d = C.shape[0]
    assert int(C.triu(1).isnan().sum()) == d * (d - 1) // 2, "something above was written"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("n", [1, 63, 1025, 4096])
def test_every_width_and_number_of_rows(kernel, dtype, d, n):
    checked(kernel, start(d, n), drawn(n, d, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [127, 384, 2056])
def test_a_mask_keeps_what_it_names(kernel, dtype, d):
    X = drawn(8, 600, d, dtype=dtype)
    mask = drawn(8, 600, seed=2) < 0.5
    mask[3], mask[5] = True, False  # a document that is whole, and one that is all padding
    X[~mask] = float("nan")  # what is not kept is not even looked at
    kept = X[mask]
    checked(kernel, start(d, len(kept)), X, kept, mask=mask)
    checked(kernel, start(d), X, kept[:0], mask=torch.zeros_like(mask))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_of_keys_and_of_the_sum(kernel, dtype):
    n, d = 1500, 264
    wide = drawn(n, d + 24, dtype=dtype)
    checked(kernel, start(d, n), wide[:, 8 : 8 + d])  # aligned, with gaps
    checked(kernel, start(d, n), wide[:, 3 : 3 + d])  # not aligned
    checked(kernel, start(d, n // 2), wide[::2, :d])
    checked(kernel, start(d, n), drawn(d, n, dtype=dtype).mT)
    batch = drawn(5, 300, d, dtype=dtype).transpose(0, 1)
    checked(kernel, start(d, n), batch, batch.reshape(n, d))
    outer = start(d + 8, n)
    checked(kernel, outer[8:, 8:], wide[:, :d])
    assert torch.equal(outer[:8, :8].tril(), start(d + 8, n)[:8, :8].tril())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_factor_may_be_negative(kernel, dtype):
    X, C = drawn(700, 300, dtype=dtype), start(300, 700)
    before = C.clone()
    try:
        rank_k_update(C, X, alpha=0.5, kernel=kernel)
        rank_k_update(C, X, alpha=-0.5, kernel=kernel)
    except KernelUnavailable as error:
        pytest.skip(str(error))
    error, _ = lower_error(C, before.double())
    assert error <= 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sums_of_ill_conditioned_keys_keep_the_gate_and_stay_positive_definite(kernel, dtype):
    n, d = 65536, 2048
    scale = torch.logspace(0, -3, d, device="cuda")  # eigenvalues from 1 down to 1e-6
    X = (drawn(n, d) * scale[torch.randperm(d, device="cuda")]).to(dtype)
    C = torch.zeros(d, d, device="cuda").masked_fill_(
        torch.ones(d, d, dtype=torch.bool, device="cuda").triu_(1), float("nan")
    )
    checked(kernel, C, X)
    _, info = torch.linalg.cholesky_ex((C / n).double().tril())
    assert int(info) == 0


@pytest.mark.parametrize("dtype", DTYPES[:1])
def test_offsets_above_two_to_the_31(kernel, dtype):
    n, d = 131080, 16392  # 2.1e9 numbers in X: the last rows lie beyond what 32 bits count
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("less than 24 GiB of memory are free on the device")
    generator = torch.Generator("cuda").manual_seed(0)
    X = torch.empty(n, d, dtype=dtype, device="cuda").normal_(generator=generator)
    last = torch.zeros(n, dtype=torch.bool, device="cuda")
    last[-3000:] = True
    checked(kernel, start(d, 3000), X, X[-3000:], mask=last)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_chosen_without_a_name_keeps_the_gate(dtype):
    X, C = drawn(9000, 640, dtype=dtype), start(640, 9000)
    checked(None, C, X)


def test_updates_follow_the_current_stream(kernel):
    """The keys are made on a stream of their own, late: whoever does not wait reads zeros."""
    X, C = torch.zeros(4096, 512, dtype=torch.bfloat16, device="cuda"), start(512, 4096)
    made = drawn(4096, 512, dtype=torch.bfloat16)
    wanted = expected_lower(C, made)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        X.copy_(made)
        try:
            rank_k_update(C, X, kernel=kernel)
        except KernelUnavailable as error:
            pytest.skip(str(error))
    stream.synchronize()
    error, bias = lower_error(C, wanted)
    assert failure(C.device, C.dtype, error, bias) is None
