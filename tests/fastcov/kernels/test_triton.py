"""What the Triton kernel computes, in Triton's interpreter; test_triton_compiled.py compiles it."""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastcov.kernels import triton as kernel

ROOT = Path(__file__).parents[3]
WORKER = Path(__file__).with_name("triton_worker.py")
KEYS = [torch.bfloat16, torch.float16, torch.float32]
SMALL = (16, 16, 4, 1, 1)  # tile, depth, warps, stages, programs: quick in the interpreter

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def interpreted():
    """Runs a task of triton_worker.py in a process of its own, see there."""
    worker = subprocess.Popen(
        [sys.executable, str(WORKER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert worker.stdin is not None and worker.stdout is not None

    def run(task, *arguments):
        pickle.dump((task, arguments), worker.stdin)
        worker.stdin.flush()
        worked, answer = pickle.load(worker.stdout)
        assert worked, answer
        return answer

    yield run
    worker.stdin.close()
    assert worker.wait(timeout=60) == 0


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def sums(d, seed=0):
    """A sum that is not zero; above the diagonal NaN, and 7.5, which a NaN would not betray."""
    C = torch.randn(d, d, generator=seeded(seed))
    above = torch.ones(d, d, dtype=torch.bool).triu(1)
    return C.masked_fill(above, 7.5).masked_fill(above & (C > 0), float("nan"))


def check(C, before, X, keep, alpha):
    """C against float64; float32 sums of some hundred products are good to a few 1e-7."""
    kept = X[keep].double()
    wanted = (before.double() + alpha * kept.T @ kept).tril()
    above = torch.ones_like(C, dtype=torch.bool).triu(1)
    error = (C.double().tril().masked_fill(above, 0) - wanted.masked_fill(above, 0)).norm()
    assert error <= 3e-7 * max(1.0, float(wanted.masked_fill(above, 0).norm()))
    assert torch.equal(C[above].nan_to_num(-1.0), before[above].nan_to_num(-1.0))


@pytest.mark.parametrize("dtype", KEYS)
@pytest.mark.parametrize(("tma", "kept"), [(True, "all"), (True, "mask"), (False, "all"), (False, "mask")])
def test_every_dtype_and_way_of_reading_against_float64(interpreted, dtype, tma, kept):
    n, d = 150, 48  # three tiles, of which programs take several in turn; not a multiple of 16 rows
    X = torch.randn(n, d, generator=seeded(1)).to(dtype)
    mask = None
    keep = slice(None)
    if kept == "mask":
        keep = mask = torch.rand(n, generator=seeded(2)) < 0.7
        mask[32:112] = True  # so that there are blocks whose rows are all kept
        X[~mask] = float("nan")
    before = sums(d)
    C = interpreted("launch", before, X, mask, 0.5, SMALL, tma, 2, 32)
    check(C, before, X, keep, 0.5)


@pytest.mark.parametrize("n", [0, 1, 16, 17])
@pytest.mark.parametrize("d", [1, 15, 16, 33])
def test_every_edge(interpreted, n, d):
    X = torch.randn(n, d, generator=seeded(n + d)).bfloat16()
    mask = torch.arange(n) % 5 != 3
    before = sums(d)
    check(interpreted("public", before, X, None, -1.0), before, X, slice(None), -1.0)
    check(interpreted("public", before, X, mask, 1.0), before, X, mask, 1.0)


@pytest.mark.parametrize("tma", [True, False])
def test_nothing_kept_adds_nothing(interpreted, tma):
    before = sums(20)
    X = torch.full((40, 32), float("nan"))[:, :20]
    nothing = torch.zeros(40, dtype=torch.bool)
    C = interpreted("launch", before, X, nothing, 1.0, SMALL, tma, 1, None)
    assert torch.equal(C.tril(), before.tril())


@pytest.mark.parametrize("tma", [True, False])
def test_rows_of_keys_and_of_the_sum_may_lie_apart(interpreted, tma):
    base = torch.randn(40, 96, generator=seeded(5)).half()
    X = base[::2, 16:64]  # (20, 48), rows 192 apart
    before = torch.randn(48, 80, generator=seeded(6))
    C = interpreted("launch", before[:, 7:55], X, None, 2.0, SMALL, tma, 1, None)
    assert C.stride() == (80, 1)
    around = C.as_strided((48, 80), (80, 1), 0)
    wanted = before.double()
    wanted[:, 7:55] += (2.0 * X.double().T @ X.double()).tril()
    assert float((around.double() - wanted).norm() / wanted.norm()) < 1e-7
    changed = around != before
    assert not changed[:, :7].any() and not changed[:, 55:].any()
    assert not changed[:, 7:55].triu(1).any()


def test_a_chain_is_promoted_to_the_second_sum(interpreted):
    # One row of 4096 makes 2^24, to which float32 cannot add the 0.5 of a step of 16 rows; four
    # such steps make 2, which it can. 4 chains of 64 rows after the first are 8.
    X = torch.zeros(64 + 4 * 64, 16)
    X[0] = 4096.0
    for row in range(64, X.shape[0], 16):
        X[row : row + 2] = 0.5
    for dtype in (torch.float16, torch.float32):
        for tma in (True, False):
            args = (torch.zeros(16, 16), X.to(dtype), None, 1.0, SMALL, tma, 1)
            assert (interpreted("launch", *args, 64).tril().diagonal() == 2**24 + 8).all()
            assert (interpreted("launch", *args, 512).tril().diagonal() == 2**24).all()


def literal_order(tiles, band):
    """The tiles of a lower triangle in bands: left of the corner by columns, then the corner."""
    order = []
    for top in range(0, tiles, band):
        rows = range(top, min(top + band, tiles))
        order += [(i, j) for j in range(top) for i in rows]
        order += [(i, j) for i in rows for j in range(top, i + 1)]
    return order


@pytest.mark.parametrize("tiles", [1, 2, 7, 8, 9, 16, 50, 129, 1024])
def test_the_number_of_a_tile_gives_its_place_exactly(interpreted, tiles):
    # 1024 tiles of 128 are d = 131072.
    i, j, row = interpreted("tiles_in_order", tiles, 8)
    wanted = torch.tensor(literal_order(tiles, 8), dtype=torch.int32)
    assert torch.equal(torch.stack([i, j], 1), wanted)
    assert len(set(map(tuple, wanted.tolist()))) == tiles * (tiles + 1) // 2
    literal_rows = torch.repeat_interleave(torch.arange(tiles), torch.arange(1, tiles + 1))
    assert torch.equal(row, literal_rows.int())


def test_rows_of_the_triangle_are_exact_up_to_the_widest_sum_it_takes(interpreted):
    i = torch.arange(1 << 15)  # 2^15 tiles of 64 are the 2^21 that `why_not` names
    first = i * (i + 1) // 2
    t = torch.stack([first, first + i], 1).flatten().int()  # first and last of every row
    got = interpreted("triangle_rows", t)
    assert torch.equal(got, i.repeat_interleave(2).int())


def test_offsets_have_64_bits(interpreted):
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, -9.0]]).bfloat16()
    # Two strides pass 2^31, in elements, where a 32-bit product of row and stride turns negative.
    results = interpreted("far", values, 2**30 + 8, 2**30 + 8)
    if results is None:
        pytest.skip("this machine does not hand out 13 GB of address space")
    for C in results:
        assert C.tril().tolist() == [[66.0, 0.0, 0.0], [78.0, 93.0, 0.0], [-36.0, -36.0, 126.0]]


