"""Run part of a model: from where a change enters up to the logits, or from the first tokens up to the subject.

A target's change enters at the output of one block, or of the edited projection in it, at the subject's last token.
Blocks below and tokens before never see it, so both run once: the hidden states that leave the last of these blocks and
the attention keys and values of the earlier tokens are kept, and each step of the optimisation feeds them to the
model's own code. No architecture is written twice: the blocks below are replaced by pass-throughs for the time of a
step, and the kept keys and values are given to the model as a cache that hands them out and never grows.

Not every model allows this; what does not agree with the whole model is found out here and not used.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from fastcov.hooks import evaluation_mode, input_device, isolated
from fastmemit.errors import FastmemitError, UnknownArchitecture
from fastmemit.models import ModelAdapter
from fastmemit.models.adapter import Site
from fastmemit.models.running import (
    Reached,
    agrees,
    check_lengths,
    difference,
    forward_as,
    head_reads,
    hidden_of,
    length_batches,
    one_of_each_kind,
    output_of,
    pad_batch,
    place_rows,
    probe_ids,
    remembered,
    replaced_output,
    token_states,
    tolerance,
    with_hidden,
)
from fastmemit.text import Row

log = logging.getLogger(__name__)


class PrefixLayer(DynamicLayer):  # type: ignore[misc]  # of transformers, which mypy does not follow
    """Constant keys and values (n, heads, P, width) in front of whatever a step brings."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The prefix and the new states, joined; nothing is remembered."""
        keys = torch.cat([self.keys, key_states], dim=-2)
        return keys, torch.cat([self.values, value_states], dim=-2)


Past = list[tuple[Tensor, Tensor]]  # per block its keys and values (n, heads, P, width)


def past_of(cache: Cache, columns: int) -> Past:
    """Copies of the cached keys and values of the first columns."""
    return [(e.keys[:, :, :columns].clone(), e.values[:, :, :columns].clone()) for e in cache.layers]


def left_padded(kept: Sequence[tuple[Cache, int]], lengths: Sequence[int]) -> Cache:  # (cache, row of it)
    """The cached keys and values of the first tokens, so many of each row, as a batch that is padded on the left."""
    width, found = max(lengths), DynamicCache()
    for number, layer in enumerate(kept[0][0].layers):
        if layer.keys is None:  # its block has not run
            continue
        keys, values = (t.new_zeros(len(kept), t.shape[1], width, t.shape[3]) for t in (layer.keys, layer.values))
        for place, ((cache, row), length) in enumerate(zip(kept, lengths, strict=True)):
            keys[place, :, width - length :] = cache.layers[number].keys[row, :, :length]
            values[place, :, width - length :] = cache.layers[number].values[row, :, :length]
        found.update(keys, values, number)
    return found


@isolated()
def goes_on(adapter: ModelAdapter) -> bool:
    """Whether rows can go on from the cache of a batch padded on the right, by `left_padded`; few tokens are tried."""
    return remembered(adapter.model, "goes on", partial(_goes_on, adapter.model))


