from __future__ import annotations

import math

import pytest
import torch

from fastcov.bench import measure as measuring
from fastcov.bench.measure import (
    Case,
    Contender,
    Effort,
    Probe,
    Verdict,
    expected_lower,
    failure,
    lower_error,
    measure,
    peak_beyond,
    peak_probe,
    quantile,
    upper_is_untouched,
)  # fmt: skip
from fastcov.errors import KernelUnavailable

CPU = torch.device("cpu")


def test_expected_lower_by_hand():
    X = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    C = torch.tensor([[10.0, 99.0], [1.0, 20.0]])
    assert expected_lower(C, X).tril().tolist() == [[20.0, 0.0], [0.0, 25.0]]
    assert C.tolist() == [[10.0, 99.0], [1.0, 20.0]]
    double = C.double()
    expected_lower(double, X)
    assert double.tolist() == C.tolist()  # a float64 sum is not added to in place


def test_errors_by_hand_and_the_upper_triangle_does_not_count():
    wanted = torch.tensor([[3.0, -7.0, 1.0], [0.0, 4.0, 5.0], [0.0, 0.0, 1.0]]).double()
    got = torch.tensor([[3.3, 50.0, 60.0], [0.4, 4.0, 70.0], [0.0, 0.0, 1.0]])
    error, bias = lower_error(got, wanted)
    assert error == pytest.approx(0.5 / 26**0.5, rel=1e-5)  # (0.3, 0.4) of (3, 4, 1)
    assert bias == pytest.approx(0.1 / 3, rel=1e-5)
    got[0, 1] = math.nan
    got[0, 0] = 2.7
    assert lower_error(got, wanted)[1] == pytest.approx(-0.1 / 3, rel=1e-5)


def test_the_gates_are_those_of_the_documents():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for device, sums, allowed in (
        (cpu, torch.float32, 1e-6),
        (cuda, torch.float32, 1e-5),
        (cuda, torch.float64, 1e-13),
    ):
        assert failure(device, sums, allowed, 0.0) is None
        assert failure(device, sums, 2 * allowed, 0.0) == f"relative error {2 * allowed:.2g} is above {allowed:.0e}"
        assert failure(device, sums, math.nan, 0.0) is not None
    assert failure(cuda, torch.float32, 1e-5, -3e-6) is None
    assert failure(cuda, torch.float32, 1e-6, -4e-6) == "diagonal bias -4e-06 is beyond 3e-06"
    assert failure(cuda, torch.float32, 0.0, math.nan) is not None
    assert failure(cpu, torch.float32, 1e-7, 1.0) is None and failure(cuda, torch.float64, 1e-14, 1.0) is None


def test_a_change_above_the_diagonal_is_seen():
    before = torch.ones(3, 3)
    C = before.clone()
    C[2, 0] = C[1, 1] = 5.0
    assert upper_is_untouched(C, before)
    C[1, 2] = 5.0
    assert not upper_is_untouched(C, before)


@pytest.mark.parametrize(("dtype", "word"), [("float64", "float64"), ("bfloat16", "float32")])
def test_the_peak_of_the_cpu_is_of_a_full_precision(dtype, word):
    probe = peak_probe(getattr(torch, dtype), CPU)
    assert probe.name == f"cpu {word}"
    assert 0.01 < probe.measure() < 1e5


def test_what_a_gpu_multiplies_is_named():
    cuda = torch.device("cuda")
    assert peak_probe(torch.float32, cuda).name == "cuda bfloat16"
    assert peak_probe(torch.float64, cuda).name == "cuda float64"


def test_the_peak_of_a_call_is_what_it_held_at_once():
    # The larger one first: malloc may keep it, and then has room for the second one.
    def run():
        first = torch.ones(96 << 20, dtype=torch.uint8)
        del first
        return torch.ones(64 << 20, dtype=torch.uint8)

    peak = peak_beyond(run, CPU)
    if peak is None:
        pytest.skip("this system does not let a process reset its high-water mark")
    assert 0.95 * (96 << 20) < peak < 1.3 * (96 << 20)


def test_memory_that_an_earlier_call_left_with_malloc_counts_again():
    def run():
        return [torch.ones(4 << 20, dtype=torch.uint8) for _ in range(16)]

    for _ in range(3):
        run()
    peak = peak_beyond(run, CPU)
    if peak is None:
        pytest.skip("this system does not let a process reset its high-water mark")
    assert 0.95 * (64 << 20) < peak < 1.3 * (64 << 20)


def test_where_it_cannot_be_measured_it_is_not(monkeypatch, tmp_path):
    monkeypatch.setattr(measuring, "_CLEAR", tmp_path / "no folder" / "clear_refs")
    assert peak_beyond(lambda: None, CPU) is None


RIGHT = Verdict(error=1e-9)


def case(**changes):
    settings = {
        "suite": "rank_k",
        "name": "a case",
        "device": CPU,
        "dtype": "float32",
        "n": 10,
        "d": 4,
        "flops": lambda: 6e9,
        "probe": Probe("GEMM", lambda: 4.0),
    }
    return Case(**{**settings, **changes})


@pytest.fixture
def seconds(monkeypatch):
    """Calls take the seconds that they return, and are counted."""
    calls: list[str] = []

    def clock(contender, device):
        contender.prepare()
        calls.append(contender.name)
        return contender.run()

    monkeypatch.setattr(measuring, "clock", clock)
    return calls


