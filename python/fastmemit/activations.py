"""What modules take in and put out at the subject's last token, for many rows at once.

Rows can be run in stages: what enters a block is kept, and a later reading of modules in it or above it begins there.
That is right as long as nothing below that block has changed, and it gives the bits of a run from the first block on,
because the same batches go through the same code.

Blocks that take more from below than the hidden states (keys and values of a lower block, several streams) allow no
stages: a few tokens are tried both ways, and such models run from the first block on each time.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastcov.hooks import evaluation_mode, isolated
from fastmemit.errors import FastmemitError, UnknownArchitecture
from fastmemit.models import (
    ModelAdapter,
    agrees,
    check_lengths,
    hidden_of,
    length_batches,
    pad_batch,
    probe_ids,
    token_states,
)
from fastmemit.models.running import Reached
from fastmemit.partial_forward import begun_at
from fastmemit.request import EditRequest
from fastmemit.text import Row, subject_row

log = logging.getLogger(__name__)


BATCH_TOKENS = 8192
#: Bytes of hidden states that one pass keeps at most; batches beyond it begin at the first block.
KEPT = 1 << 30


@dataclass(frozen=True)
class Entering:
    """What enters a block: the hidden states (n, L, d) of one batch, and how blocks return them."""

    hidden: Tensor
    in_tuple: bool


@dataclass(frozen=True)
class SubjectPass:
    """N rows up to their subjects, and how far up the model they have been run.

    Made by `SubjectPass.of`; nothing in it changes, so that one may be begun from again and again.

    Attributes:
        batches: Distinct rows of token ids, in batches of like lengths.
        places: (N,) where each row stands among the distinct ones.
        layer: The block that the kept states enter.
        entering: The kept states of each batch, None where there are none.
    """

    batches: tuple[tuple[tuple[int, ...], ...], ...]
    places: Tensor
    layer: int
    entering: tuple[Entering | None, ...]

    @classmethod
    @isolated()
    def of(cls, adapter: ModelAdapter, rows: Sequence[Row], batch_tokens: int = BATCH_TOKENS) -> SubjectPass:
        """N rows that have not been run yet, in batches of `batch_tokens` padded tokens (one always runs)."""
        if adapter.right_padding == "none":
            batch_tokens = 1
        wanted = [row.ids[: row.subject + 1] for row in rows]
        batches = length_batches(dict.fromkeys(wanted), batch_tokens)
        place = {ids: n for n, ids in enumerate(ids for batch in batches for ids in batch)}
        places = torch.tensor([place[ids] for ids in wanted])
        return cls(tuple(map(tuple, batches)), places, 0, (None,) * len(batches))

    @property
    def nbytes(self) -> int:
        """What the kept states take."""
        return sum(e.hidden.nbytes for e in self.entering if e)

    @isolated()
    def read(
        self,
        adapter: ModelAdapter,
        *,
        inputs: Sequence[nn.Module] = (),
        outputs: Sequence[nn.Module] = (),
        keep: int = 0,
        tried: bool = False,
    ) -> tuple[list[Tensor], list[Tensor], SubjectPass]:
        """Read activations at each row's subject.

        Only the tokens up to the subject run, only from the kept states on and as far up as the last module read, and
        equal rows run once.

        Args:
            adapter: The model, the same below block `layer` as when the states were kept.
            inputs: Modules, not below `layer`, whose input is wanted (an edited projection's input is its key).
            outputs: Modules, not below `layer`, whose output is wanted.
            keep: Keep what enters this block, at or above `layer` and at or below every module read; 0 keeps nothing
                new.
            tried: It is known that states may be kept there.

        Returns:
            Two lists of float32 tensors (N, width), in the order of `inputs` and `outputs`, and the pass to go on with:
            this one, or one that begins at the block `keep`.

        Raises:
            UnknownArchitecture: A module does not run, or has not one state for every token.
        """
        if 0 < keep < self.layer:
            raise ValueError(f"The pass begins at block {self.layer}, above block {keep}.")
        if keep == self.layer or (keep and not tried and not runs_in_stages(adapter, keep, inputs, outputs)):
            keep = 0
        names = [type(module).__name__ for module in (*inputs, *outputs)]
        read: list[list[Tensor]] = [[] for _ in names]
        kept: list[Entering | None] = []
        room = KEPT
        # Of the batch that runs: its shape, its rows' last tokens, what was read, and what enters the block `keep`.
        shape, last = (0, 0), torch.empty(0)
        values: dict[int, Tensor] = {}
        now: Entering | None = None

        def store(slot: int, _module: nn.Module, args: tuple[Any, ...], out: Any = None) -> None:
            tensor = args[0] if slot < len(inputs) else hidden_of(out)
            # Some blocks flatten their tokens before the MLP.
            tokens = token_states(tensor, shape, tensor.shape[-1], names[slot])
            values[slot] = tokens[torch.arange(len(last)), last].float()
            if len(values) == len(names):
                raise Reached

        def on_entry(_module: nn.Module, _args: Any, out: Any) -> None:
            nonlocal now
            if isinstance(out, (tuple, Tensor)):  # what is returned otherwise cannot be given back
                now = Entering(hidden_of(out), isinstance(out, tuple))

        with evaluation_mode(adapter.model), ExitStack() as hooks:
            if keep:
                hooks.enter_context(adapter.block(keep - 1).register_forward_hook(on_entry))
            for slot, module in enumerate(inputs):
                hooks.enter_context(module.register_forward_pre_hook(partial(store, slot)))
            for slot, module in enumerate(outputs, start=len(inputs)):
                hooks.enter_context(module.register_forward_hook(partial(store, slot)))
            for ids, entering in zip(self.batches, self.entering, strict=True):
                check_lengths(adapter.model, ids)
                shape, last = (len(ids), max(map(len, ids))), torch.tensor([len(row) - 1 for row in ids])
                now = None
                values.clear()
                with ExitStack() as run, suppress(Reached):
                    if entering is not None:
                        # A copy, for a block may write into what it is given.
                        run.enter_context(begun_at(adapter, self.layer, entering.hidden.clone, entering.in_tuple))
                    adapter.run(**pad_batch(ids, device=adapter.device), use_cache=False)
                for slot, name in enumerate(names):
                    if slot not in values:
                        raise UnknownArchitecture(
                            f"{type(adapter.model).__name__} does not run its {name}, so nothing is read there."
                        )
                    read[slot].append(values[slot])
                room -= now.hidden.nbytes if now else 0
                kept.append(now if room >= 0 else None)
        joined = [torch.cat(parts)[self.places.to(parts[0].device)] for parts in read]
        after = dataclasses.replace(self, layer=keep, entering=tuple(kept)) if keep else self
        return joined[: len(inputs)], joined[len(inputs) :], after


def read_at_subject(
    adapter: ModelAdapter,
    rows: Sequence[Row],
    *,
    inputs: Sequence[nn.Module] = (),
    outputs: Sequence[nn.Module] = (),
    batch_tokens: int = BATCH_TOKENS,
) -> tuple[list[Tensor], list[Tensor]]:
    """Read activations at each row's subject, from the first block on; see `SubjectPass.read`."""
    taken, given, _ = SubjectPass.of(adapter, rows, batch_tokens).read(adapter, inputs=inputs, outputs=outputs)
    return taken, given


def runs_in_stages(
    adapter: ModelAdapter, layer: int, inputs: Sequence[nn.Module], outputs: Sequence[nn.Module]
) -> bool:
    """Whether a run that begins at a block reads what a run from the first block on reads; a few tokens are tried."""
    key = ("begun at", layer, id([*inputs, *outputs][-1]))
    if key not in adapter.measured:
        ids = probe_ids(adapter.model)
        rows = SubjectPass.of(adapter, [Row(ids, len(ids) - 1), Row(ids[:2], 1)])
        taken, given, kept = rows.read(adapter, inputs=inputs, outputs=outputs, keep=layer, tried=True)
        try:
            again, more, _ = kept.read(adapter, inputs=inputs, outputs=outputs)
            pairs = zip([*again, *more], [*taken, *given], strict=True)
            why, same = "differ", all(agrees(adapter.model, got, want) for got, want in pairs)
        except (FastmemitError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # what a block makes of a run without those below it
            why, same = f"fail ({type(error).__name__}: {str(error)[:200]})", False
        if not same:
            log.log(
                logging.DEBUG if "said of stages" in adapter.measured else logging.WARNING,
                "%s: activations are read from the first block on each time, which takes longer, "
                "because runs that begin at block %d %s.",
                type(adapter.model).__name__, layer, why,
            )  # fmt: skip
            adapter.measured["said of stages"] = True
        adapter.measured[key] = same
    found: bool = adapter.measured[key]
    return found


@dataclass(frozen=True)
class Reading:
    """What was read for one layer; nobody writes into it.

    Attributes:
        keys: (B, contexts, d_k) float64, the keys at the subject in every context, the bare prompt's first.
        outputs: (B, d) float64, what the projection puts out at the bare prompt's subject.
        block: (B, d) float64, what the last edited block puts out there.
        passes: Where to go on: over the bare prompts, and over the other contexts if there are any.
    """

    keys: Tensor
    outputs: Tensor
    block: Tensor
    passes: tuple[SubjectPass, ...]

    @property
    def nbytes(self) -> int:
        """What it takes, the states in its passes included."""
        own = self.keys.nbytes + self.outputs.nbytes + self.block.nbytes
        return own + sum(each.nbytes for each in self.passes)


@dataclass(frozen=True)
class ContextReading:
    """What ROME reads of a batch; nobody writes into it.

    Attributes:
        keys: (B, contexts, d_k) float64, the keys at the subject in every context.
        outputs: (B, contexts, d) float64, what the projection puts out there.
    """

    keys: Tensor
    outputs: Tensor

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return self.keys.nbytes + self.outputs.nbytes


_Read = TypeVar("_Read", Reading, ContextReading)


class ReadCache:
    """What the unedited model shows, kept over several plans.

    What a method reads before it has written anything depends on the weights and the requests, not on the statistics:
    all that EMMET reads, MEMIT's first layer, ROME's first fact. A sweep over multipliers that hands the same cache to
    each `fastmemit.Editor.plan` or `edit` reads it once, and gets the same bits. Nothing of an edited model is kept.

    Args:
        capacity: Bytes to hold at most; the least recently used go first.
    """

    def __init__(self, capacity: int = 1 << 30) -> None:
        self._capacity = capacity
        self._held: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], _Read]) -> _Read:
        """The reading of this key, made if it is not held."""
        if key in self._held:
            self._held.move_to_end(key)
            held: _Read = self._held[key]
            return held
        reading = make()
        if reading.nbytes <= self._capacity:
            self._held[key] = reading
            while self.nbytes > self._capacity:
                self._held.popitem(last=False)
        return reading

    @property
    def nbytes(self) -> int:
        """What is held."""
        return sum(reading.nbytes for reading in self._held.values())

    def __len__(self) -> int:
        """How many readings are held."""
        return len(self._held)


