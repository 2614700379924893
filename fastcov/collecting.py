"""One pass over a corpus: a second moment for each named module, each from exactly its budget.

First the loop, `collect_moments`; then the `Accumulator`, which makes moments of what each hooked batch brings.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastcov.batching import chained, sent
from fastcov.distributed import Processes
from fastcov.errors import BadInput, BudgetNotMet, FastcovError, NonFinite, ProcessLost
from fastcov.hooks import KeyHooks, evaluation_mode, input_device, isolated, key_rows
from fastcov.moments import SecondMoment
from fastcov.store import Checkpoint, Taken
from fastcov.throughput import Throughput

logger = logging.getLogger(__name__)


class Division:
    """The batches of one collect, divided among processes; `progress` is told the keys of those that others run."""

    def __init__(self, processes: Processes, sums: Accumulator, progress: Callable[[int], None] | None = None) -> None:
        self._processes, self._sums, self._progress = processes, sums, progress
        self._text = b""  # a digest of all batches: whether every process reads the same

    def read(self, batches: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """All batches as they are, remembered; before each a look at the other processes (FailedElsewhere)."""
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
        """The moments of all processes together, the same in each; an empty one for a module without batches here."""
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
    forward: torch.dtype | None = None,
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
        forward: A dtype of 16 bits in which autocast shall multiply in the forward passes, so that keys have this dtype
            too; None runs the model in its own. Sums are made in `dtype` either way.

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
        device = input_device(model)
        drop = {"key_mask"} | _unaccepted(model)
        # No weight is multiplied twice in a forward pass, and what the cache holds would outlive it under autocast.
        narrow: Callable[[], AbstractContextManager[Any]] = nullcontext
        if forward is not None:
            narrow = partial(torch.autocast, device.type, forward, cache_enabled=False)
        if throughput is not None:
            throughput.start(model, device, forward)
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
                    hooks.run({**moved, **extra}, narrow)
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


# -- one hooked batch into moments --------------------------------------------------------------------
#
# The mask, the cut at the budget, the buffer of small batches, the watch for NaN. Nothing here waits for a device. Keys
# are counted by the mask, on the CPU; whether a sum is finite is asked on its device and read there once in many
# batches. A launch on a GPU reads and writes the whole triangle, whatever it adds; by the published rates of an H100
# that takes as long as multiplying about 1053 rows. Batches that bring fewer keys are therefore copied together; those
# that bring enough are added where they lie.

#: Rows that one launch should have; a module's buffer has as many (268 MB for GPT-J in 16 bits). A CPU gets batches as
#: they come.
LAUNCH_ROWS, CPU_LAUNCH_ROWS = 8192, 1
#: Batches between two looks at what a device has found.
LOOK_EVERY, CPU_LOOK_EVERY = 16, 1


@dataclass
class _Module:
    """One module's sum, and its keys that wait."""

    name: str
    moment: SecondMoment
    buffer: Tensor | None = None  # (launch rows, d_k), of which the first `held` wait
    held: int = 0
    since: int = -1  # the batch of the oldest key that waits


@dataclass(frozen=True)
class _Answer:
    """Whether a module's sum was finite after what it was given from some batches."""

    name: str
    dtype: torch.dtype
    first: int
    last: int
    finite: Tensor  # (), bool, on the device of the sum