def contender(name, taken, kind="ours", verdict=RIGHT, **rest):
    return Contender(name, kind, check=lambda: verdict, run=lambda: taken, **rest)


def test_quantiles_by_hand():
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 0.2) == 2.0
    assert quantile([1.0, 2.0], 0.8) == pytest.approx(1.8)
    assert quantile([7.0], 0.8) == 7.0


def test_ratios_rates_and_shares_by_hand(seconds):
    ours, base, library = measure(
        case(),
        [contender("ours", 2.0), contender("base", 8.0, "library"), contender("lib", 3.0, "library")],
        Effort(1.0, 3, 3),
    )
    assert (ours.p20, ours.p50, ours.p80, ours.rounds) == (2.0, 2.0, 2.0, 3)
    assert ours.gflops == 3.0  # 6e9 operations in 2 seconds
    assert (ours.ratio, ours.ratio_library) == (4.0, 1.5)
    assert (base.ratio, library.ratio) == (1.0, pytest.approx(8 / 3))
    assert (ours.peak, ours.peak_before, ours.share) == ("GEMM", 4.0, 0.75)


def test_the_peak_is_measured_before_and_after_and_the_share_is_of_the_larger(seconds):
    rates = iter([2.0, 6.0])
    (row,) = measure(case(probe=Probe("p", lambda: next(rates))), [contender("a", 2.0)], Effort(1, 3, 3))
    assert (row.peak_before, row.peak_after, row.share) == (2.0, 6.0, 3.0 / 6.0)


def test_a_kernel_is_held_against_its_own_peak_and_a_library_against_the_first(seconds):
    first, second = Probe("loop 1", lambda: 10.0), Probe("loop 2", lambda: 5.0)
    rows = measure(
        case(),
        [contender("k1", 1.0, probe=first), contender("k2", 1.0, probe=second), contender("base", 1.0, "library")],
        Effort(1, 3, 3),
    )
    assert [row.peak for row in rows] == ["loop 1", "loop 2", "loop 1"]
    assert [row.share for row in rows] == [0.6, 1.2, 0.6]


def test_the_peak_of_a_kernel_that_refuses_is_not_measured(seconds):
    def refuse():
        raise KernelUnavailable("The kernel 'k1' cannot run: it wants half of it; name another.")

    def never():
        raise AssertionError("measured")

    rows = measure(
        case(),
        [Contender("k1", "ours", refuse, never, probe=Probe("loop 1", never)), contender("base", 1.0)],
        Effort(1, 3, 3),
    )
    assert (rows[0].status, rows[0].reason) == ("cannot", "it wants half of it")
    assert rows[1].peak == "GEMM"


def test_a_wrong_result_is_never_timed(seconds):
    def never():
        raise AssertionError("timed")

    def crash():
        raise RuntimeError("broken\nmore lines.")

    wrong = Verdict(0.5, failure="relative error 0.5 is above 1e-06")
    rows = measure(
        case(),
        [
            Contender("wrong", "ours", check=lambda: wrong, run=never),
            Contender("crash", "ours", check=crash, run=never),
            contender("base", 1.0, "library"),
        ],
        Effort(1, 3, 3),
    )
    assert [row.status for row in rows] == ["failed", "failed", "ok"]
    assert (rows[0].error, rows[0].p50, rows[0].gflops) == (0.5, None, None)
    assert rows[1].reason == "it raised RuntimeError: broken"
    assert rows[1].error is None  # NaN has no place in a file
    assert set(seconds) == {"base"}


def test_all_take_a_turn_in_each_round_in_changing_order(seconds):
    rows = measure(case(), [contender(n, 1.0) for n in ("a", "b", "c")], Effort(1.0, 6, 6))
    assert [row.rounds for row in rows] == [6, 6, 6]
    warm_up, rounds = seconds[:3], [tuple(seconds[i : i + 3]) for i in range(3, 21, 3)]
    assert warm_up == ["a", "b", "c"]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 1


def test_the_seconds_decide_the_rounds_within_bounds(seconds):
    def rounds(effort, taken=2.0):
        return measure(case(), [contender("a", taken)], effort)[0].rounds

    assert rounds(Effort(20.0, 3, 40)) == 10
    assert rounds(Effort(1.0, 3, 40)) == 3
    assert rounds(Effort(1000.0, 3, 40)) == 40


def test_a_slow_one_may_sit_out(seconds):
    slow, fast = measure(case(), [contender("slow", 100.0, rounds=1), contender("fast", 1.0)], Effort(4.0, 2, 9))
    assert (slow.rounds, fast.rounds) == (1, 4)
    assert seconds.count("slow") == 1  # no warm-up besides its check


def test_preparation_comes_before_each_call(seconds):
    prepared = []
    measure(case(), [contender("a", 1.0, prepare=lambda: prepared.append(1))], Effort(1, 3, 3))
    assert len(prepared) == 4  # the warm-up and three rounds


def test_the_clock_counts_the_call_and_not_the_preparation():
    import time

    c = Contender("a", "ours", lambda: RIGHT, lambda: time.sleep(0.02), prepare=lambda: time.sleep(0.5))
    assert 0.02 <= measuring.clock(c, CPU) < 0.4


def test_nan_is_no_small_error(seconds):
    (row,) = measure(case(), [contender("a", 1.0, verdict=Verdict(math.nan, failure="NaN"))], Effort(1, 3, 3))
    assert (row.status, row.error) == ("failed", None)
