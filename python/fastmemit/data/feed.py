"""From a corpus to the batches that a model runs, made while it runs the ones before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch

import fastcov
from fastcov.batching import Ahead, pinned
from fastmemit.data.corpora import Corpus
from fastmemit.data.self_written import SelfWritten

#: Tokens of a batch, padding included: on a CPU, and elsewhere, where a batch feeds one launch.
BATCH_TOKENS = 4096
DEVICE_BATCH_TOKENS = 16384

_READ_AHEAD = 4  # batches
_TOKENISED_TOGETHER = 16


def tokens_per_batch(device: torch.device) -> int:
    """How many tokens a batch has where the model takes its input on this device."""
    return BATCH_TOKENS if device.type == "cpu" else DEVICE_BATCH_TOKENS


@contextmanager
def corpus_batches(
    corpus: Corpus,
    tokenizer: Any,
    device: torch.device,
    *,
    tokens: int,
    context: int,
    seed: int = 0,
    start: int = 0,
    skip: int = 0,
    reading: Callable[[int], None] | None = None,
) -> Iterator[Iterator[Mapping[str, Any]]]:
    """Batches of the first tokens of a corpus, for `fastcov.collect_moments`.

    Text is read, tokenised, padded and pinned by a thread, which is gone when the context is left; nothing else may use
    the tokenizer inside. A corpus that the model writes is read by the caller's own thread, as the batches are asked
    for. The batches are the same either way.

    Args:
        corpus: Where the text comes from.
        tokenizer: The model's.
        device: Where the model takes its input; how large the batches are depends on it.
        tokens: How many tokens there shall be in all, padding aside, those before `start` included.
        context: Cut documents at so many tokens.
        seed: Of the order of documents.
        start: How many of them to pass over: they are read and tokenised, and not in the batches but where later ones
            of their document need them.
        skip: How many at the beginning of each document are no keys, and not counted either.
        reading: Called, in the caller's thread, with the number of tokens of each document read.

    Raises:
        BadCorpus: The corpus cannot be read (raised where the batches are asked for).
    """
    ahead: Ahead[Mapping[str, Any]] = Ahead(_READ_AHEAD)
    threaded = not isinstance(corpus, SelfWritten)
    told = ahead.relayed(reading) if threaded and reading is not None else reading
    ids = _tokenised(tokenizer, corpus.documents(seed), context, told, lambda: ahead.stopped)
    taken: Iterator[Sequence[int]] = (
        fastcov.between(ids, start, tokens, context, skip) if start or skip else fastcov.take(ids, tokens, context)
    )
    batches = pinned(fastcov.bucket(taken, tokens_per_batch(device)), device)
    if threaded:
        with ahead.read(batches) as read:
            yield read
    else:
        yield batches


def _tokenised(
    tokenizer: Any,
    texts: Iterator[str],
    context: int,
    reading: Callable[[int], None] | None,
    stopped: Callable[[], bool],
) -> Iterator[list[int]]:
    """Token ids of each text, special tokens as the tokenizer adds them, cut at the context."""
    while not stopped() and (chunk := list(islice(texts, _TOKENISED_TOGETHER))):
        for ids in tokenizer(chunk, truncation=True, max_length=context)["input_ids"]:
            if reading is not None:
                reading(len(ids))
            yield ids