def test_it_refuses_what_it_cannot_take_and_says_why(interpreted):
    X, C = torch.ones(4, 6), torch.zeros(6, 6)
    refused = {
        "it sums in float32 and the sum is torch.float64": (C.double(), X),
        "it takes float32, float16 and bfloat16 keys and these are torch.float64": (C, X.double()),
        "neighbours in a row of the keys are 4 elements apart": (C, torch.ones(6, 4).T),
        "neighbours in a row of the sum are 2 elements apart": (torch.zeros(6, 12)[:, ::2], X),
        "keys of shape (2147483648, 6) are too large for its 32-bit counts": (C, torch.ones(1, 6).expand(1 << 31, 6)),
    }
    for reason, (wrong_sum, wrong_keys) in refused.items():
        assert interpreted("refusal", wrong_sum, wrong_keys) == reason


def test_what_is_missing_is_said(monkeypatch):
    import triton

    def said(capabilities=((9, 0),), replaced=None):
        with monkeypatch.context() as patch:
            patch.delenv("TRITON_INTERPRET", raising=False)
            patch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
            patch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
            patch.setattr(kernel, "_device", lambda index: (capabilities[index], 132))
            if replaced is not None:
                patch.setattr(*replaced)
            kernel._missing.cache_clear()
            reason = kernel.why_not()
        kernel._missing.cache_clear()
        return reason

    assert said() is None
    assert said(((7, 5), (8, 0))) is None  # `refuses` tells them apart
    assert said(((7, 5),)) == "it needs compute capability 8.0 and the device has 7.5"
    assert said(()) == "there is no CUDA device"
    absent = (importlib.util, "find_spec", lambda name: None)
    assert said(replaced=absent) == "triton is not installed"
    old = (triton, "__version__", "3.5.1")
    assert said(replaced=old) == "it needs triton 3.6 and 3.5.1 is installed"
    rocm = (torch.version, "hip", "6.4")
    assert said(replaced=rocm) == "it is written for CUDA and this torch is built for ROCm"