class Accumulator:
    """Cuts the keys of each module of a model at its budget, None for all there are, and sums them in a dtype."""

    def __init__(
        self, model: nn.Module, wanted: Mapping[str, int | None], dtype: torch.dtype, quartic: bool = False
    ) -> None:
        self._model, self.wanted, self._dtype, self._quartic = model, wanted, dtype, quartic
        self.batches = 0  # how many were begun
        self.tokens: int | None = None  # how many the mask of the batch keeps; None where it has no mask
        self._mask: Tensor | None = None  # of the batch, on the CPU
        self._cuts: dict[tuple[int, int], Tensor] = {}  # of the mask, by rows and how many keys are left in them
        self._modules: dict[str, _Module] = {}
        self._found = dict.fromkeys(wanted, 0)  # those that wait included
        self._before = dict(self._found)
        self._earlier: dict[str, Taken] = {}  # taken by an earlier run, not asked for yet
        self._answers: list[_Answer] = []  # asked for and not looked at yet

    @property
    def moments(self) -> dict[str, SecondMoment]:
        """The moments by module, in the order wanted; complete after `finish`."""
        return {name: self._modules[name].moment for name in self.wanted if name in self._modules}

    @property
    def most(self) -> int:
        """How many keys the module that took most has given."""
        return max(self._found.values(), default=0)

    def found(self, name: str) -> int:
        """How many of a module's keys were taken, or left to another process."""
        return self._found[name]

    def took(self) -> dict[str, int]:
        """How many keys the batch gave, by module."""
        return {name: self._found[name] - before for name, before in self._before.items()}

    def done(self) -> bool:
        """Whether every budget is met."""
        return all(limit is not None and self._found[name] >= limit for name, limit in self.wanted.items())

    @isolated()
    def start(self, mask: Tensor | None) -> None:
        """Begin a batch with the mask of its tokens, non-zero means a key; None makes every token one."""
        self.batches += 1
        # Once a batch: a mask that is on a GPU already has to be waited for here.
        self._mask = None if mask is None else mask.to("cpu", torch.bool)
        self.tokens = None if self._mask is None else int(self._mask.sum())
        self._cuts, self._before = {}, dict(self._found)

    def skip(self, tokens: int) -> None:
        """Count the batch's keys, of `tokens` positions with padding, and sum none: another process does."""
        count = tokens if self.tokens is None else self.tokens
        for name, limit in self.wanted.items():
            found = self._found[name] + count
            self._found[name] = found if limit is None else min(found, limit)

    @isolated()
    def take(self, name: str, x: Tensor) -> None:
        """Add a module's keys x (..., d_k), as many as its budget has room for; errors as of `collect_moments`."""
        self._check(name, x)
        limit = self.wanted[name]
        left = None if limit is None else limit - self._found[name]
        if left == 0:
            return
        mask, count = self.first(x.shape[:-1].numel(), left)
        pieces = list(key_rows(x, mask))  # (n, d_k), (n,) on the CPU
        module = self._modules.get(name) or self._begin(name, x.shape[-1], x.device)
        for rows, part in pieces:
            self._add(module, rows, part)
        self._found[name] += count
        if self._found[name] == limit:
            self._flush(module, free=True)
        every = CPU_LOOK_EVERY if x.device.type == "cpu" else LOOK_EVERY
        if self._answers and self.batches - self._answers[0].last >= every:
            self._look(name, x, mask)

    def first(self, rows: int, left: int | None) -> tuple[Tensor | None, int]:
        """The first `left` keys, None for all, of the batch's `rows` positions, counted row by row.

        Returns a mask of the shape that the batch's has, or (rows,) where it has none, or None for every row; and how
        many keys it keeps.
        """
        count = rows if self.tokens is None else self.tokens
        if left is None or count <= left:
            everything = self._mask is None or count == self._mask.numel()
            return (None if everything and count == rows else self._mask), count
        if (rows, left) not in self._cuts:
            if self._mask is None:
                self._cuts[rows, left] = torch.arange(rows) < left
            else:
                order = self._mask.flatten().cumsum(0).reshape(self._mask.shape)
                self._cuts[rows, left] = self._mask & (order <= left)
        return self._cuts[rows, left], left

    def _add(self, module: _Module, rows: Tensor, mask: Tensor | None) -> None:
        """Add the kept rows (n, d_k), or copy them behind those that wait where they are too few for a launch."""
        kept = rows.shape[0] if mask is None else int(mask.sum())
        mask = None if kept == rows.shape[0] else mask
        size = _launch_rows(rows.device)
        if kept >= size:
            module.moment.add_rows(rows, None if mask is None else sent(mask, rows.device), kept)
            self._ask(module, self.batches - 1)
            return
        if kept == 0:
            return
        buffer = module.buffer
        if buffer is None or (buffer.dtype, buffer.device) != (rows.dtype, rows.device):
            self._flush(module)
            buffer = module.buffer = rows.new_empty(size, rows.shape[1])
        if module.held == 0:
            module.since = self.batches - 1
        # Indices are made on the CPU: to find them on a GPU would be to wait for it.
        index = None if mask is None else sent(mask.nonzero().squeeze(1), rows.device)  # (kept,)
        start = 0
        while start < kept:
            stop = min(kept, start + size - module.held)
            free = buffer[module.held : module.held + stop - start]
            if index is None:
                free.copy_(rows[start:stop])
            else:
                torch.index_select(rows, 0, index[start:stop], out=free)
            module.held, start = module.held + stop - start, stop
            if module.held == size:
                self._flush(module)

    def _flush(self, module: _Module, *, free: bool = False) -> None:
        """Sum what waits; give its memory back if it is not needed any more."""
        if module.held and module.buffer is not None:
            module.moment.add_rows(module.buffer[: module.held], None, module.held)
            self._ask(module, module.since)
            module.held, module.since = 0, self.batches - 1
        if free:
            module.buffer = None

    def _ask(self, module: _Module, first: int) -> None:
        # The diagonal holds sums of squares: one bad number in any key shows there, and stays.
        finite = module.moment.lower.diagonal().isfinite().all()
        self._answers.append(_Answer(module.name, module.moment.dtype, first, self.batches - 1, finite))

    def _look(self, name: str = "", x: Tensor | None = None, mask: Tensor | None = None) -> None:
        """Read all answers, with one wait for each device; NonFinite names the batch of the oldest that is bad."""
        answers, self._answers = self._answers, []
        good: dict[int, bool] = {}
        for device in {answer.finite.device for answer in answers}:
            here = [i for i, answer in enumerate(answers) if answer.finite.device == device]
            read = torch.stack([answers[i].finite for i in here]).tolist()
            good.update(zip(here, read, strict=True))
        for i, answer in enumerate(answers):
            if not good[i]:
                now = self.batches - 1
                at_hand = (answer.name, answer.first, answer.last) == (name, now, now)
                at_hand = at_hand and x is not None and _launch_rows(x.device) == 1
                raise NonFinite(_message(answer, x if at_hand else None, mask))

    @isolated()
    def finish(self) -> None:
        """Sum what still waits, and look for the last time; errors are those of `take`."""
        for name in list(self._earlier):  # not one key more came
            self._begin(name, self._earlier[name].moment.d, self._earlier[name].device)
        for module in self._modules.values():
            self._flush(module, free=True)
        self._look()

    @isolated()
    def taken(self) -> dict[str, Taken]:
        """What every module has given, between two batches: views, not copies; errors are those of `take`."""
        self._look()
        taken = dict(self._earlier)
        for name, module in self._modules.items():
            waiting = None if module.buffer is None or not module.held else module.buffer[: module.held]
            device = module.moment.device
            taken[name] = Taken(module.moment, self.wanted[name], self._found[name], waiting, module.since, device)
        return taken

    def resume(self, batches: int, taken: Mapping[str, Taken]) -> None:
        """Take over what `taken` gave in an earlier run after some batches: what follows comes to the same bits."""
        self.batches = batches
        self._earlier = {name: taken[name] for name in self.wanted}
        self._found = {name: one.found for name, one in self._earlier.items()}

    def describe(self) -> dict[str, Any]:
        """What decides on the order of the sums, as JSON values."""
        quartic = {"quartic": True} if self._quartic else {}
        return {"dtype": str(self._dtype), "launch_rows": LAUNCH_ROWS, **quartic}

    def _begin(self, name: str, d: int, device: torch.device) -> _Module:
        """A module's share: none, or what an earlier run took."""
        earlier = self._earlier.pop(name, None)
        if earlier is None:
            moment = SecondMoment(d, dtype=self._dtype, device=device, quartic=self._quartic)
            module = self._modules[name] = _Module(name, moment)
            return module
        module = self._modules[name] = _Module(name, earlier.moment.to(device))
        if earlier.waiting is not None:
            self._add(module, earlier.waiting.to(device), None)
        module.since = earlier.waiting_since
        return module

    def _check(self, name: str, x: Tensor) -> None:
        width = getattr(self._model.get_submodule(name), "in_features", None)
        module = self._modules.get(name)
        expected = module.moment.d if module is not None else width
        if isinstance(expected, int) and (x.dim() == 0 or x.shape[-1] != expected):
            raise BadInput(
                f"The input of {name!r} has shape {tuple(x.shape)} in batch {self.batches - 1} but its "
                f"last dimension must be {expected}; name the projection whose input is the key."
            )
        if not x.is_floating_point():
            raise BadInput(f"The input of {name!r} is {x.dtype} and not floating point; name a projection.")


def _launch_rows(device: torch.device) -> int:
    return CPU_LAUNCH_ROWS if device.type == "cpu" else LAUNCH_ROWS


def _message(answer: _Answer, x: Tensor | None, mask: Tensor | None) -> str:
    """What is wrong with the keys of an answer; more exactly where they are at hand as x (..., d_k)."""
    if x is None:
        first, last = answer.first, answer.last
        where = f"batch {last}" if first == last else f"one of the batches {first} to {last}"
        return (
            f"Keys of {answer.name!r} hold NaN or infinity, or their squares overflow {answer.dtype}, in {where}; run "
            "the model in another dtype (bfloat16 or float32), or pass dtype=torch.float64."
        )
    bad = ~x.isfinite().all(-1)
    if mask is not None:
        bad &= mask.to(x.device).reshape(bad.shape)
    if rows := int(bad.sum()):
        return (
            f"{rows} of {bad.numel()} keys of {answer.name!r} hold NaN or infinity in batch {answer.last}; run the "
            "model in another dtype (bfloat16 or float32)."
        )
    return (
        f"The squares of the keys of {answer.name!r} overflow {answer.dtype} in batch {answer.last} (largest key "
        f"{float(x.abs().max()):.3g}); pass dtype=torch.float64."
    )
