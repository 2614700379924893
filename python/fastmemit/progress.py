"""One look for every progress bar: on a terminal only, gone when the step is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm


@contextmanager
def bar(what: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar to count on.

    Args:
        what: What is being counted.
        total: How many there are.
        shown: False draws nothing; nor is anything drawn where stderr is not a terminal.

    Yields:
        A function that takes how many were done since its last call.
    """
    disable = None if shown else True  # None: tqdm looks for a terminal itself
    with tqdm(total=total, desc=what, leave=False, dynamic_ncols=True, disable=disable) as shape:

        def advance(done: int) -> None:
            shape.update(done)

        yield advance