def truncated(x):
    """float64 to the next float32 towards zero, as tensor cores round their sums."""
    near = x.float()
    inner = torch.nextafter(near, torch.zeros_like(near))
    return torch.where(near.double().abs() > x.abs(), inner, near).double()


def diagonal_bias(dtype, chain, n):
    """Mean relative error of 64 diagonal sums over n rows, in a model of the tensor cores.

    A step sums 16 products and the chain so far exactly, then truncates to float32.
    """
    X = torch.randn(n, 64, generator=seeded(0)).to(dtype)
    terms = [X.double() ** 2]
    if dtype == torch.float32:
        high = X.bfloat16()
        middle = (X - high.float()).bfloat16()
        low = (X - high.float() - middle.float()).bfloat16()
        h, m, w = high.double(), middle.double(), low.double()
        terms = [w * h, h * w, m * m, m * h, h * m, h * h]
    steps = torch.stack([term.view(-1, 16, 64).sum(1) for term in terms], 1)  # (n / 16, terms, 64)
    chained, promoted = torch.zeros(64, dtype=torch.float64), torch.zeros(64)
    for number, step in enumerate(steps, 1):
        for term in step:
            chained = truncated(chained + term)
        if number * 16 % chain == 0:
            promoted += chained.float()
            chained = torch.zeros_like(chained)
    exact = (X.double() ** 2).sum(0)
    return float(((promoted.double() + chained - exact) / exact).mean())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_promotion_keeps_the_bias_of_truncating_tensor_cores_below_the_gate(dtype):
    chain = kernel._ROWS_OF_CHAIN[dtype.itemsize]
    assert chain <= 1024
    assert abs(diagonal_bias(dtype, chain, n=16384)) < 1.5e-6
    # Without it the bias grows with the rows and fails the gate of 3e-6.
    assert diagonal_bias(dtype, 1 << 30, n=16384) < -1.5e-5


def test_six_products_of_bfloat16_pieces_are_as_good_as_float32(interpreted):
    X = torch.randn(64, 32, generator=seeded(8)) * 10.0 ** torch.arange(-4, 4).repeat(4)
    C = interpreted("launch", torch.zeros(32, 32), X, None, 1.0, SMALL, True, 1, None)
    sizes = X.double().norm(dim=0)
    # Relative to the norms of the two columns, so that small columns count as much as large ones.
    error = (C.double() - X.double().T @ X.double()).tril() / sizes[:, None] / sizes
    assert float(error.abs().max()) < 3e-7
