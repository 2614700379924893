"""From documents to padded batches: exactly as many tokens as asked for, and little padding.

A document is the list of its token ids. `take`, `between` and `bucket` are generators over documents, so that a corpus
of any size passes through a bounded window; `pinned` makes their batches ready to be sent to a GPU while it works, and
`Prefetcher` makes them in a thread.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from queue import SimpleQueue
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from fastcov.errors import BadInput
from fastcov.files import raw_bytes

Document = Sequence[int]


class Span(list[int]):
    """Token ids of which those before position `first_key` are read by the model but are no keys.

    `bucket` puts such documents into batches with a ``key_mask``, which `fastcov.collect_moments` reads.
    """

    def __init__(self, ids: Iterable[int], first_key: int = 0) -> None:
        super().__init__(ids)
        self.first_key = first_key


def between(
    documents: Iterable[Document], start: int, stop: int | None, max_length: int, skip: int = 0
) -> Iterator[Span]:
    """The documents that hold the keys from number `start` up to and without number `stop`, each with at least one.

    Keys are counted over all documents, in their order, each truncated to `max_length`. Documents before `start` are
    read and left out; none is asked for after `stop` is reached.

    Args:
        documents: Token ids, one sequence a document.
        start: How many keys to leave out, 0 or more.
        stop: The number of the first key that is not wanted any more; None takes all.
        max_length: The longest document that the model takes, in tokens.
        skip: How many tokens at the beginning of every document are never keys. 1 leaves out the position that many
            models use to park attention, with or without a token for it.

    Raises:
        BadInput: start is below 0, or stop is not above start.
        ValueError: max_length is below 1, or skip is below 0 or leaves no key of max_length.
        TypeError: A document is text and not token ids (raised on reading it).
    """
    if start < 0 or (stop is not None and stop <= start):
        raise BadInput(f"The keys from {start} to {stop} are none; pass 0 or more and a larger number.")
    if max_length < 1 or not 0 <= skip < max_length:
        raise ValueError(
            f"max_length must be at least 1 token and above skip but they are {max_length} and "
            f"{skip}; pass the model's context length."
        )

    def generate() -> Iterator[Span]:
        position = 0
        for document in documents:
            if isinstance(document, str | bytes):
                raise TypeError(
                    f"A document must be a list of token ids but is the text {document[:40]!r}; tokenise it first."
                )
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

    return generate()  # the arguments were checked before the first document is asked for


def take(documents: Iterable[Document], budget: int | None, max_length: int) -> Iterator[Span]:
    """The first documents, with exactly as many tokens as the budget says; None takes all.

    Each document is truncated to `max_length`, the last one is cut so that the count is exact, and empty ones are
    skipped. No document is asked for after the budget is met. A corpus that ends before gives what it has.

    Raises:
        BadInput: The budget is not a whole number above 0.
        ValueError: max_length is below 1.
        TypeError: A document is text and not token ids (raised on reading it).
    """
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int)):
        raise BadInput(f"The budget must be a whole number of tokens but is {budget!r}; round it.")
    if budget is not None and budget <= 0:
        raise BadInput(f"The budget must be above 0 but is {budget}; see fastcov.budget.")
    return between(documents, 0, budget, max_length)


def bucket(
    documents: Iterable[Document], tokens_per_batch: int, max_padding: float = 0.05, window: int = 1024
) -> Iterator[dict[str, Tensor]]:
    """Batches of documents of similar length, padded on the right; the same documents always give the same batches.

    Each has ``input_ids``, ``attention_mask`` and ``position_ids``, int64 of shape (documents, length of the longest),
    and where documents are a `Span` with tokens that are no keys ``key_mask``. Padded positions have id 0 and mask 0.
    Documents are read a window at a time, sorted by length and cut into batches, longest first.

    Args:
        documents: Token ids, one sequence a document; empty ones are skipped.
        tokens_per_batch: The most tokens in a batch, padding included; a longer document is a batch of its own.
        max_padding: The largest share of padding in a window's batches together, from 0 to below 1.
        window: How many documents are sorted together, and held in memory.

    Raises:
        ValueError: tokens_per_batch or window below 1, or max_padding outside of [0, 1).
    """
    if tokens_per_batch < 1 or window < 1:
        raise ValueError(
            "tokens_per_batch and window must be at least 1 "
            f"but are {tokens_per_batch} and {window}; pass a few thousand of each."
        )
    if not 0 <= max_padding < 1:
        raise ValueError(f"max_padding is a share from 0 to below 1 but is {max_padding!r}; 0.05 is usual.")

    def generate() -> Iterator[dict[str, Tensor]]:
        source = iter(documents)
        while held := list(islice(source, window)):
            # Longest first: a batch that is too large for the memory fails at once. The sort is stable.
            held = sorted((document for document in held if len(document)), key=len, reverse=True)
            lengths = [len(document) for document in held]
            for start, stop in _cuts(lengths, tokens_per_batch, max_padding):
                yield _pad(held[start:stop])

    return generate()


def _cuts(lengths: Sequence[int], tokens_per_batch: int, max_padding: float) -> list[tuple[int, int]]:
    """Where to cut falling lengths: as few batches as the padding of all together allows."""
    cuts: list[tuple[int, int]] = []
    # Padding that a single batch may have, tried in turn until the window as a whole has little enough.
    # Wide limits make few large batches; the last resort is the limit that the window itself has.
    limits = (1.0, 0.5, 0.35, 0.25, 0.2, 0.15, 0.12, 0.1, 0.08, 0.065)
    for limit in (*(limit for limit in limits if limit > max_padding), max_padding):
        cuts = _greedy(lengths, tokens_per_batch, limit)
        padded = sum(lengths[start] * (stop - start) for start, stop in cuts)
        if padded - sum(lengths) <= max_padding * padded:
            break
    return cuts


def _greedy(lengths: Sequence[int], tokens_per_batch: int, limit: float) -> list[tuple[int, int]]:
    """Cut falling lengths so that each batch keeps to its size and to a share of padding."""
    cuts = []
    start, tokens = 0, 0
    for i, length in enumerate(lengths):
        padded = lengths[start] * (i + 1 - start)  # of the batch with this document in it
        full = padded > tokens_per_batch or padded - (tokens + length) > limit * padded
        if i > start and full:
            cuts.append((start, i))
            start, tokens = i, 0
        tokens += length
    if lengths:
        cuts.append((start, len(lengths)))
    return cuts


def _pad(rows: Sequence[Document]) -> dict[str, Tensor]:
    n, length = len(rows), len(rows[0])
    input_ids = torch.zeros(n, length, dtype=torch.int64)
    attention_mask = torch.zeros(n, length, dtype=torch.int64)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = torch.as_tensor(row, dtype=torch.int64)
        attention_mask[i, : len(row)] = 1
    position_ids = torch.arange(length).expand(n, length).contiguous()
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
    firsts = [row.first_key if isinstance(row, Span) else 0 for row in rows]
    if any(firsts):
        keys = position_ids >= torch.tensor(firsts)[:, None]
        batch["key_mask"] = attention_mask * keys
    return batch


def pinned(batches: Iterable[Mapping[str, Any]], device: torch.device) -> Iterator[Mapping[str, Any]]:
    """Batches in page-locked memory where they will go to a CUDA device, else as they are.

    From there `fastcov.collect_moments` sends them without waiting. Pinning is a copy of its own, so do it where
    batches are read ahead.
    """
    if device.type != "cuda":
        yield from batches
        return
    for batch in batches:
        yield {
            name: value.pin_memory() if isinstance(value, Tensor) and value.device.type == "cpu" else value
            for name, value in batch.items()
        }


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device: on its way there, if it comes from the CPU and goes to a CUDA device.

    What is launched on the device afterwards sees the whole of it.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


def chained(before: bytes, batch: Mapping[str, Any]) -> bytes:
    """A digest, 32 bytes, of all tensors of a batch and of the batches before it, of which `before` is the digest.

    Batches are made on the CPU, so nothing is waited for; those of other code may be elsewhere.
    """
    digest = hashlib.blake2b(before, digest_size=32)
    for name in sorted(batch):
        value = batch[name]
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(raw_bytes(value))
    return digest.digest()


Item = TypeVar("Item")
P = ParamSpec("P")


class Prefetcher(Generic[Item]):
    """Reads a source in a thread of its own, at most `depth` items ahead besides the one that it is working on.

    Items come in the order of the source. Only the thread touches the source, so it may be a generator; what it raises
    is raised where the item would have come. Leaving the context stops the thread and waits until it is gone. Do not
    read what runs the same model or tokenizer as the consumer does meanwhile.

    Example:
        >>> with Prefetcher(4).read(batches) as items:
        ...     moments = collect_moments(model, modules, items, budget)

    Raises:
        ValueError: A depth below 1.
    """

    def __init__(self, depth: int) -> None:
        if depth < 1:
            raise ValueError(
                f"At least 1 item must be read ahead but depth is {depth}; "
                "to read none ahead, iterate over the source itself."
            )
        self._room = threading.Semaphore(depth)
        self._made: SimpleQueue[tuple[str, Any]] = SimpleQueue()  # items and calls in their order, and the end
        self._begun = False
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Whether the consumer has left; a source that works long on one item may look at it."""
        return self._stopped

    def relayed(self, function: Callable[P, object]) -> Callable[P, None]:
        """A function for the source to call, run by the consumer as it asks for items.

        So a progress bar is moved by the thread that draws it, and what the function raises reaches the consumer. Calls
        and items come in the order in which they were made; a consumer that waits for an item runs a call at once.
        """

        def later(*args: P.args, **kwargs: P.kwargs) -> None:
            self._made.put(("call", partial(function, *args, **kwargs)))

        return later

    @contextmanager
    def read(self, source: Iterable[Item]) -> Iterator[Iterator[Item]]:
        """Start to read, and stop on leaving; yields an iterator over the items, and asks for the first one at once.

        Raises:
            RuntimeError: This object has read a source already.
        """
        if self._begun:
            raise RuntimeError("A Prefetcher reads one source only; make another for the next.")
        self._begun = True
        thread = threading.Thread(target=self._fill, args=(source,), name="fastcov-prefetch", daemon=True)
        thread.start()
        try:
            yield self._items()
        finally:
            self._stopped = True
            self._room.release()  # for a thread that waits to hand over an item
            thread.join()
            self._made = SimpleQueue()  # what is left may hold the source's frames
            self._made.put(("end", None))

    def _items(self) -> Iterator[Item]:
        while True:
            kind, found = self._made.get()
            if kind == "call":
                found()
            elif kind == "item":
                self._room.release()
                yield found
            elif found is not None:
                raise found
            else:
                return

    def _fill(self, source: Iterable[Item]) -> None:
        error: BaseException | None = None
        try:
            items = iter(source)
            for item in items:
                self._room.acquire()
                if self._stopped:
                    break
                self._made.put(("item", item))
            # A generator ends where it was read, its `finally` included.
            getattr(items, "close", lambda: None)()
        except BaseException as raised:
            error = raised
        self._made.put(("end", error))
