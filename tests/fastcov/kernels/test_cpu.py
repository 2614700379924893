from __future__ import annotations

import threading

import pytest
import torch

from fastcov import KernelUnavailable, ops, rank_k_update
from fastcov.kernels import cpu

VARIANTS = [one.name for one in (*cpu.FAST, cpu.PORTABLE)]
HERE = [name for name in VARIANTS if cpu.CpuKernel(name).why_not() is None]
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

if not HERE:
    pytest.skip(f"no native kernel: {cpu.native_missing()}", allow_module_level=True)


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def lower(C, rows, alpha=1.0):
    """The lower triangle of C + alpha * rows^T rows in float64, NaN above it."""
    rows = rows.double()
    whole = C.double().tril() + alpha * rows.mT @ rows
    return whole.masked_fill(torch.ones_like(whole, dtype=torch.bool).triu(1), float("nan"))


def assert_equal(C, wanted, tolerance=1e-6):
    above = torch.ones_like(C, dtype=torch.bool).triu(1)
    assert C[above].isnan().all(), "something above the diagonal was written"
    difference = (C.double() - wanted).masked_fill(above, 0)
    assert float(difference.norm() / wanted.masked_fill(above, 0).norm()) < tolerance


def sum_of(d, dtype=torch.float32, seed=9):
    C = drawn(d, d, dtype=dtype, seed=seed)
    return C.masked_fill(torch.ones(d, d, dtype=torch.bool).triu(1), float("nan"))


def takes(name, C, X):
    return cpu.CpuKernel(name).why_not(C, X) is None


def plain():
    """The first of those that take keys of float32: the fastest may be for pairs of bfloat16 alone."""
    return next(name for name in HERE if takes(name, torch.zeros(2, 2), torch.zeros(1, 2)))


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("d", [1, 2, 23, 24, 25, 47, 48, 49, 96, 385, 400])
def test_every_width_around_the_edges_of_tiles_panels_and_blocks(name, dtype, d):
    for n in (1, 2, 3, 128, 129, 255, 256, 257, 600):
        X = drawn(n, d, dtype=dtype, seed=n)
        C = sum_of(d)
        if not takes(name, C, X):
            continue
        wanted = lower(C, X, alpha=-0.75)
        rank_k_update(C, X, alpha=-0.75, kernel=name)
        assert_equal(C, wanted)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("dtype", FLOATS)
def test_float64_sums_are_summed_in_float64(name, dtype):
    X, C = drawn(777, 130, dtype=dtype), sum_of(130, torch.float64)
    if not takes(name, C, X):
        pytest.skip("only float32 sums")
    wanted = lower(C, X)
    rank_k_update(C, X, kernel=name)
    assert_equal(C, wanted, 1e-14)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_that_are_left_out_are_not_looked_at(name, dtype):
    X = drawn(700, 100, dtype=dtype)
    keep = torch.rand(700, generator=torch.Generator().manual_seed(1)) < 0.7
    X[~keep] = float("nan")
    masked = sum_of(100)
    if not takes(name, masked, X):
        pytest.skip("other keys")
    wanted = lower(masked, X[keep])
    rank_k_update(masked, X, mask=keep, kernel=name)
    assert_equal(masked, wanted)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("dtype", FLOATS)
