"""Reading ahead: a thread fetches the next items while the present one is worked on.

Tokenising text and padding batches keep the model waiting; fast tokenizers release the interpreter lock, so beside a
forward pass they cost next to nothing.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, ParamSpec, TypeVar

Item = TypeVar("Item")
P = ParamSpec("P")


class Ahead(Generic[Item]):
    """Reads a source in a thread of its own, a bounded number of items ahead.

    Items come in the order of the source. Only the thread touches the source, so it may be a generator; what it raises
    is raised where the item would have come. Leaving the context stops the thread and waits until it is gone, whether
    the source was read to its end or not.

    Do not read what runs the same model or tokenizer as the consumer does meanwhile.

    Example:
        >>> with Ahead(4).read(batches) as items:
        ...     moments = collect(model, modules, items, budget)

    Args:
        depth: How many items may wait, besides the one that the thread is working on.

    Raises:
        ValueError: A depth below 1.
    """

    def __init__(self, depth: int) -> None:
        if depth < 1:
            raise ValueError(
                f"At least 1 item must be read ahead but depth is {depth}; "
                "to read none ahead, iterate over the source itself."
            )
        self._depth = depth
        self._changed = threading.Condition()
        self._waiting: deque[Item] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._error: BaseException | None = None
        self._begun = False
        self._ended = False
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Whether the consumer has left; a source that works long on one item may look at it."""
        return self._stopped

    def relayed(self, function: Callable[P, object]) -> Callable[P, None]:
        """A function for the source to call, run by the consumer before its next item.

        So a progress bar is moved by the thread that draws it, and what the function raises reaches the consumer. A
        consumer that waits for an item runs it at once.
        """

        def later(*args: P.args, **kwargs: P.kwargs) -> None:
            with self._changed:
                self._calls.append(lambda: (function(*args, **kwargs), None)[1])
                self._changed.notify_all()

        return later

    @contextmanager
    def read(self, source: Iterable[Item]) -> Iterator[Iterator[Item]]:
        """Start to read, and stop on leaving.

        Args:
            source: What to read; it is asked for its first item at once.

        Yields:
            An iterator over its items.

        Raises:
            RuntimeError: This object has read a source already.
        """
        if self._begun:
            raise RuntimeError("An Ahead reads one source only; make another for the next.")
        self._begun = True
        thread = threading.Thread(target=self._fill, args=(source,), name="fastcov-ahead", daemon=True)
        thread.start()
        try:
            yield self._items()
        finally:
            with self._changed:
                self._stopped = True
                self._changed.notify_all()
            thread.join()
            self._waiting.clear()
            self._calls.clear()
            self._error = None  # its traceback holds the frames of the source

    def _items(self) -> Iterator[Item]:
        while True:
            with self._changed:
                while not (self._calls or self._waiting or self._ended or self._stopped):
                    self._changed.wait()
                calls = list(self._calls)
                self._calls.clear()
                ready = bool(self._waiting) and not calls
                item = self._waiting.popleft() if ready else None
                error = self._error
                over = not (calls or ready)
                self._changed.notify_all()
            for call in calls:
                call()
            if ready:
                yield item  # type: ignore[misc]
            elif over and error is not None and not self._stopped:
                raise error
            elif over:
                return

    def _fill(self, source: Iterable[Item]) -> None:
        error: BaseException | None = None
        try:
            items = iter(source)
            for item in items:
                with self._changed:
                    while len(self._waiting) >= self._depth and not self._stopped:
                        self._changed.wait()
                    if self._stopped:
                        break
                    self._waiting.append(item)
                    self._changed.notify_all()
            # A generator ends where it was read, its `finally` included.
            getattr(items, "close", lambda: None)()
        except BaseException as raised:
            error = raised
        with self._changed:
            self._error, self._ended = error, True
            self._changed.notify_all()
