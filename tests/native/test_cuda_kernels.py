"""The CUDA kernels, run thread by thread on the CPU: see machine.h and emulated_device.h."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
import torch

from native import emulator

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return emulator.compiled("emulate_cuda.cpp", tmp_path_factory.mktemp("emulator"))


@pytest.fixture
def emulate(program, tmp_path):
    return lambda *args, **options: emulator.emulate(program, tmp_path, *args, **options)


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sum_of(d, pad=0):
    """A sum (d, d) with NaN above its diagonal, in rows that are `pad` longer than that."""
    C = drawn(d, d + pad, seed=9)
    return C.masked_fill_(torch.ones(d, d + pad, dtype=torch.bool).triu(1), float("nan"))[:, :d]


def assert_updated(got, C, kept, alpha=1.0, tolerance=2e-7):
    """The lower triangle is C + alpha * kept^T kept, all else as it was."""
    wanted = C.double().tril() + alpha * kept.double().mT @ kept.double()
    below = torch.ones_like(C, dtype=torch.bool).tril()
    assert got[~below].isnan().all(), "something above the diagonal was written"
    assert float((got[below].double() - wanted[below]).norm() / wanted[below].norm()) < tolerance


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("n, d", [(1, 8), (64, 192), (70, 104), (129, 392)])
def test_wgmma_gives_the_triangle_at_every_edge(emulate, dtype, n, d):
    X, C = drawn(n, d, dtype=dtype), sum_of(d)
    got, ran = emulate(C, X, alpha=-0.75)
    assert ran == "wgmma"
    assert_updated(got, C, X, alpha=-0.75)


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("late", [False, True])
def test_wgmma_in_any_order_of_events(emulate, cluster, late):
    X, C = drawn(7 * 64, 264, dtype=torch.bfloat16), sum_of(264)  # more stages than the ring has
    for seed in range(3):
        got, _ = emulate(C, X, cluster=cluster, late=late, seed=seed)
        assert_updated(got, C, X)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
def test_wgmma_clears_masked_rows_that_hold_nan(emulate, share):
    X, C = drawn(200, 264, dtype=torch.bfloat16), sum_of(264)
    mask = torch.rand(200, generator=torch.Generator().manual_seed(1)) < share
    mask[64:128] = share > 0  # one whole stage is kept
    X[~mask] = float("nan")
    got, ran = emulate(C, X, mask)
    assert ran == "wgmma"
    assert_updated(got, C, X[mask])


def test_wgmma_takes_keys_in_padded_rows_and_a_sum_in_any_layout(emulate):
    X = drawn(70, 136, dtype=torch.bfloat16)[:, 8:128]
    for C in (sum_of(120, pad=5), sum_of(120).mT.contiguous().mT):
        got, ran = emulate(C, X)
        assert ran == "wgmma"
        assert_updated(got, C, X)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("n, d", [(1, 1), (33, 128), (50, 136), (67, 133)])
def test_mma_gives_the_triangle_at_every_edge(emulate, dtype, n, d):
    X, C = drawn(n, d, dtype=dtype), sum_of(d)
    got, ran = emulate(C, X, alpha=-0.75, route="mma")
    assert ran == "mma"
    assert_updated(got, C, X, alpha=-0.75)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_mma_reads_only_rows_that_are_kept_or_named(emulate, dtype):
    X, C = drawn(90, 72, dtype=dtype), sum_of(72)
    mask = torch.rand(90, generator=torch.Generator().manual_seed(1)) < 0.6
    X[~mask] = float("nan")
    masked, _ = emulate(C, X, mask, route="mma")
    assert_updated(masked, C, X[mask])
    rows = torch.cat([mask.nonzero()[:, 0], mask.nonzero()[:3, 0]])  # three of them twice
    named, ran = emulate(C, X, rows=rows)
    assert ran == "mma"
    assert_updated(named, C, X[rows])


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_mma_takes_any_strides_and_any_alignment(emulate, dtype):
    C = sum_of(40, pad=3)
    for X in (drawn(40, 30, dtype=dtype).mT, drawn(30, 80, dtype=dtype)[:, ::2]):
        got, ran = emulate(C, X)
        assert ran == "mma"
        assert_updated(got, C, X[:, :40])
    X = drawn(30, 40, dtype=dtype)
    got, ran = emulate(C, X, shift=X.element_size())
    assert ran == "mma"
    assert_updated(got, C, X)


def test_a_named_row_that_does_not_exist_stops_the_kernel(emulate):
    X, C = drawn(9, 16), sum_of(16)
    for row in (-1, 9):
        with pytest.raises(RuntimeError, match="trap"):
            emulate(C, X, rows=torch.tensor([0, row]))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("seed", [0, 1])
def test_only_a_hopper_runs_wgmma_and_only_on_16_bit_keys(emulate, dtype, seed):
    X, C = drawn(20, 16, dtype=dtype), sum_of(16)
    assert emulate(C, X, hopper=False, seed=seed)[1] == "mma"
    assert emulate(C, X, seed=seed)[1] == ("mma" if dtype == torch.float32 else "wgmma")


@pytest.mark.parametrize("route", ["mma", "wgmma"])
def test_divided_tiles_add_up_to_the_same_bits_in_every_order(emulate, route):
    # 3 tiles and 7 workers with mma, 2 tiles and 4 workers with wgmma: all of them are divided in two.
    n, d, processors = (20 * 32, 256, 7) if route == "mma" else (20 * 64, 200, 8)
    X, C = drawn(n, d, dtype=torch.bfloat16), sum_of(d)
    whole, _ = emulate(C, X, route=route, divide=False)
    assert_updated(whole, C, X)
    results = [emulate(C, X, route=route, processors=processors, seed=seed)[0] for seed in (0, 1)]
    for divided in results:
        assert_updated(divided, C, X)
    below = torch.ones(d, d, dtype=torch.bool).tril()
    assert torch.equal(results[0][below], results[1][below])
    assert not torch.equal(results[0][below], whole[below])  # so they were divided


@pytest.mark.slow
@pytest.mark.parametrize(
    "route, dtype, n", [("wgmma", torch.bfloat16, 8192), ("mma", torch.bfloat16, 8192), ("mma", torch.float32, 2048)]
)
def test_sums_that_truncate_are_promoted_in_time(emulate, route, dtype, n):
    # Without promotion, these rows lose about 1e-5 of the diagonal.
    X, C = drawn(n, 16, dtype=dtype), torch.zeros(16, 16)
    got, _ = emulate(C, X, route=route, truncate=True, divide=False)
    wanted = X.double().mT @ X.double()
    assert float((got.double() - wanted).tril().norm() / wanted.tril().norm()) < 1e-5
    bias = float(((got.double() - wanted).diag() / wanted.diag()).mean())
    assert -3e-6 < bias < 0  # below zero: it does truncate


@pytest.fixture(scope="module")
def listing(tmp_path_factory):
    return emulator.compiled("list_schedule.cpp", tmp_path_factory.mktemp("schedule"))


@pytest.mark.parametrize("kernel, tile", [("mma", (128, 128)), ("wgmma", (256, 192))])
@pytest.mark.parametrize("d", [1, 128, 200, 1000, 3000])
@pytest.mark.parametrize("workers", [1, 3, 66])
def test_every_tile_of_the_triangle_is_computed_once_and_by_turns(listing, kernel, tile, d, workers):
    steps = 100
    reach = [(min((r + 1) * tile[0], d) - 1) // tile[1] for r in range(-(-d // tile[0]))]
    wanted = {(row, col) for row, last in enumerate(reach) for col in range(last + 1)}
    for divide in (False, True):
        pieces = emulator.listed(listing, kernel, d, steps, workers, divide)
        counted = Counter()
        parts = defaultdict(list)
        load = Counter()
        for worker, row, col, begin, end, turn, count, slot in pieces:
            counted.update((row, col, step) for step in range(begin, end))
            parts[row, col].append((turn, worker, count, slot))
            load[worker] += end - begin
        assert set(counted.values()) == {1}
        assert {(row, col) for row, col, _ in counted} == wanted
        assert len(counted) == len(wanted) * steps
        for turns in parts.values():
            # Turns count up from zero, and a worker waits for higher ones only.
            assert [turn for turn, *_ in sorted(turns)] == list(range(len(turns)))
            assert [worker for _, worker, *_ in sorted(turns)] == sorted(
                (worker for _, worker, *_ in turns), reverse=True
            )
            assert {count for _, _, count, _ in turns} == {len(turns)}
        slots = {turns[0][3] for turns in parts.values() if len(turns) > 1}
        assert len(slots) == sum(len(turns) > 1 for turns in parts.values())
        assert max(slots, default=0) < workers
        rounds = -(-len(wanted) // workers)
        assert max(load.values()) <= rounds * steps
        if divide and workers >= 2 * len(wanted):  # two workers a tile, or more
            assert max(load.values()) <= steps // 2


@pytest.mark.parametrize(("d", "longest", "strips"), [(4096, 0.84, 72), (6400, 0.75, 72), (16384, 0.38, 72)])
def test_workers_of_the_last_round_read_the_same_keys(listing, d, longest, strips):
    # 66 clusters, 65,536 keys. Shares of the same size would read 132 strips of keys at a time: two for each.
    steps, workers = 1024, 66
    pieces = emulator.listed(listing, "wgmma", d, steps, workers, True)
    at = [[(row, col, step) for worker, row, col, begin, end, _, parts, _ in pieces if worker == w and parts > 1
           for step in range(begin, end)] for w in range(workers)]  # fmt: skip
    assert max(map(len, at)) <= longest * steps
    for moment in range(0, max(map(len, at)), 7):
        now = [own[moment] for own in at if moment < len(own)]
        read = {("row", row, step) for row, _, step in now} | {("col", col, step) for _, col, step in now}
        print(d, len(read), max(map(len, at)))
        assert len(read) <= strips
