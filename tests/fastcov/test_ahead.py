from __future__ import annotations

import threading

import pytest

from fastcov.batching import Prefetcher


def reading_threads():
    return [thread for thread in threading.enumerate() if thread.name == "fastcov-prefetch"]


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    assert reading_threads() == []
    yield
    assert reading_threads() == []


@pytest.mark.parametrize("depth", [1, 3, 100])
def test_all_items_come_in_order(depth):
    with Prefetcher(depth).read(iter(range(50))) as items:
        assert list(items) == list(range(50))
        assert list(items) == []
    with Prefetcher(depth).read([]) as items:
        assert list(items) == []
    with Prefetcher(depth).read([None, None]) as items:  # None is an item like any other
        assert list(items) == [None, None]


def test_no_more_than_the_depth_waits_besides_the_one_in_work():
    made, allowed = [], threading.Semaphore(0)

    def source():
        for i in range(10):
            made.append(i)
            allowed.release()
            yield i

    with Prefetcher(2).read(source()) as items:
        for _ in range(3):  # two wait, the third is held by the thread
            assert allowed.acquire(timeout=10)
        assert not allowed.acquire(timeout=0.05)
        assert made == [0, 1, 2]
        assert next(items) == 0
        assert allowed.acquire(timeout=10) and made == [0, 1, 2, 3]


def test_only_the_thread_touches_the_source_and_it_closes_it():
    threads, closed = set(), []

    def source():
        try:
            while True:
                threads.add(threading.get_ident())
                yield 0
        finally:
            closed.append(threading.get_ident())

    with Prefetcher(1).read(source()) as items:
        assert [next(items) for _ in range(5)] == [0] * 5
    assert len(threads) == 1 and threading.get_ident() not in threads
    assert closed == [*threads]  # closed before the context was left, where it was read


def test_an_error_of_the_source_comes_where_its_item_would_have():
    class Broken(Exception):
        pass

    def source():
        yield 1
        yield 2
        raise Broken("no third")

    got = []
    with pytest.raises(Broken, match="no third"), Prefetcher(8).read(source()) as items:
        got.extend(items)
    assert got == [1, 2]
    with Prefetcher(8).read(source()) as items:
        assert (next(items), next(items)) == (1, 2)
        with pytest.raises(Broken):
            next(items)
    with pytest.raises(TypeError, match="iterable"), Prefetcher(1).read(5) as items:
        next(items)


def test_a_source_that_is_broken_behind_what_is_read_does_no_harm():
    def source():
        yield 1
        raise RuntimeError("never asked for")

    with Prefetcher(5).read(source()) as items:
        assert next(items) == 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_of_the_consumer_stops_the_thread(error):
    def source():
        while True:
            yield 0

    with pytest.raises(error), Prefetcher(2).read(source()) as items:
        next(items)
        raise error


def test_a_source_sees_that_the_consumer_has_left():
    ahead, started = Prefetcher(1), threading.Event()

    def source():
        started.set()
        while not ahead.stopped:  # an item that takes for ever
            pass
        yield 1

    with ahead.read(source()):
        assert started.wait(10) and not ahead.stopped
    assert ahead.stopped


def test_relayed_calls_are_made_by_the_consumer_before_the_item():
    ahead, calls = Prefetcher(3), []

    def tell(number, *, twice=0):
        calls.append((threading.get_ident(), number, twice))

    told = ahead.relayed(tell)

    def source():
        for i in range(5):
            told(i, twice=2 * i)
            yield i

    with ahead.read(source()) as items:
        for i in items:
            assert [call[1:] for call in calls[: i + 1]] == [(j, 2 * j) for j in range(i + 1)]
    assert len(calls) == 5 and {call[0] for call in calls} == {threading.get_ident()}


def test_a_consumer_that_waits_makes_the_calls_at_once():
    ahead, called = Prefetcher(1), threading.Event()
    told = ahead.relayed(called.set)

    def source():
        told()
        assert called.wait(10)  # the consumer has no item yet and calls all the same
        yield 1

    with ahead.read(source()) as items:
        assert list(items) == [1]


def test_what_a_relayed_function_raises_reaches_the_consumer():
    ahead = Prefetcher(1)

    def bad():
        raise ZeroDivisionError

    told = ahead.relayed(bad)

    def source():
        told()
        yield 1

    with pytest.raises(ZeroDivisionError), ahead.read(source()) as items:
        next(items)


def test_bad_use_is_named():
    with pytest.raises(ValueError, match="depth is 0"):
        Prefetcher(0)
    ahead = Prefetcher(1)
    with ahead.read([1]):
        pass
    with pytest.raises(RuntimeError, match="one source only"), ahead.read([1]):
        pass
