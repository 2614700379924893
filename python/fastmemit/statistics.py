"""Second moments of a model's keys: collected once, kept on disk, found by what they are of."""

from __future__ import annotations

import hashlib
import logging
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import fastcov
from fastcov.checkpoint import read_checkpoint
from fastcov.hooks import isolated
from fastcov.throughput import Throughput
from fastmemit import parallel
from fastmemit.data.corpora import Corpus, corpus_batches, tokens_per_batch
from fastmemit.errors import BadConfig, UnknownArchitecture
from fastmemit.files import alone, lock_of, shared_folder
from fastmemit.models import ModelAdapter
from fastmemit.provenance import (
    check_moment,
    common,
    compare,
    essence,
    home_of,
    is_there,
    provenance_of,
    provenances_in,
    shared_of,
    there,
)

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
        BadInput: It has no token.
        NonFinite: An activation is NaN or infinite.
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
                quartic=True,  # any file may be asked for Ledoit-Wolf
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
        what: What another holder is doing, see `fastmemit.files.alone`.

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
    except fastcov.BudgetNotMet as error:
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


@dataclass(frozen=True)
class Statistics:
    """Stored second moments of one model on one corpus.

    Attributes:
        paths: Module name -> file.
        provenance: What all of them share: model, corpus, seed, multiplier, budget, keys, context.
        throughput: How fast they were collected, where that was just now and it was to be measured.
    """

    paths: dict[str, Path]
    provenance: dict[str, Any]
    throughput: Throughput | None = dataclass_field(default=None, compare=False, repr=False)

    def second_moment(self, module: str) -> Tensor:
        """C of one module, (d_k, d_k) in the dtype of its sum, every byte of the file verified.

        Raises:
            StoreMissing: It was not precomputed for this module.
            StoreDamaged: The file is not what was written.
            StoreMismatch: The file is of something else than it was when it was found.
        """
        return self.moment(module).second_moment

    def moment(self, module: str) -> fastcov.SecondMoment:
        """The moment of one module, on the CPU; errors are those of `second_moment`."""
        if module not in self.paths:
            raise fastcov.StoreMissing(
                f"There is no second moment of {module} among the precomputed "
                f"({', '.join(self.paths)}); precompute its layer too."
            )
        path = self.paths[module]
        stored = provenance_of(path)
        compare(path, stored, {**shared_of(self.provenance), "module": module})
        moment, _ = fastcov.load_moment(path, stored)
        check_moment(path, stored, moment)
        return moment

    @property
    def keys(self) -> int:
        """How many keys a module has, the widest if they differ."""
        return int(self.provenance.get("keys", self.provenance["budget"]))

    def multiplier_of(self, d_k: int) -> float:
        """How many keys there are, as a multiple of a width."""
        wanted = fastcov.budget(float(self.provenance["multiplier"]), d_k)
        return min(wanted, self.keys) / d_k

    @property
    def exhausted(self) -> bool:
        """Whether the corpus ended before the budget was met."""
        return self.keys < int(self.provenance["budget"])

    def describe(self) -> str:
        """One line for people: corpus, multiplier, keys."""
        p = self.provenance
        fewer = f" of the {p['budget']} wanted" if self.exhausted else ""
        first = "" if p.get("bos", True) else ", no first positions"
        return f"corpus {p['corpus']['name']}, multiplier {p['multiplier']:g}, {self.keys} keys{fewer}{first}"