def _goes_on(model: Any) -> bool:
    ids, cache, place = probe_ids(model), DynamicCache(), input_device(model)
    rows = [ids[: len(ids) * 3 // 4], ids[2 : 2 + len(ids) // 3]]
    with suppress(Exception), one_of_each_kind(model):  # what a model makes of a cache
        batch = pad_batch([ids, ids[2:]], device=place)
        del batch["attention_mask"]
        output_of(model, headless=True, **batch, past_key_values=cache, use_cache=True)
        past = left_padded([(cache, 0), (cache, 1)], [len(row) - 1 for row in rows])
        last = pad_batch(rows, side="left", device=place)
        last.update({name: last[name][:, -1:] for name in ("input_ids", "position_ids")})
        together = output_of(model, headless=True, **last, past_key_values=past, use_cache=True)[:, -1]
        alone = [output_of(model, headless=True, **pad_batch([row], device=place))[:, -1] for row in rows]
        return agrees(model, together, torch.cat(alone))
    return False


def as_cache(past: Past, passed: int, like: Tensor, columns: int) -> Cache:
    """A cache that hands out the past (len(like), columns) of the blocks above the `passed` ones and never grows."""
    # The model asks the first layer how long the past is; the passed-through layers answer with a tensor of that length
    # that has no memory behind it.
    empty = like.new_zeros(()).expand(len(like), 1, columns, 1)
    return Cache(layers=[PrefixLayer(k, v) for k, v in [(empty, empty)] * passed + past])


def align(rows: Sequence[Row], prefix: int, suffix: int) -> dict[str, Tensor]:
    """Ids, mask and positions, (N, prefix + suffix) each, every subject in column `prefix`."""
    return place_rows([row.ids for row in rows], [prefix - row.subject for row in rows], prefix + suffix)


@contextmanager
def begun_at(adapter: ModelAdapter, layer: int, entering: Callable[[], Any], in_tuple: bool) -> Iterator[None]:
    """Pass through the blocks below `layer` and give the block itself the states that `entering` makes."""

    def passed(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return (hidden_states,) if in_tuple else hidden_states

    def given(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return (entering(),) if in_tuple else entering()

    with ExitStack() as stack:
        for below in range(layer):
            stack.enter_context(forward_as(adapter.block(below), given if below == layer - 1 else passed))
        yield


class SuffixForward:
    """The model from where a change enters, on the tokens from each row's subject on.

    The subjects of the N rows are aligned in column P, prefixes to the left of it (padded on the left), suffixes of up
    to S tokens from it on (padded on the right).
    """

    def __init__(self, adapter: ModelAdapter, layer: int, rows: Sequence[Row], site: Site = "block") -> None:
        self._adapter, self._site = adapter, site
        self._module = adapter.module_at(layer, site)
        self._passed = layer + 1 if site == "block" else layer  # blocks that do not run
        self._lengths = [len(row.ids) - row.subject for row in rows]
        # One column at least: from an empty past nobody could tell its shape.
        self._prefix = max(1, *(row.subject for row in rows))
        batch = align(rows, self._prefix, max(self._lengths))
        self._batch = {name: part.to(adapter.device) for name, part in batch.items()}
        self._run_once(self._prefill(rows))

    @torch.no_grad()
    def _run_once(self, past: Past) -> None:
        """Run the suffixes behind their prefixes up to the site, and keep what the steps begin with."""
        seen: dict[str, Any] = {}

        def put_out(_module: nn.Module, _args: Any, out: Any) -> None:
            seen["site"] = out
            raise Reached

        with ExitStack() as hooks:
            if self._passed:
                below = self._adapter.block(self._passed - 1)
                hooks.enter_context(below.register_forward_hook(lambda _m, _a, out: seen.update(block=out)))
            hooks.enter_context(self._module.register_forward_hook(put_out))
            with suppress(Reached):
                self._adapter.run(**self._behind(as_cache(past, 0, past[0][0], self._prefix)))
        # What is put out at the subject, unchanged (N, d). Copies, so that the other columns are freed.
        self.start = self._states(seen["site"])[:, 0].float().clone()
        self._hidden: Tensor | None = None
        self._in_tuple = isinstance(seen.get("block"), tuple)
        if self._passed:
            self._hidden = self._states(seen["block"]).clone()
        self._past = past[self._passed :]

    @torch.no_grad()
    def _prefill(self, rows: Sequence[Row]) -> Past:
        """The keys and values of all blocks at every row's prefix.

        What a row has in common with others, its `Row.stem`, runs once; the rest of its prefix runs behind it.
        """
        adapter, cache = self._adapter, DynamicCache()
        stems = list(dict.fromkeys(row.ids[: row.stem] for row in rows if row.stem))
        rests = [row.ids[row.stem : row.subject] for row in rows]
        lengths = torch.tensor([row.stem for row in rows])[:, None]
        mask = torch.zeros(len(rows), 0, dtype=torch.int64)
        # No logits are needed here: one position through the output head instead of all.
        with head_reads(adapter, [0], [0]):
            if stems:
                # Padded on the left, so that nothing stands between a stem and what follows: some models count columns.
                batch = pad_batch(stems, side="left", device=adapter.device)
                adapter.run(**batch, past_key_values=cache, use_cache=True)
                own = [stems.index(row.ids[: row.stem]) if row.stem else 0 for row in rows]
                cache.batch_select_indices(torch.tensor(own, device=adapter.device))
                mask = (torch.arange(-cache.get_seq_length(), 0) >= -lengths).long()
            if any(rests) or not stems:
                batch = place_rows(rests, [0] * len(rows), max(1, *map(len, rests)))
                batch["position_ids"] += lengths
                batch["attention_mask"] = torch.cat([mask, batch["attention_mask"]], 1)
                run = {name: part.to(adapter.device) for name, part in batch.items()}
                adapter.run(**run, past_key_values=cache, use_cache=True)
        # Each row's tokens into the columns just before its subject, where `align` has them.
        tokens = torch.arange(self._prefix) - self._prefix + torch.tensor([row.subject for row in rows])[:, None]
        source = (tokens + mask.shape[1] - lengths).clamp(min=0)[:, None, :, None]

        def aligned(states: Tensor) -> Tensor:
            return states.gather(2, source.to(states.device).expand(-1, states.shape[1], -1, states.shape[3]))

        return [(aligned(entry.keys), aligned(entry.values)) for entry in cache.layers]

    @property
    def _shape(self) -> tuple[int, int]:
        """N rows, and S columns from the subject on."""
        return len(self._lengths), self._batch["input_ids"].shape[1] - self._prefix

    def _behind(self, cache: Cache) -> dict[str, Any]:
        """The model's inputs for the suffixes, behind a cache of their prefixes."""
        return {
            "input_ids": self._batch["input_ids"][:, self._prefix :],
            "attention_mask": self._batch["attention_mask"],
            "position_ids": self._batch["position_ids"][:, self._prefix :],
            "past_key_values": cache,
            "use_cache": True,
        }

    def _states(self, out: Any) -> Tensor:  # (N, S, d)
        return token_states(out, self._shape, self._adapter.d, type(self._module).__name__)

    def logits(self, value: Tensor, rows: Sequence[int] | Tensor, columns: Sequence[int] | Tensor) -> Tensor:
        """Logits (M, vocabulary) at rows and columns from the subject, with `value` (N, d) put out at the subjects."""
        entering = self._hidden
        if self._site == "block":
            assert entering is not None
            entering = torch.cat([value.to(entering)[:, None], entering[:, 1:]], dim=1)  # (N, S, d)
        like = self.start if self._hidden is None else self._hidden
        with ExitStack() as changes:
            changes.enter_context(begun_at(self._adapter, self._passed, lambda: entering, self._in_tuple))
            if self._site == "projection":
                changes.enter_context(replaced_output(self._module, self._shape, value))
            changes.enter_context(head_reads(self._adapter, rows, columns))
            out = self._adapter.run(**self._behind(as_cache(self._past, self._passed, like, self._prefix)))
        logits: Tensor = out.logits[0]
        return logits

    def select(self, rows: Sequence[int], index: Tensor | None = None) -> SuffixForward:
        """The same forward of these rows alone (numbers of this one's), without the columns that nobody needs then.

        With the rows as an `index` on the device of `start` too, nothing is copied to it.
        """
        index = torch.tensor(rows, device=self.start.device) if index is None else index
        found = copy.copy(self)
        found._lengths = [self._lengths[row] for row in rows]
        suffix = max(found._lengths)
        found._batch = {
            name: part[index.to(part.device), : self._prefix + suffix] for name, part in self._batch.items()
        }
        if self._hidden is not None:
            found._hidden = self._hidden[index.to(self._hidden.device), :suffix]
        found.start = self.start[index]
        found._past = [(k[index.to(k.device)], v[index.to(v.device)]) for k, v in self._past]
        return found


@dataclass(frozen=True)
class Whole:
    """n whole rows, padded on the right, on the model's device."""

    batch: dict[str, Tensor]  # the model's inputs (n, L)
    subjects: Tensor  # (n,) the column of each row's subject

    @classmethod
    def of(cls, adapter: ModelAdapter, rows: Sequence[Row]) -> Whole:
        """These rows."""
        subjects = torch.tensor([row.subject for row in rows], device=adapter.device)
        return cls(pad_batch([row.ids for row in rows], device=adapter.device), subjects)

    def select(self, index: Tensor, width: int) -> Whole:
        """Some of them (their numbers), without the columns beyond a width."""
        index = index.to(self.subjects.device)
        return Whole({name: part[index, :width] for name, part in self.batch.items()}, self.subjects[index])


def run_whole(
    adapter: ModelAdapter,
    module: nn.Module,
    rows: Sequence[Row] | Whole,
    reads: tuple[Sequence[int] | Tensor, Sequence[int] | Tensor],
    change: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run n whole rows through the whole model, with `change` made to what the module puts out at the subjects (n, d).

    Returns what is put out there unchanged, float32, and the logits (M, vocabulary) at `reads`: numbers of rows, and
    columns counted from the row's subject.
    """
    whole = rows if isinstance(rows, Whole) else Whole.of(adapter, rows)
    count, width = whole.batch["input_ids"].shape
    starts: list[Tensor] = []

    def put(_module: nn.Module, _args: Any, out: Any) -> Any:
        states = token_states(out, (count, width), adapter.d, type(module).__name__)
        subjects = whole.subjects.to(states.device)
        starts.append(states[torch.arange(count, device=states.device), subjects].float())
        if change is None:
            return None
        here = (torch.arange(width, device=states.device) == subjects[:, None])[..., None]  # (n, L, 1)
        changed = torch.where(here, change(starts[0]).to(states)[:, None], states)
        return with_hidden(out, changed.reshape(hidden_of(out).shape))

    read, columns = (torch.as_tensor(each, dtype=torch.int64, device=whole.subjects.device) for each in reads)
    with module.register_forward_hook(put), head_reads(adapter, read, whole.subjects[read] + columns):
        logits: Tensor = adapter.run(**whole.batch, use_cache=False).logits[0]
    return starts[0], logits


def _instead(new: Tensor, _start: Tensor) -> Tensor:
    return new


class FullForward:
    """The whole model on N whole rows, with the same face as `SuffixForward`.

    `alone` they run one by one without padding, each put together anew in every step.
    """

    def __init__(
        self, adapter: ModelAdapter, layer: int, rows: Sequence[Row], site: Site = "block", *, alone: bool = False
    ) -> None:
        self._adapter, self._rows = adapter, list(rows)
        self._module = adapter.module_at(layer, site)
        self._whole = None if alone else Whole.of(adapter, rows)
        groups = [Whole.of(adapter, [row]) for row in rows] if self._whole is None else [self._whole]
        with torch.no_grad():
            self.start = torch.cat([run_whole(adapter, self._module, group, ([0], [0]))[0] for group in groups])

    def logits(self, value: Tensor, rows: Sequence[int] | Tensor, columns: Sequence[int] | Tensor) -> Tensor:
        """Logits with what is put out at the subjects replaced; see `SuffixForward.logits`."""
        if self._whole is not None:
            return run_whole(self._adapter, self._module, self._whole, (rows, columns), lambda _: value)[1]
        rows, columns = (part.tolist() if isinstance(part, Tensor) else part for part in (rows, columns))
        found: dict[int, Tensor] = {}
        for number in sorted(set(rows)):
            reads = [place for place, row in enumerate(rows) if row == number]
            where = ([0] * len(reads), [columns[place] for place in reads])
            one, change = self._rows[number : number + 1], partial(_instead, value[number : number + 1])
            _, logits = run_whole(self._adapter, self._module, one, where, change)
            found.update(zip(reads, logits, strict=True))
        return torch.stack([found[place] for place in range(len(rows))])

    def select(self, rows: Sequence[int], index: Tensor | None = None) -> FullForward:
        """The same forward of these rows alone; see `SuffixForward.select`."""
        found = copy.copy(self)
        index = torch.tensor(rows, device=self.start.device) if index is None else index
        found._rows, found.start = [self._rows[number] for number in rows], self.start[index]
        if self._whole is not None:
            found._whole = self._whole.select(index, max(len(row.ids) for row in found._rows))
        return found


def forward_for(adapter: ModelAdapter, layer: int, rows: Sequence[Row], site: Site) -> SuffixForward | FullForward:
    """The fastest forward of these rows that agrees with the whole model on one row alone.

    Up to four are compared, each with another vector than its own put in: those that would be padded most, before the
    subject and before what they share with others, and the shortest and the longest, because some models treat every
    row of a batch by its longest (RoPE scaled by length). What does not agree for one group is not tried again for this
    layer.

    Raises:
        UnknownArchitecture: What is put out at the site is not one vector a token.
        torch.OutOfMemoryError: There is no memory for a batch of these rows.
    """
    numbers = range(len(rows))
    lengths = [len(row.ids) for row in rows]
    padded = min(numbers, key=lambda i: (rows[i].subject, lengths[i]))
    shared = min((i for i in numbers if rows[i].stem), key=lambda i: rows[i].stem, default=padded)
    tried = sorted({padded, shared, min(numbers, key=lengths.__getitem__), max(numbers, key=lengths.__getitem__)})
    reads = ([], [])  # type: tuple[list[int], list[int]]
    whole = []
    for place, number in enumerate(tried):
        columns = range(len(rows[number].ids) - rows[number].subject)
        with torch.no_grad():
            one = ([0] * len(columns), columns)
            whole.append(run_whole(adapter, adapter.module_at(layer, site), [rows[number]], one, _another))
        reads[0].extend([place] * len(columns))
        reads[1].extend(columns)
    start, want = (torch.cat(parts) for parts in zip(*whole, strict=True))
    measured = adapter.measured
    excluded = measured.setdefault(("targets", layer, site), set())
    for form in (SuffixForward, FullForward):
        if form in excluded:
            continue
        try:
            forward: SuffixForward | FullForward = form(adapter, layer, rows, site)
            with torch.no_grad():
                got = forward.select(tried).logits(_another(start), *reads)
            off = max(difference(got, want), difference(forward.start[tried], start))
            if off <= tolerance(adapter.model):
                return forward
            why = f"is off by {off:.1%}" if math.isfinite(off) else "gives numbers that are not finite"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # what a model makes of a cache or of padding is its own affair
            why = f"fails ({type(error).__name__}: {str(error)[:200]})"
        excluded.add(form)
        part, instead = _WORDS[form]
        said = measured.setdefault("said of targets", set())
        log.log(
            logging.DEBUG if form in said else logging.WARNING,
            "%s: targets run %s, which takes longer, because %s %s (layer %d).",
            type(adapter.model).__name__, instead, part, why, layer,
        )  # fmt: skip
        said.add(form)
    return FullForward(adapter, layer, rows, site, alone=True)


def _another(start: Tensor) -> Tensor:
    """Vectors (n, d) that are tried in place of others."""
    return start + start.roll(1, -1) / 2


_WORDS: dict[type, tuple[str, str]] = {
    SuffixForward: ("a forward of the upper blocks and later tokens alone", "whole rows"),
    FullForward: ("a batch of padded rows", "one row at a time"),
}


# -- up to the subject --------------------------------------------------------------------------------
#
# Rows can be run in stages: what enters a block is kept, and a later reading of modules in it or above it begins there.
# That is right as long as nothing below that block has changed, and it gives the bits of a run from the first block on,
# because the same batches go through the same code. Blocks that take more from below than the hidden states (keys and
# values of a lower block, several streams) allow no stages: a few tokens are tried both ways, and such models run from
# the first block on each time.

READ_TOKENS = 8192
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
    """

    batches: tuple[tuple[tuple[int, ...], ...], ...]  # distinct rows of token ids, those of like lengths together
    places: Tensor  # (N,) where each row stands among the distinct ones
    layer: int  # the block that the kept states enter
    entering: tuple[Entering | None, ...]  # the kept states of each batch, if there are any

    @classmethod
    @isolated()
    def of(cls, adapter: ModelAdapter, rows: Sequence[Row], batch_tokens: int = READ_TOKENS) -> SubjectPass:
        """N rows that have not been run yet, in batches of `batch_tokens` padded tokens (one always runs)."""
        if adapter.traits.right_padding == "none":
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
        """Read what enters (`inputs`) and leaves (`outputs`) some modules, not below `layer`, at each row's subject.

        Only the tokens up to the subject run, only from the kept states on and as far up as the last module read, and
        equal rows run once. Below the block `layer` the model is as when the states were kept. What enters the block
        `keep`, at or below every module read, is kept (0: nothing new); `tried`: it is known to be right. Both are
        float32 (N, width) in the order of the modules; the pass is that to go on with, this one or one from `keep` on.

        Raises:
            ValueError: `keep` lies below this pass.
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
    adapter: ModelAdapter, rows: Sequence[Row], *, inputs: Sequence[nn.Module] = (), outputs: Sequence[nn.Module] = ()
) -> tuple[list[Tensor], list[Tensor]]:
    """Read activations at each row's subject, from the first block on; see `SubjectPass.read`."""
    taken, given, _ = SubjectPass.of(adapter, rows).read(adapter, inputs=inputs, outputs=outputs)
    return taken, given


def runs_in_stages(
    adapter: ModelAdapter, layer: int, inputs: Sequence[nn.Module], outputs: Sequence[nn.Module]
) -> bool:
    """Whether a run that begins at a block reads what a run from the first block on reads; a few tokens are tried."""
    measured, key = adapter.measured, ("begun at", layer, id([*inputs, *outputs][-1]))
    if key not in measured:
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
                logging.DEBUG if "said of stages" in measured else logging.WARNING,
                "%s: activations are read from the first block on each time, which takes longer, "
                "because runs that begin at block %d %s.",
                type(adapter.model).__name__, layer, why,
            )  # fmt: skip
            measured["said of stages"] = True
        measured[key] = same
    found: bool = measured[key]
    return found
