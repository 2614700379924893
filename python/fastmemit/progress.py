"""One look for every progress bar: on a terminal only, gone when the step is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

from fastcov.errors import printable


class Bar:
    """A bar to count on: called with how many were done since the last call."""

    def __init__(self, shape: tqdm) -> None:
        self._shape = shape

    def __call__(self, done: int) -> None:
        """Move on."""
        self._shape.update(done)

    def note(self, text: str) -> None:
        """Show some words behind the numbers, from the next time the bar is drawn."""
        self._shape.set_postfix_str(printable(text), refresh=False)


@contextmanager
def bar(what: str, total: int, shown: bool) -> Iterator[Bar]:
    """A progress bar to count on.

    Args:
        what: What is being counted.
        total: How many there are.
        shown: False draws nothing; nor is anything drawn where stderr is not a terminal.

    Yields:
        The bar; call it with how many were done since the last call.
    """
    disable = None if shown else True  # None: tqdm looks for a terminal itself
    what = printable(what)
    with tqdm(total=total, desc=what, leave=False, dynamic_ncols=True, disable=disable) as shape:
        yield Bar(shape)
