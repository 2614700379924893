"""One pass over a corpus: a second moment for each named module, each from exactly its budget."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastcov.accumulate import Accumulator
from fastcov.batching import chained, sent
from fastcov.checkpoint import Checkpoint
from fastcov.distributed import Processes
from fastcov.errors import BadInput, BudgetNotMet, FastcovError, ProcessLost
from fastcov.hooks import KeyHooks, evaluation_mode, isolated
from fastcov.moments import SecondMoment
from fastcov.throughput import Throughput

logger = logging.getLogger(__name__)


class Division:
    """The batches of one collect, divided among processes; `progress` is told the keys of those that others run."""

    def __init__(self, processes: Processes, sums: Accumulator, progress: Callable[[int], None] | None = None) -> None:
        self._processes, self._sums, self._progress = processes, sums, progress
        self._text = b""  # a digest of all batches: whether every process reads the same

    def read(self, batches: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """All batches as they are, remembered, with a look at the other processes before each.

        Raises:
            FailedElsewhere: Another process has failed.
        """
        for batch in batches:
            self._processes.check()
            self._text = chained(self._text, batch)
            yield batch

    def own(self, batches: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """Of batches that were `read`, those that this process runs; the rest are counted."""
        for batch in batches:
            if self._processes.runs(self._sums.batches):
                yield batch
            else:
                self._sums.start(_key_mask(batch))
                self._sums.skip(_tokens(batch))
                if self._progress is not None:
                    self._progress(max(self._sums.took().values()))
            if self._sums.done():
                return

    def total(self, dtype: torch.dtype, device: torch.device, quartic: bool) -> dict[str, SecondMoment]:
        """The moments of all processes together, the same in each of them.

        Of a module of which this process ran no batch, the sum is made with this dtype, device and `quartic`.

        Raises:
            FailedElsewhere: Another process has failed.
            FastcovError: The processes have not read the same text.
            ProcessLost: A process has gone away.
        """
        held, processes = self._sums.moments, self._processes
        found = {name: self._sums.found(name) for name in self._sums.wanted}
        own = self._text.hex()
        said = processes.gather("sums", [own, found, {name: moment.d for name, moment in held.items()}])
        for rank, (text, keys, _) in enumerate(said):
            if (text, keys) != (own, found):
                raise FastcovError(
                    f"Process {rank} has read other text than process {processes.rank} ({sum(keys.values())} and "
                    f"{sum(found.values())} keys); give all of them the same corpus, tokenizer and seed."
                )
        widths = {name: d for _, _, theirs in said for name, d in theirs.items()}
        moments = {}
        for name in self._sums.wanted:
            moment = held.get(name) or SecondMoment(widths[name], dtype=dtype, device=device, quartic=quartic)
            try:
                moments[name] = moment.all_reduce()
            except RuntimeError as error:
                raise ProcessLost(
                    f"The sums of {name!r} could not be added up over {processes.size} processes "
                    f"({str(error).splitlines()[0]:.120}); see which of them has ended, and run again."
                ) from error
            if moment.count != found[name]:
                raise FastcovError(
                    f"The {processes.size} processes have {moment.count} keys of {name!r} "
                    f"together but {found[name]} were counted; please report this."
                )
        return moments


def _key_mask(batch: Mapping[str, Any]) -> Tensor | None:
    """Which tokens of a batch are keys; None says that all are."""
    mask: Tensor | None = batch.get("key_mask", batch.get("attention_mask"))
    return mask


def _tokens(batch: Mapping[str, Any]) -> int:
    """How many positions a batch has, padding included."""
    ids = batch.get("input_ids", batch.get("attention_mask"))
    if not isinstance(ids, Tensor):
        raise FastcovError(
            "A batch has neither input_ids nor an attention_mask, so its keys cannot be counted "
            "without running it; add one of them, or collect in one process."
        )
    return ids.numel()


def collect_moments(
    model: nn.Module,
    modules: Sequence[str],
    batches: Iterable[Mapping[str, Any]],
    budget: int | Mapping[str, int] | None,
    *,
    allow_fewer: bool = False,
    dtype: torch.dtype = torch.float32,
    quartic: bool = False,
    progress: Callable[[int], None] | None = None,
    throughput: Throughput | None = None,
    causal: bool = False,
    checkpoint: Checkpoint | None = None,
    processes: Processes | None = None,
) -> dict[str, SecondMoment]:
    """Collect the second moments of several modules' inputs in one pass.

    Every token that the attention mask keeps is a key, the first of a document included. The moment of each module is
    ``sum of k k^T`` over its first `budget` keys in the order of the batches, row by row: C_0 of equation (2) of arXiv
    2506.04226 once divided by the count. Collect on the unedited model. Each forward pass ends before the last of the
    modules computes anything, without a key-value cache, in evaluation mode and whatever the caller has set in torch.
    No batch is read after all budgets are met, and no hook stays behind.

    Args:
        model: Called as ``model(**batch)``.
        modules: Paths of the projections, as in ``model.named_modules()``.
        batches: Keyword arguments of the model, with ``attention_mask`` (B, L) where tokens are padded (see
            `fastcov.bucket`). Tensors are moved to the device of the input embeddings. ``key_mask`` (B, L), which the
            model is not given, says which tokens are keys where these are fewer than the attention mask keeps.
        budget: How many keys, for all modules or one number for each; None takes all there are.
        allow_fewer: Accept a corpus that ends before the budget, with a warning.
        dtype: The dtype of the sums, float32 or float64.
        quartic: Whether to sum ``||k||^4`` too, for `fastcov.ledoit_wolf`.
        progress: Called after each batch with the number of keys that it gave to the module that took most.
        throughput: Told of each batch, so that `progress` may ask it how fast this goes.
        causal: Every token attends to itself and earlier ones alone. A mask that only pads on the right is then not
            given to the model, which may take a faster attention without one.
        checkpoint: Where sums are stored from time to time, and taken from by a run that does the same again after it
            was killed, to the same bits. Remove it when the moments are safe.
        processes: Those among which the batches are divided. Each calls this with the same model, budgets and batches,
            and runs its share of them; progress counts everybody's.

    Returns:
        A moment for each module, in the order given, on the device of that module's input; with `processes`, the sum
        over all of them, in each, equal up to the order of additions.

    Raises:
        BadInput: A budget that is not a whole number above 0, or none for one of the modules; a path that is not in the
            model; a module that was never called, or whose input is not as wide as the module or changes its width.
        BudgetNotMet: There was no key at all, or there were fewer than wanted and `allow_fewer` is off.
        NonFinite: Keys hold NaN or infinity, or their squares overflow the sum.
        StaleCheckpoint: The batches are not those that the checkpoint was made of.
        FailedElsewhere: Another process failed.
        ProcessLost: Another process does not answer.
    """
    sums = Accumulator(model, _budgets(modules, budget), dtype, quartic)
    division = None if processes is None else Division(processes, sums, progress)
    with (
        nullcontext() if processes is None else processes.guarded(),
        KeyHooks(model, modules, sums.take) as hooks,
        evaluation_mode(model),
        _without_cache(model) as extra,
    ):
        device = _input_device(model)
        drop = {"key_mask"} | _unaccepted(model)
        if throughput is not None:
            throughput.start(model, device)
        # What makes the batches, and what is told of progress, is the caller's, and runs with the
        # caller's settings of torch.
        if division is not None:
            batches = division.read(batches)
        if checkpoint is not None:
            batches = checkpoint.resume(sums, batches)
            if progress is not None and sums.most:
                progress(sums.most)
        if division is not None:
            batches = division.own(batches)
        for batch in () if sums.done() else batches:
            with isolated():
                moved = {
                    name: sent(value, device) if isinstance(value, Tensor) else value
                    for name, value in batch.items()
                    if name not in drop
                }
                sums.start(_key_mask(batch))
                if causal and _only_pads_right(batch.get("attention_mask")):
                    del moved["attention_mask"]
                with nullcontext() if throughput is None else throughput.batch(batch, sums):
                    hooks.run({**moved, **extra})
            if checkpoint is not None and not sums.done():
                checkpoint.write(sums)
            if progress is not None:
                progress(max(sums.took().values()))
            if sums.done():
                break
        sums.finish()
        if throughput is not None:
            throughput.stop()
        _complete(sums, allow_fewer)
        return sums.moments if division is None else division.total(dtype, device, quartic)


def _complete(sums: Accumulator, allow_fewer: bool) -> None:
    """Raise where a module has not given what was wanted, or what is allowed."""
    if sums.most == 0:
        raise BudgetNotMet(
            f"The corpus gave no key at all in {sums.batches} batches; pass documents with at least one token.",
            wanted=max((limit for limit in sums.wanted.values() if limit), default=1),
        )
    for name, limit in sums.wanted.items():
        found = sums.found(name)
        if limit is None or found >= limit:
            continue
        if not allow_fewer:
            raise BudgetNotMet(
                f"The corpus has {found} keys for {name!r} but {limit} were wanted; pass more "
                "text, a smaller budget, or allow_fewer=True.",
                found=found,
                wanted=limit,
            )
        logger.warning("only %d of the %d keys wanted for %s", found, limit, name)


def _budgets(modules: Sequence[str], budget: int | Mapping[str, int] | None) -> dict[str, int | None]:
    wanted: dict[str, int | None] = {}
    for name in [modules] if isinstance(modules, str) else modules:
        if isinstance(budget, Mapping) and name not in budget:
            raise BadInput(f"There is no budget for the module {name!r}; add one.")
        keys = budget[name] if isinstance(budget, Mapping) else budget
        if keys is not None and (isinstance(keys, bool) or not isinstance(keys, int) or keys < 1):
            raise BadInput(
                f"The budget of {name!r} must be a whole number of keys above 0 but is {keys!r}; see fastcov.budget."
            )
        wanted[name] = keys
    return wanted


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[dict[str, Any]]:
    """No key-value cache: by argument where the model takes it, else by its configuration."""
    config: Any = getattr(model, "config", None)
    taken = "use_cache" in inspect.signature(model.forward).parameters
    if taken or not hasattr(config, "use_cache"):
        yield {"use_cache": False} if taken else {}
        return
    before = config.use_cache
    config.use_cache = False
    try:
        yield {}
    finally:
        config.use_cache = before


def _unaccepted(model: nn.Module) -> set[str]:
    """Batch entries that the model has no argument for; some models count positions themselves."""
    parameters = inspect.signature(model.forward).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return set()
    return {"position_ids"} - set(parameters)


def _only_pads_right(mask: Tensor | None) -> bool:
    """Whether a mask (B, L) keeps the beginning of every sequence and nothing after it."""
    if mask is None or mask.dim() != 2:
        return False
    kept = mask.bool()
    return not bool((kept[:, 1:] & ~kept[:, :-1]).any())


def _input_device(model: nn.Module) -> torch.device:
    """Where the input embeddings are, or where a hook of accelerate will bring their input."""
    whole: Any = model  # of transformers, or of any other kind
    try:
        first: nn.Module = whole.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        first = model
    device: torch.device = next(
        (parameter.device for parameter in (*first.parameters(), *model.parameters())), torch.device("cpu")
    )
    if device.type != "meta":
        return device
    target = getattr(getattr(first, "_hf_hook", None), "execution_device", None)
    return torch.device("cpu" if target is None else target)