def test_keys_and_sums_of_any_strides(name, dtype):
    base = drawn(310, 260, dtype=dtype)
    views = [base[:, 3:103], base[::3, :100], base[:, ::2], base[:100].mT, base[:1].expand(9, -1)]
    for X in views:
        d = X.shape[1]
        storage = torch.full((d, 2 * d), float("nan"))
        for C in (storage[:, :d], storage[:, ::2], torch.full((d, d), float("nan")).mT):
            C.copy_(sum_of(d))
            if not takes(name, C, X):
                continue
            wanted = lower(C, X)
            rank_k_update(C, X, kernel=name)
            assert_equal(C, wanted)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_the_result_does_not_depend_on_the_number_of_threads(name, threads):
    X, C = drawn(600, 500, dtype=torch.bfloat16), sum_of(500)
    alone, before = C.clone(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        rank_k_update(alone, X, kernel=name)
        torch.set_num_threads(threads)
        rank_k_update(C, X, kernel=name)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(C.tril(), alone.tril())
    assert_equal(C, lower(sum_of(500), X))


def test_keys_are_handed_over_where_they_lie_and_torch_says_how_many_threads(monkeypatch):
    calls = []

    class Module:
        def cpu_rank_k(self, **arguments):
            calls.append(arguments)

    monkeypatch.setattr(cpu, "native", Module)
    X, C = drawn(6, 8, dtype=torch.bfloat16)[1:, 2:], torch.zeros(6, 6)
    mask = torch.tensor([True, False, True, False, True])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            cpu.CpuKernel("avx2").update(C, X, mask, 2.0)
    finally:
        torch.set_num_threads(before)
    assert [call["threads"] for call in calls] == [1, 2]
    assert {(call["x"], call["c"]) for call in calls} == {(X.data_ptr(), C.data_ptr())}
    assert [(call["rows"], call["d"], call["alpha"]) for call in calls] == [(3, 6, 2.0)] * 2
    assert cpu._offsets(X, mask).tolist() == [0, 16, 32]  # rows 0, 2 and 4, 8 apart


def test_callers_at_the_same_time_do_not_share_memory():
    keys = [drawn(500, 300, seed=i) for i in range(4)]
    sums = [sum_of(300) for _ in keys]
    wanted = [lower(C, X) for C, X in zip(sums, keys, strict=True)]

    def work(i):
        rank_k_update(sums[i], keys[i], kernel=plain())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(keys))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for C, right in zip(sums, wanted, strict=True):
        assert_equal(C, right)


def test_halves_are_exact_down_to_their_smallest():
    # Zero, the smallest and largest subnormal, the smallest normal, the largest number.
    values = torch.tensor([0.0, 2.0**-24, 1023 * 2.0**-24, 2.0**-14, 65504.0])
    for name in HERE:
        if not takes(name, torch.zeros(5, 5, dtype=torch.float64), values.half()[None]):
            continue
        C = torch.zeros(5, 5, dtype=torch.float64)
        rank_k_update(C, values.half()[None], kernel=name)
        assert torch.equal(C, torch.outer(values.double(), values.double()).tril())
        one = torch.zeros(2, 2, dtype=torch.float64)
        rank_k_update(one, torch.tensor([[float("inf"), -1.0]]).half(), kernel=name)
        assert one[0, 0] == float("inf") and one[1, 0] == -float("inf") and one[1, 1] == 1


def test_pairs_of_bfloat_add_an_odd_last_row():
    # The tile of avx512_bf16, here in portable instructions.
    C = torch.zeros(1, 1)
    rank_k_update(C, torch.tensor([[2.0], [3.0], [5.0]]).bfloat16(), kernel="portable")
    assert C.item() == 38


def test_the_fastest_variant_is_chosen_and_portable_never():
    C, X = torch.zeros(4, 4), torch.zeros(2, 4, dtype=torch.bfloat16)
    over = ops.not_preferred()
    fast = [name for name in HERE if name != "portable" and name not in over]
    assert ops.chosen(C, X) == (fast[0] if fast else "reference")
    assert ops.chosen(C, X.float()) == next((n for n in fast if n != "avx512_bf16"), "reference")


@pytest.mark.parametrize(("pairs", "reason"), [(0.5, "0.5 times the rate of float32"), (2.0, None)])
def test_pairs_of_bfloat_are_chosen_only_where_they_are_fast(monkeypatch, pairs, reason):
    rates = {"avx512_bf16": pairs, "avx512f": 1.0}
    monkeypatch.setattr(ops, "_chosen", {})
    monkeypatch.setattr(cpu, "_missing", lambda name: None if name in rates else "not here")
    monkeypatch.setattr(cpu, "fma_peak", lambda kernel, *rest: 100 * rates[kernel])
    cpu._rate_of_pairs.cache_clear()
    try:
        found = cpu.CpuKernel("avx512_bf16").not_preferred()
        assert found is None if reason is None else reason in found
        assert cpu.CpuKernel("avx512f").not_preferred() is None
        assert ("avx512_bf16" in ops.not_preferred()) == (reason is not None)
        C, X = torch.zeros(4, 4), torch.ones(2, 4, dtype=torch.bfloat16)
        assert ops.chosen(C, X) == ("avx512_bf16" if reason is None else "avx512f")
    finally:
        cpu._rate_of_pairs.cache_clear()