@isolated()
def precompute(
    adapter: ModelAdapter,
    tokenizer: Any,
    corpus: Corpus,
    folder: Path,
    identity: dict[str, Any],
    *,
    layers: Sequence[int],
    multiplier: float = 10.0,
    seed: int = 0,
    allow_fewer: bool = False,
    max_length: int | None = None,
    bos: bool = True,
    after: Statistics | None = None,
    progress: Callable[[int], None] | None = None,
    reading: Callable[[int], None] | None = None,
    throughput: Throughput | None = None,
    checkpoint_seconds: float | None = None,
) -> Statistics:
    """Collect the second moments of several layers in one pass, unless they are there already.

    Text is read, tokenised and put into batches by a thread, ahead of the model, except where the model writes the
    text. The result is the same bit for bit.

    A pass that was killed goes on at its last checkpoint, to the same bits. Of two processes that want the same
    statistics one collects and the other waits.

    Inside `fastmemit.parallel.together` the batches are divided between processes.

    Args:
        adapter: The unedited model.
        tokenizer: Its tokenizer.
        corpus: Where the text comes from.
        folder: Where statistics are kept.
        identity: What tells this model from others: ``model`` (its fingerprint), ``tokenizer``.
        layers: The layers whose keys are wanted.
        multiplier: d_m; each layer gets exactly ``round(d_m * d_k)`` keys.
        seed: Of the order of documents.
        allow_fewer: Take a corpus that ends early for what it has.
        max_length: Cut documents at so many tokens; None takes the model's context.
        bos: Whether the first position of a document is a key. In most models it draws attention that has nowhere else
            to go, and its key is unlike all others.
        after: Statistics of the same text, with a smaller multiplier: only the keys beyond theirs are collected, and
            added to them. How the sum was reached is part of what it is, because it decides on the last bits.
        progress: Called with the number of keys since the last call, in the caller's thread.
        reading: Called with the number of tokens of each document as it is read, which is the long part of a corpus
            that the model writes; in the caller's thread.
        throughput: Told how the collecting goes, for `progress` to ask.
        checkpoint_seconds: Between two checkpoints, as in `fastcov.Checkpoint`: 0 for one after every batch, infinity
            for none, None for every five minutes or less often.

    Raises:
        BadInput: The multiplier is not above 0.
        BadConfig: `max_length` is below 1 or above the model's context, or `after` has as large a multiplier.
        BadLayer: A layer does not exist.
        BudgetNotMet: The corpus is too short, and `allow_fewer` is not set.
        BadCorpus: The corpus cannot be read.
        BadInput: It has no token.
        StoreDamaged: A kept file's header is not what was written.
        StoreMismatch: A kept file is of something else than its folder says.
        NonFinite: An activation is NaN or infinite.
        FailedElsewhere: Another process failed.
        OSError: A file cannot be written; those that were written are whole.
    """
    context = _context(adapter, max_length)
    modules = {adapter.projection_name(layer): adapter.d_k(layer) for layer in layers}
    budgets = {name: fastcov.budget(multiplier, d_k) for name, d_k in modules.items()}
    shared: dict[str, Any] = {
        **identity,
        "corpus": {"name": corpus.name, "fingerprint": corpus.fingerprint},
        "seed": seed,
        "multiplier": float(multiplier),
        "context": context,
        "allow_fewer": allow_fewer,
        **({} if bos else {"bos": False}),
        **({} if after is None else {"snapshots": _snapshots(after, multiplier)}),
    }
    home = home_of(folder / identity["model"][:16], shared)
    paths = {name: home / f"{name}.safetensors" for name in modules}
    processes = parallel.current()
    if processes is None and all(is_there(path, shared, name, budgets[name]) for name, path in paths.items()):
        throughput = None  # nothing is collected
        tidy(home)
    else:
        with alone_or_first(processes, home, "collecting the same statistics") as ours:
            shared_folder(home)
            if ours:
                sweep_up(home)
            # Whoever was waited for may have made some of them.
            missing = [name for name, path in paths.items() if not is_there(path, shared, name, budgets[name])]
            what = {**essence(shared), "modules": list(paths)}
            missing = parallel.agreed(processes, what, missing)
            held = {} if after is None else {name: after.moment(name) for name in missing}
            text = Text(
                corpus,
                tokenizer,
                seed,
                context,
                # Of all modules: the batches do not depend on which are there already.
                tokens=max(budgets.values()),
                start=max((moment.count for moment in held.values()), default=0),
                skip=int(not bos),
            )
            made = {**versions(), **parallel.recorded(processes)}
            saved = {**essence(shared), "versions": made}
            checkpoint = checkpoint_of(home, list(modules), saved, adapter, text, checkpoint_seconds)
            if missing and (after is None or not after.exhausted):
                log.info("collecting the second moments of %s", ", ".join(missing))
                more = collected(
                    adapter,
                    text,
                    {n: budgets[n] - (held[n].count if n in held else 0) for n in missing},
                    checkpoint,
                    allow_fewer=allow_fewer,
                    progress=progress,
                    reading=reading,
                    throughput=throughput,
                )
                held.update({n: held[n].merge(m) if n in held else m for n, m in more.items()})
                if throughput is not None:
                    log.info("%s", throughput)
            for name, moment in held.items():
                own = {**shared, "module": name, "budget": budgets[name], "keys": moment.count}
                parallel.save_once(processes, paths[name], moment, {**own, "versions": made})
            checkpoint.remove()
            if ours:
                sweep_up(home, useless_too=True)
            throughput = throughput if missing else None
    stored = [provenance_of(path) for path in paths.values()]
    for (name, path), about in zip(paths.items(), stored, strict=True):
        compare(path, about, {**shared, "module": name, "budget": budgets[name]})
    return Statistics(paths, common(stored), throughput)


def find(
    folder: Path,
    model: str,
    modules: Sequence[str] | None,
    multiplier: float | None = None,
    tokenizer: str | None = None,
) -> Statistics | None:
    """The newest stored statistics of a model that have all these modules.

    Args:
        folder: Where statistics are kept.
        model: The model's fingerprint.
        modules: Module names that are needed; None takes whatever is stored together.
        multiplier: Only those of this multiplier, if given.
        tokenizer: Only those whose text this tokenizer cut (its fingerprint), if given.

    Raises:
        StoreDamaged: A file's header is not what was written, or lacks a field.
        StoreMismatch: A file among those of this model is of something else than its place says.
    """
    wanted = {"multiplier": multiplier, "tokenizer": tokenizer}
    homes = sorted(
        (home for home in (folder / model[:16]).glob("*") if home.is_dir()),
        key=lambda home: home.stat().st_mtime_ns,
        reverse=True,
    )
    for home in homes:
        names = there(home) if modules is None else modules
        paths = {name: home / f"{name}.safetensors" for name in names}
        if not paths or not all(path.is_file() for path in paths.values()):
            continue
        stored = provenances_in(home, names, model)
        if all(v is None or stored[0].get(k) == v for k, v in wanted.items()):
            return Statistics(paths, common(stored))
    return None


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    import fastmemit

    return {
        "fastmemit": fastmemit.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _snapshots(after: Statistics, multiplier: float) -> list[float]:
    """The smaller multipliers at which a sum was stored on the way to this one."""
    smaller = float(after.provenance["multiplier"])
    if smaller >= multiplier:
        raise BadConfig(
            f"Statistics of multiplier {smaller:g} cannot be continued to {multiplier:g}; give a larger multiplier."
        )
    return [*after.provenance.get("snapshots", []), smaller]


def _context(adapter: ModelAdapter, max_length: int | None) -> int:
    if max_length is None:
        return adapter.max_context
    if not 1 <= max_length <= adapter.max_context:
        raise BadConfig(
            f"max_length must be from 1 to the model's context of {adapter.max_context} tokens but is {max_length}."
        )
    return max_length
