"""Which tokens of a stream of documents are keys: from one budget to the next, the first or not.

Moments add. A larger budget is a smaller one and the keys between the two, so one pass over a corpus serves every
budget on the way. The keys between two budgets may begin inside a document, whose earlier tokens the model must see all
the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from fastcov.errors import BadBudget


class Span(list[int]):
    """Token ids of which the first few are read by the model but are no keys.

    `fastcov.bucket` puts such documents into batches with a ``key_mask`` beside the mask of the padding, and
    `fastcov.collect` takes the keys that it names.

    Attributes:
        first_key: The position of the first key.
    """

    def __init__(self, ids: Iterable[int], first_key: int = 0) -> None:
        super().__init__(ids)
        self.first_key = first_key


def between(
    documents: Iterable[Sequence[int]], start: int, stop: int | None, max_length: int, skip: int = 0
) -> Iterator[Span]:
    """The documents that hold the keys from number `start` up to and without number `stop`.

    Keys are counted over all documents, in their order, each truncated to `max_length`. Documents that lie before
    `start` are read and left out; none is asked for after `stop` is reached.

    Args:
        documents: Token ids, one sequence a document.
        start: How many keys to pass over, 0 or more.
        stop: The number of the first key that is not wanted any more; None takes all.
        max_length: The longest document that the model takes, in tokens.
        skip: How many tokens at the beginning of every document are never keys. 1 leaves out the position that many
            models use to park attention, with or without a token for it.

    Returns:
        An iterator of documents with ``(stop or all) - start`` keys in total, each with at least one.

    Raises:
        BadBudget: start is below 0, or stop is not above start.
        ValueError: max_length is below 1, or skip is below 0 or leaves no key of max_length.
    """
    if start < 0 or (stop is not None and stop <= start):
        raise BadBudget(f"The keys from {start} to {stop} are none; pass 0 or more and a larger number.")
    if max_length < 1 or not 0 <= skip < max_length:
        raise ValueError(
            f"max_length must be at least 1 token and above skip but they are {max_length} and "
            f"{skip}; pass the model's context length."
        )
    return _between(documents, start, stop, max_length, skip)


def _between(
    documents: Iterable[Sequence[int]], start: int, stop: int | None, max_length: int, skip: int
) -> Iterator[Span]:
    position = 0
    for document in documents:
        keys = min(len(document), max_length) - skip
        if keys <= 0:
            continue
        first = max(start - position, 0)
        last = keys if stop is None else min(keys, stop - position)
        position += keys
        if first < last:
            yield Span(document[: skip + last], skip + first)
        if stop is not None and position >= stop:
            return
