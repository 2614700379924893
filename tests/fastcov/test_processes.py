"""What processes tell each other, here threads with one store."""

from __future__ import annotations

import threading
import time

import pytest
import torch
import torch.distributed as dist

from fastcov import distributed
from fastcov.distributed import Processes, add_up_lower
from fastcov.errors import FailedElsewhere, FastcovError, ProcessLost

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


def together(*works, timeout=20.0):
    """Run functions of `Processes` side by side; what each returned or raised."""
    store, found = dist.HashStore(), [None] * len(works)

    def run(rank):
        try:
            found[rank] = works[rank](Processes(store, rank, len(works), timeout=timeout))
        except BaseException as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return found


def test_everybody_hears_everybody():
    def talk(processes):
        first = processes.gather("a", processes.rank)
        return first, processes.gather("b", {"twice": 2 * processes.rank})

    expected = ([0, 1, 2], [{"twice": 0}, {"twice": 2}, {"twice": 4}])
    assert together(talk, talk, talk) == [expected] * 3


def test_nobody_goes_on_before_the_last_has_come():
    order = []

    def late(processes):
        time.sleep(0.2)
        order.append("late")
        processes.gather("here")

    def early(processes):
        processes.gather("here")
        order.append("early")

    assert together(early, late) == [None, None]
    assert order == ["late", "early"]


def test_the_first_leaves_last():
    gone = []

    def leave(processes):
        if not processes.first:
            time.sleep(0.1)
        processes.leave()
        gone.append(processes.rank)

    assert together(leave, leave, leave) == [None] * 3
    assert sorted(gone) == [0, 1, 2]


def test_an_error_reaches_those_who_wait_and_those_who_work():
    def breaks(processes):
        with processes.guarded():
            raise ValueError("no such thing")

    def waits(processes):
        with processes.guarded():
            processes.gather("here")

    def works(processes):
        with processes.guarded():
            while True:
                processes.check()
                time.sleep(0.01)

    first, second, third = together(breaks, waits, works)
    assert isinstance(first, ValueError)
    for error in (second, third):
        assert isinstance(error, FailedElsewhere) and error.rank == 0
        assert str(error) == "Process 0 of 3 failed (ValueError: no such thing)"


def test_of_two_that_fail_one_speaks():
    def breaks(processes):
        with processes.guarded(), processes.guarded():
            processes.gather("ready")
            raise ValueError(f"from {processes.rank}")

    kinds = sorted(type(error).__name__ for error in together(breaks, breaks))
    assert kinds == ["FailedElsewhere", "ValueError"]


def test_an_interruption_has_no_message():
    def leaves(processes):
        with processes.guarded():
            raise KeyboardInterrupt

    left, told = together(leaves, lambda processes: processes.gather("here"))
    assert isinstance(left, KeyboardInterrupt)
    assert str(told) == "Process 0 of 2 failed (KeyboardInterrupt)"


def test_a_process_that_is_gone_without_a_word():
    lost, gone = together(lambda p: p.gather("here"), lambda p: None, timeout=0.3)
    assert gone is None
    assert isinstance(lost, ProcessLost) and lost.rank == 1
    assert str(lost) == (
        "Process 1 of 2 has given no sign of life for 0.3 seconds; see what became of it, and run again."
    )


def test_a_process_that_takes_long_and_gives_signs_is_waited_for():
    def slow(processes):
        for _ in range(10):
            time.sleep(0.1)
            processes.check()
        return processes.gather("here", "slow")

    assert together(lambda p: p.gather("here", "quick"), slow, timeout=0.5) == [["quick", "slow"], ["quick", "slow"]]


def test_processes_that_do_not_do_the_same():
    for error in together(lambda p: p.gather("sums"), lambda p: p.gather("files")):
        assert isinstance(error, FastcovError)
        assert "start all of them with the same command" in str(error)


def test_a_store_that_is_gone():
    class Gone:
        def add(self, *_):
            raise dist.DistNetworkError("Connection reset by peer\nand a trace")

        compare_set = add

    mine = Processes(Gone(), 0, 2)  # type: ignore[arg-type]  # a stand-in for a store
    with pytest.raises(ProcessLost, match=r"can no longer reach .*\(Connection reset by peer\)"):
        mine.check()
    with pytest.raises(ValueError, match="mine"), mine.guarded():
        raise ValueError("mine")


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_that_is_none(rank):
    with pytest.raises(ValueError, match=rf"The rank {rank} is not among 2 processes"):
        Processes(dist.HashStore(), rank, 2)


@pytest.mark.parametrize("d", [1, 5, 67, 160])
def test_lower_triangles_are_added_up_in_panels(monkeypatch, d):
    sent = []

    def threefold(panel, group):  # as if there were three processes with equal sums
        assert panel.is_contiguous() and group == "these"
        sent.append(panel.numel())
        panel *= 3

    monkeypatch.setattr(dist, "all_reduce", threefold)
    monkeypatch.setattr(distributed, "_PANEL_ROWS", 4)
    whole = torch.arange(d * d, dtype=torch.float64).reshape(d, d)
    mine = torch.where(torch.ones(d, d).tril() > 0, whole, float("nan"))
    add_up_lower(mine, "these")
    assert torch.equal(mine.tril().nan_to_num(), 3 * whole.tril())
    if d == 160:  # 16 panels of 10 rows: 10 * (10 + 20 + ... + 160)
        assert sum(sent) == 13600 < 0.54 * d * d


def test_a_panel_has_a_row_at_least(monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", lambda panel, group: panel.mul_(2))
    monkeypatch.setattr(distributed, "_PANEL_BYTES", 1)
    mine = torch.ones(3, 3)
    add_up_lower(mine)
    assert mine.tril().tolist() == [[2, 0, 0], [2, 2, 0], [2, 2, 2]]