class Subjects:
    """One batch on its way up.

    Args:
        adapter: The model.
        tokenizer: Its tokenizer.
        requests: B facts.
        contexts: Texts before the prompts, the first one ``""``.
    """

    def __init__(
        self, adapter: ModelAdapter, tokenizer: Any, requests: Sequence[EditRequest], contexts: Sequence[str]
    ) -> None:
        self._adapter, self._tokenizer = adapter, tokenizer
        self._requests, self._contexts = tuple(requests), tuple(contexts)
        self._passes: tuple[SubjectPass, ...] = ()

    @property
    def bare_ids(self) -> list[tuple[int, ...]]:
        """The token ids of each bare prompt up to its subject's last token."""
        rows = [subject_row(self._tokenizer, "", request) for request in self._requests]
        return [row.ids for row in rows]

    def key(self, layer: int, last: int) -> Hashable:
        """What a reading depends on beside the weights."""
        return (self._requests, self._contexts, layer, last)

    def resume(self, reading: Reading) -> None:
        """Go on from a reading, whether it was made here or held elsewhere."""
        self._passes = reading.passes

    def read(self, layer: int, last: int) -> Reading:
        """What a batch shows at the layer to edit next, below which nothing changed since it was read."""
        adapter, projection = self._adapter, self._adapter.projection(layer)
        if not self._passes:
            bare: list[Row] = []
            others: list[Row] = []
            for request in self._requests:
                for number, context in enumerate(self._contexts):
                    (others if number else bare).append(subject_row(self._tokenizer, context, request))
            self._passes = tuple(SubjectPass.of(adapter, rows) for rows in (bare, others) if rows)
        # Of one module the input comes before its output, and the block's output last of all.
        inputs, outputs = [projection], [projection, adapter.block(last)]
        keep = layer if layer < last and runs_in_stages(adapter, layer, inputs, outputs) else 0
        keys, (out, block), after = self._passes[0].read(adapter, inputs=inputs, outputs=outputs, keep=keep)
        passes = [after]
        read = [keys[0].double()[:, None]]  # (B, 1, d_k)
        for rest in self._passes[1:]:
            keys, _, after = rest.read(adapter, inputs=inputs, keep=layer if layer < last else 0)
            read.append(keys[0].double().reshape(len(self._requests), len(self._contexts) - 1, -1))
            passes.append(after)
        return Reading(torch.cat(read, 1), out.double(), block.double(), tuple(passes))
