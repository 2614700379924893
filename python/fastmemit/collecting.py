"""Collecting the moments that are not kept yet: one pass, which goes on where a killed one was."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastcov
from fastcov.checkpoint import read_checkpoint
from fastcov.throughput import Throughput
from fastmemit import parallel
from fastmemit.data.corpora import Corpus, corpus_batches, tokens_per_batch
from fastmemit.errors import UnknownArchitecture
from fastmemit.locks import alone, lock_of
from fastmemit.models import ModelAdapter

log = logging.getLogger(__name__)

_TEMPORARY = ".*.tmp"
_CHECKPOINTS = ".collecting-*.checkpoint"  # no .safetensors: nobody takes one for a moment


@dataclass(frozen=True)
class Text:
    """Which keys of a corpus are collected, in which order.

    Attributes:
        corpus: Where the text comes from.
        tokenizer: The model's.
        seed: Of the order of documents.
        context: Documents are cut at so many tokens.
        tokens: How many keys there are in all, those before `start` included.
        start: How many are held already.
        skip: How many positions at the beginning of a document are no keys.
    """

    corpus: Corpus
    tokenizer: Any
    seed: int
    context: int
    tokens: int
    start: int
    skip: int


def collected(
    adapter: ModelAdapter,
    text: Text,
    budgets: Mapping[str, int],
    checkpoint: fastcov.Checkpoint,
    *,
    allow_fewer: bool,
    progress: Callable[[int], None] | None,
    reading: Callable[[int], None] | None,
    throughput: Throughput | None,
) -> dict[str, fastcov.SecondMoment]:
    """The moments of some modules' keys.

    Args:
        adapter: The unedited model.
        text: Which keys.
        budgets: Module -> how many of them it still needs.
        checkpoint: Where an interrupted pass is kept; the caller removes it when all is written.
        allow_fewer: Take a corpus that ends early for what it has.
        progress: See `fastmemit.statistics.precompute`.
        reading: See there.
        throughput: See there.

    Returns:
        Module -> moment; nothing where the corpus ends just where the keys do that are held.

    Raises:
        BudgetNotMet: The corpus is too short, and `allow_fewer` is not set.
        EmptyCorpus: It has no token.
        NonFiniteKeys: An activation is NaN or infinite.
        BadCorpus: The corpus cannot be read.
        UnknownArchitecture: Padding changes the model's keys.
    """
    if adapter.right_padding == "none":
        raise UnknownArchitecture(
            f"{type(adapter.model).__name__} gives a text other keys where it stands beside longer "
            "ones in a batch, so its statistics cannot be collected in batches."
        )
    causal = adapter.is_causal and adapter.right_padding == "unmasked"
    if throughput is not None:
        throughput.measure(adapter.model, adapter.device)  # before a thread begins to read

    def once() -> dict[str, fastcov.SecondMoment]:
        more: dict[str, fastcov.SecondMoment] = {}
        with (
            _counted_from(text.start, text.corpus, allow_fewer),
            corpus_batches(
                text.corpus,
                text.tokenizer,
                adapter.device,
                tokens=text.tokens,
                context=text.context,
                seed=text.seed,
                start=text.start,
                skip=text.skip,
                reading=reading,
            ) as batches,
        ):
            more = fastcov.collect_moments(
                adapter.model,
                list(budgets),
                batches,
                budgets,
                allow_fewer=allow_fewer,
                progress=progress,
                throughput=throughput,
                causal=causal,
                checkpoint=checkpoint,
                processes=parallel.current(),
            )
        return more

    try:
        try:
            return once()
        except fastcov.StaleCheckpoint as error:
            log.warning("%s It is not used, and collecting begins anew.", error)
            checkpoint.remove()
            return once()
    except (fastcov.FailedElsewhere, fastcov.ProcessLost):  # this process's part is sound
        raise
    except fastcov.FastcovError:  # of the text or the model: to go on would end the same way
        checkpoint.remove()
        raise


def checkpoint_of(
    home: Path,
    modules: Sequence[str],
    essence: Mapping[str, Any],
    adapter: ModelAdapter,
    text: Text,
    seconds: float | None,
) -> fastcov.Checkpoint:
    """Where a pass is kept in the folder of the statistics that it makes.

    Args:
        home: That folder.
        modules: All that are asked for, also those that are there already: what was killed between two files goes on
            with the rest of them.
        essence: What the statistics depend on, and the versions.
        adapter: The model.
        text: Which keys.
        seconds: Between two writes, see `fastcov.Checkpoint`.
    """
    processes = parallel.current()
    # Of several processes each keeps its own part; it does not matter how far the others were.
    part = {} if processes is None else {"process": f"{processes.rank} of {processes.size}"}
    digest = hashlib.sha256("\n".join([*sorted(modules), *part.values()]).encode()).hexdigest()[:12]
    identity = {
        **essence,
        **part,
        "tokens": text.tokens,
        "start": text.start,
        "batch_tokens": tokens_per_batch(adapter.device),
        "device": str(adapter.device),
    }
    return fastcov.Checkpoint(home / _CHECKPOINTS.replace("*", digest), identity=identity, seconds=seconds)


@contextmanager
def alone_or_first(processes: fastcov.Processes | None, home: Path, what: str) -> Iterator[bool]:
    """Hold the lock of a folder of statistics; of processes that collect together, the first does.

    Args:
        processes: Those, or None for this one alone.
        home: The folder.
        what: What another holder is doing, see `fastmemit.locks.alone`.

    Yields:
        Whether this process holds the lock.

    Raises:
        OSError: The lock's file cannot be made.
    """
    if processes is None or processes.first:
        with alone(lock_of(home), what) as ours:
            yield ours
    else:
        yield False


def sweep_up(home: Path, *, useless_too: bool = False) -> None:
    """Remove what killed processes left in a folder of statistics; nobody else may write there.

    Args:
        home: The folder.
        useless_too: Remove checkpoints as well that are damaged or all of whose modules are there.
    """
    for path in home.glob(_TEMPORARY):
        with suppress(OSError):
            path.unlink()
    for path in home.glob(_CHECKPOINTS) if useless_too else ():
        try:
            modules = read_checkpoint(path)[1]
        except (fastcov.StoreDamaged, OSError):
            modules = {}
        if all((home / f"{name}.safetensors").is_file() for name in modules):
            with suppress(OSError):
                path.unlink()


def tidy(home: Path) -> None:
    """Remove what was left by a process that was killed when all was written but for that.

    It is left where another process works in the folder, or where the folder cannot be written.
    """
    left = (lock_of(home), *home.glob(_TEMPORARY), *home.glob(_CHECKPOINTS))
    if any(path.exists() for path in left):
        with suppress(OSError), alone(lock_of(home), "", wait=False) as ours:
            if ours:
                sweep_up(home, useless_too=True)


@contextmanager
def _counted_from(start: int, corpus: Corpus, allow_fewer: bool) -> Iterator[None]:
    """Say of a corpus that ends how many keys it has in all, not beyond those held already."""
    try:
        yield
    except (fastcov.BudgetNotMet, fastcov.EmptyCorpus) as error:
        if start == 0:
            raise
        if allow_fewer:  # it ends just where the keys do that are held
            return
        found = start + getattr(error, "found", 0)
        raise fastcov.BudgetNotMet(
            f"The corpus {corpus.name} has {found} keys a layer, fewer than were wanted; give more "
            "text, smaller multipliers, or allow_fewer=True.",
            found=found,
            wanted=start + getattr(error, "wanted", 1),
        ) from error
