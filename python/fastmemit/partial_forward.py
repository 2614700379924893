"""Run only what a target's change can reach: blocks above the edited one, tokens from the subject.

The change enters at the output of one block, or of the edited projection in it, at the subject's
last token.  Blocks below and tokens before never see it, so both run once: the hidden states that
leave the last of these blocks and the attention keys and values of the earlier tokens are kept, and
each step of the optimisation feeds them to the model's own code.  No architecture is written twice:
the blocks below are replaced by pass-throughs for the time of a step, and the kept keys and values are given to the
model as a cache that hands them out and never grows.

Not every model allows this; `fastmemit.partial_forward` finds out which one does.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from fastcov.hooks import evaluation_mode, isolated
from fastmemit.errors import FastmemitError, UnknownArchitecture
from fastmemit.models import ModelAdapter, hidden_of, probe_ids, token_states, with_hidden
from fastmemit.models.running import difference, remembered, tolerance
from fastmemit.tokens import Row, pad_batch

log = logging.getLogger(__name__)


@contextmanager
def head_reads(adapter: ModelAdapter, rows: Sequence[int], columns: Sequence[int]) -> Iterator[None]:
    """Let the model's output head see M chosen positions instead of every one.

    Inside the block a forward returns logits of shape (1, M, vocabulary), with whatever the model does to logits after
    its head (scaling, soft caps) done to them.

    Args:
        adapter: The model.
        rows: M rows of the batch.
        columns: M positions in these rows.

    Raises:
        UnknownArchitecture: The model does not call its output head.
    """
    chosen = (list(rows), list(columns))
    called = False

    def gather(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal called
        called = True
        return (args[0][chosen][None], *args[1:])

    handle = adapter.lm_head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()
    if not called:
        raise UnknownArchitecture(
            f"{type(adapter.model).__name__} does not call {type(adapter.lm_head).__name__}, which "
            "it names as its output head, so its logits cannot be told from others; load it with "
            "AutoModelForCausalLM."
        )


Site = Literal["block", "projection"]


class PrefixLayer(DynamicLayer):  # type: ignore[misc]
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


class SuffixForward:
    """The model from where a change enters, on the tokens from each row's subject on.

    Args:
        adapter: The model.
        layer: The edited block.
        rows: N rows; their subjects are aligned in column P, prefixes to the left of it (padded on the left), suffixes
            of up to S tokens from it on (padded on the right).
        site: Where the change enters: at the block's output or at its projection's.

    Attributes:
        start: (N, d) what is put out there at the subject, unchanged, float32.
    """

    def __init__(self, adapter: ModelAdapter, layer: int, rows: Sequence[Row], site: Site = "block") -> None:
        self._adapter, self._site = adapter, site
        self._module = module_at(adapter, layer, site)
        self._passed = layer + 1 if site == "block" else layer  # blocks that do not run
        self._lengths = torch.tensor([len(row.ids) - row.subject for row in rows])
        self._prefix = max(row.subject for row in rows)
        ids, mask = align(rows, self._prefix, int(self._lengths.max()))
        self._ids, self._mask = ids.to(adapter.device), mask.to(adapter.device)
        self._positions = (self._mask.cumsum(1) - 1).clamp(min=0)
        self._run_once()

    @torch.no_grad()
    def _run_once(self) -> None:
        kept: dict[str, Any] = {}
        adapter, column = self._adapter, self._prefix
        with ExitStack() as hooks:
            hooks.callback(_on_output(self._module, kept, "site").remove)
            if self._passed:
                below = adapter.block(self._passed - 1)
                hooks.callback(_on_output(below, kept, "block").remove)
            # No logits are needed here: one position through the output head instead of all.
            hooks.enter_context(head_reads(adapter, [0], [0]))
            cache = DynamicCache()
            adapter.run(
                input_ids=self._ids,
                attention_mask=self._mask,
                position_ids=self._positions,
                past_key_values=cache,
                use_cache=True,
            )
        columns = self._ids.shape[1]
        # Copies, so that the prefix's columns are freed.
        self.start = self._states(kept["site"], columns)[:, column].float().clone()
        self._hidden: Tensor | None = None
        if self._passed:
            self._returns_tuple = isinstance(kept["block"], tuple)
            self._hidden = self._states(kept["block"], columns)[:, column:].clone()
        self._kept = [
            (entry.keys[:, :, :column].clone(), entry.values[:, :, :column].clone())
            for entry in cache.layers[self._passed :]
        ]

    def _states(self, out: Any, columns: int) -> Tensor:  # (N, columns, d)
        shape = (len(self._lengths), columns)
        return token_states(out, shape, self._adapter.d, type(self._module).__name__)

    def _cache(self) -> Cache:
        # The model asks the first layer how long the past is; the passed-through layers answer with
        # a tensor of that length that has no memory behind it.
        n = len(self._lengths)
        like = self.start if self._hidden is None else self._hidden
        empty = like.new_zeros(()).expand(n, 1, self._prefix, 1)
        below = [PrefixLayer(empty, empty) for _ in range(self._passed)]
        return Cache(layers=below + [PrefixLayer(k, v) for k, v in self._kept])

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replace the blocks that do not run by pass-throughs until the block ends."""
        with ExitStack() as stack:
            for index in range(self._passed):
                last = index == self._passed - 1
                stack.enter_context(forward_as(self._adapter.block(index), self._passing(last)))
            if self._site == "projection":
                stack.callback(self._module.register_forward_hook(self._put).remove)
            yield

    def _passing(self, inject: bool) -> Any:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            out = self._entering if inject else hidden_states
            return (out,) if self._returns_tuple else out

        return forward

    def _put(self, _module: nn.Module, _args: Any, out: Any) -> Any:
        """The projection's output with that of the subjects replaced."""
        states = self._states(out, self._ids.shape[1] - self._prefix)
        changed = torch.cat([self._value.to(states)[:, None], states[:, 1:]], dim=1)
        return with_hidden(out, changed.reshape(hidden_of(out).shape))

    def logits(self, value: Tensor, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
        """Logits with what is put out at the subjects replaced.

        Args:
            value: (N, d) what is put out at the rows' subjects instead; carries gradients.
            rows: M row numbers to read.
            columns: M columns to read, counted from the row's subject.

        Returns:
            (M, vocabulary) logits, as the model's own code gives them.
        """
        self._value, self._entering = value, self._hidden
        if self._site == "block":
            assert self._hidden is not None
            changed = value.to(self._hidden)[:, None]  # (N, 1, d)
            self._entering = torch.cat([changed, self._hidden[:, 1:]], dim=1)
        with head_reads(self._adapter, rows, columns):
            out = self._adapter.run(
                input_ids=self._ids[:, self._prefix :],
                attention_mask=self._mask,
                position_ids=self._positions[:, self._prefix :],
                past_key_values=self._cache(),
                use_cache=True,
            )
        del self._value, self._entering
        logits: Tensor = out.logits[0]
        return logits

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these (numbers in the present order), and columns nobody needs then."""
        index = torch.tensor(rows)
        self._lengths = self._lengths[index]
        suffix = int(self._lengths.max())
        width = self._prefix + suffix
        select = index.to(self._ids.device)
        self._ids = self._ids[select, :width]
        self._mask = self._mask[select, :width]
        self._positions = self._positions[select, :width]
        if self._hidden is not None:
            self._hidden = self._hidden[index.to(self._hidden.device), :suffix]
        self.start = self.start[index.to(self.start.device)]
        self._kept = [(k[index.to(k.device)], v[index.to(v.device)]) for k, v in self._kept]


def module_at(adapter: ModelAdapter, layer: int, site: Site) -> nn.Module:
    """The module at whose output a change enters."""
    return adapter.block(layer) if site == "block" else adapter.projection(layer)


def align(rows: Sequence[Row], prefix: int, suffix: int) -> tuple[Tensor, Tensor]:
    """Ids and mask, (N, prefix + suffix), every subject in column `prefix`."""
    ids = torch.zeros(len(rows), prefix + suffix, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(prefix - row.subject, prefix - row.subject + len(row.ids))
        ids[number, place] = torch.tensor(row.ids)
        mask[number, place] = 1
    return ids, mask


def _on_output(module: nn.Module, kept: dict[str, Any], name: str) -> Any:
    return module.register_forward_hook(lambda _m, _a, out: kept.__setitem__(name, out))


@contextmanager
def forward_as(module: nn.Module, forward: Any) -> Iterator[None]:
    """Give a module another `forward`; one that a library set on the instance comes back after."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


class FullForward:
    """The whole model on whole rows, with the same face as `SuffixForward`.

    Args:
        adapter: The model.
        layer: The edited block.
        rows: N rows.
        site: Where the change enters: at the block's output or at its projection's.
        alone: Run rows one by one, without padding.

    Attributes:
        start: (N, d) what is put out there at the subject, unchanged, float32.
    """

    def __init__(
        self, adapter: ModelAdapter, layer: int, rows: Sequence[Row], site: Site = "block", *, alone: bool = False
    ) -> None:
        self._adapter, self._alone = adapter, alone
        self._module = module_at(adapter, layer, site)
        self._rows = list(rows)
        starts: list[Tensor] = []

        def read(_module: nn.Module, _args: Any, out: Any) -> None:
            states = self._states(out, group)
            places = [row.subject for row in group]
            starts.append(states[torch.arange(len(group)), places].float())

        handle = self._module.register_forward_hook(read)
        try:
            for group in [[row] for row in rows] if alone else [self._rows]:
                with torch.no_grad():
                    self._run(group, [0], [0])
        finally:
            handle.remove()
        self.start = torch.cat(starts)

    def _states(self, out: Any, group: Sequence[Row]) -> Tensor:  # (n, L, d)
        shape = (len(group), max(len(row.ids) for row in group))
        return token_states(out, shape, self._adapter.d, type(self._module).__name__)

    def _run(self, group: Sequence[Row], rows: Sequence[int], columns: Sequence[int]) -> Tensor:
        batch = pad_batch([row.ids for row in group], device=self._adapter.device)
        with head_reads(self._adapter, rows, columns):
            logits: Tensor = self._adapter.run(**batch, use_cache=False).logits[0]
        return logits

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Nothing is replaced for longer than one `logits`; see `SuffixForward.installed`."""
        yield

    def logits(self, value: Tensor, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
        """Logits with what is put out at the subjects replaced; see `SuffixForward.logits`."""
        if not self._alone:
            return self._changed(self._rows, value, rows, columns)
        found: dict[int, Tensor] = {}
        for number in sorted(set(rows)):
            reads = [place for place, row in enumerate(rows) if row == number]
            where = [columns[place] for place in reads]
            one = self._rows[number : number + 1]
            logits = self._changed(one, value[number : number + 1], [0] * len(reads), where)
            found.update(zip(reads, logits, strict=True))
        return torch.stack([found[place] for place in range(len(rows))])

    def _changed(self, group: Sequence[Row], value: Tensor, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
        subjects = torch.tensor([row.subject for row in group])

        def put(_module: nn.Module, _args: Any, out: Any) -> Any:
            states = self._states(out, group)
            here = torch.arange(states.shape[1]) == subjects[:, None]  # (n, L)
            here = here.to(states.device)[..., None]  # (n, L, 1)
            changed = torch.where(here, value.to(states)[:, None], states)
            return with_hidden(out, changed.reshape(hidden_of(out).shape))

        handle = self._module.register_forward_hook(put)
        try:
            absolute = [group[row].subject + column for row, column in zip(rows, columns, strict=True)]
            return self._run(group, rows, absolute)
        finally:
            handle.remove()

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these (numbers in the present order)."""
        self._rows = [self._rows[number] for number in rows]
        self.start = self.start[torch.tensor(rows, device=self.start.device)]


def forward_for(adapter: ModelAdapter, layer: int, rows: Sequence[Row], site: Site) -> SuffixForward | FullForward:
    """The fastest forward of these rows that agrees with the whole model on one row alone.

    The row that would be padded most is compared, with another vector than its own put in.  What
    does not agree for one group is not tried again for this layer.

    Args:
        adapter: The model, in evaluation mode.
        layer: The edited block.
        rows: N rows.
        site: Where the change enters.

    Raises:
        UnknownArchitecture: What is put out there is not one vector a token.
    """
    number = min(range(len(rows)), key=lambda i: (rows[i].subject, len(rows[i].ids)))
    columns = range(len(rows[number].ids) - rows[number].subject)
    start, value, want = _changed_alone(adapter, layer, rows[number], site)
    excluded = adapter.measured.setdefault(("targets", layer, site), set())
    for form in (SuffixForward, FullForward):
        if form in excluded:
            continue
        try:
            forward: SuffixForward | FullForward = form(adapter, layer, rows, site)
            others = forward.start.clone()
            others[number] = value[0]
            with forward.installed(), torch.no_grad():
                got = forward.logits(others, [number] * len(columns), columns)
            off = max(difference(got, want), difference(forward.start[number : number + 1], start))
            if off <= tolerance(adapter.model):
                return forward
            why = f"is off by {off:.1%}"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # what a model makes of a cache or of padding is its own affair
            why = f"fails ({type(error).__name__}: {str(error)[:200]})"
        excluded.add(form)
        part, instead = _WORDS[form]
        said = adapter.measured.setdefault("said of targets", set())
        log.log(
            logging.DEBUG if form in said else logging.WARNING,
            "%s: targets run %s, which takes longer, because %s %s (layer %d).",
            type(adapter.model).__name__, instead, part, why, layer,
        )  # fmt: skip
        said.add(form)
    return FullForward(adapter, layer, rows, site, alone=True)


@torch.no_grad()
def _changed_alone(adapter: ModelAdapter, layer: int, row: Row, site: Site) -> tuple[Tensor, Tensor, Tensor]:
    """One row through the whole model, with another vector put in.

    Returns:
        What is put out at the subject (1, d), what is put in instead (1, d), and the logits from the subject on.
    """
    module, length = module_at(adapter, layer, site), len(row.ids)
    seen: list[Tensor] = []

    def put(_module: nn.Module, _args: Any, out: Any) -> Any:
        states = token_states(out, (1, length), adapter.d, type(module).__name__).clone()
        start = states[:, row.subject].float()
        seen[:] = start.clone(), start + start.roll(1, -1) / 2
        states[:, row.subject] = seen[1].to(states)
        return with_hidden(out, states.reshape(hidden_of(out).shape))

    handle = module.register_forward_hook(put)
    try:
        with head_reads(adapter, [0] * (length - row.subject), range(row.subject, length)):
            logits: Tensor = adapter.run(**pad_batch([row.ids], device=adapter.device), use_cache=False).logits[0]
    finally:
        handle.remove()
    return seen[0], seen[1], logits


_WORDS: dict[type, tuple[str, str]] = {
    SuffixForward: ("a forward of the upper blocks and later tokens alone", "whole rows"),
    FullForward: ("a batch of padded rows", "one row at a time"),
}


@isolated()
def check_targets(adapter: ModelAdapter, layers: Sequence[int]) -> None:
    """Refuse a model whose targets cannot be computed, before anything is paid for statistics.

    A few tokens run at each kind of block among these layers.

    Args:
        adapter: The model.
        layers: The layers that may be edited.

    Raises:
        UnknownArchitecture: The model is not causal, changes its own weights, or no change can enter at such a block.
    """
    adapter.check_constant()
    adapter.check_causal()
    kinds = {_layout(adapter.block(layer)): layer for layer in sorted(layers)}
    with evaluation_mode(adapter.model):
        for layer in kinds.values():
            what = ("can be changed", adapter.template, layer)
            remembered(adapter.model, what, partial(_try_out, adapter, layer), weights=True)


def _try_out(adapter: ModelAdapter, layer: int) -> None:
    why = _refusal(adapter, layer, "block")
    if why is not None:
        if _refusal(adapter, layer, "projection") is not None:
            raise why
        log.warning("%s Only method rome can edit this layer.", why)


def _layout(block: nn.Module) -> tuple[tuple[str, type], ...]:
    return tuple((name, type(module)) for name, module in block.named_modules())


def _refusal(adapter: ModelAdapter, layer: int, site: Site) -> UnknownArchitecture | None:
    """Why no change can enter at a layer, or None."""
    ids = probe_ids(adapter.model)
    rows = [Row(ids, len(ids) // 2), Row(ids[: len(ids) // 2], 1)]
    what = f"A change of what the {site} of layer {layer} of {type(adapter.model).__name__} puts out"
    try:
        forward = forward_for(adapter, layer, rows, site)
        value = forward.start.clone().requires_grad_(True)
        with forward.installed(), torch.enable_grad():
            logits = forward.logits(value, [0, 1], [0, 0])
            (gradient,) = torch.autograd.grad(logits.float().square().sum(), value)
        if bool((gradient == 0).all()):
            return UnknownArchitecture(f"{what} does not reach the logits; edit another model.")
    except UnknownArchitecture as error:
        return error
    except (FastmemitError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {str(error)[:200]}"
        found = UnknownArchitecture(f"{what} cannot be tried out ({why}); edit another model.")
        found.__cause__ = error
        return found
    return None