@pytest.mark.parametrize(
    ("here", "pairs", "reason"),
    [
        ({"amx_bf16", "avx512_bf16"}, 0.5, None),
        ({"avx512_bf16"}, 2.0, None),
        ({"avx512_bf16"}, 0.5, "pairs of bfloat16 are multiplied at 0.5 times the rate of float32 here"),
        ({"avx512f"}, 2.0, "this processor lacks its instructions"),
    ],
)
def test_whether_products_of_bfloat_are_faster(monkeypatch, here, pairs, reason):
    lacks = "this processor lacks its instructions"
    monkeypatch.setattr(cpu, "_missing", lambda name: None if name in here else lacks)
    monkeypatch.setattr(cpu, "_rate_of_pairs", lambda: pairs)
    assert cpu.why_no_bfloat() == reason


def test_a_variant_that_cannot_run_says_why():
    reasons = {name: reason for name, reason in ops.kernels().items() if name in VARIANTS}
    for name, reason in reasons.items():
        if reason is not None:
            with pytest.raises(KernelUnavailable, match=f"{name}.*{reason}"):
                rank_k_update(torch.zeros(2, 2), torch.zeros(1, 2), kernel=name)
            with pytest.raises(ValueError, match=reason):
                cpu.fma_peak(name)
    with pytest.raises(KernelUnavailable, match="meta"):
        rank_k_update(torch.zeros(2, 2, device="meta"), torch.zeros(1, 2, device="meta"), kernel=HERE[0])


def test_a_peak_is_asked_of_a_variant_in_its_codes(monkeypatch):
    assert cpu.fma_peak(HERE[0], threads=2, seconds=0.01) > 0  # the real one gives a rate
    calls = []

    class Module:
        def cpu_peak(self, **arguments):
            calls.append(arguments)
            return 7.0

    monkeypatch.setattr(cpu, "native", Module)
    assert cpu.fma_peak(HERE[0], 3, torch.float64, 0.5) == 7.0
    assert calls == [{"variant": HERE[0], "dtype": 1, "threads": 3, "seconds": 0.5}]


def test_without_the_native_module_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(cpu, "native", lambda: None)
    monkeypatch.setattr(cpu, "native_missing", lambda: "the native module is not installed (x)")
    monkeypatch.setattr(ops, "_chosen", {})
    cpu._missing.cache_clear()
    try:
        assert cpu.CpuKernel("avx2").why_not() == "the native module is not installed (x)"
        assert ops.chosen(torch.zeros(2, 2), torch.zeros(1, 2)) == "reference"
    finally:
        cpu._missing.cache_clear()


def test_a_few_rows_take_a_small_workspace_and_it_can_be_given_back():
    cpu.native().cpu_release_workspace()
    assert cpu.native().cpu_workspace() == 0
    few, more = drawn(16, 2048), drawn(256, 2048)
    C = torch.zeros(2048, 2048)
    rank_k_update(C, few, kernel=plain())
    small = cpu.native().cpu_workspace()
    rank_k_update(C, more, kernel=plain())
    large = cpu.native().cpu_workspace()
    rank_k_update(C, few, kernel=plain())
    # Two copies of the keys, in whole panels; tiles have 6 bytes for a key of 4, and 32 rows.
    assert 0 < small <= 3 * 32 * 2048 * 4 and 2 * 256 * 2048 * 4 <= large <= 3 * 256 * 2048 * 4
    assert cpu.native().cpu_workspace() == large, "the larger one is kept"
    cpu.native().cpu_release_workspace()
    assert cpu.native().cpu_workspace() == 0
