"""The forward that targets are optimised on: the short one where it agrees with the whole model.

`SuffixForward` runs part of the model, from kept attention keys and values.  Models keep more than
these: states of convolutions and recurrences, keys and values that upper layers borrow from lower
ones, positions that count padding.  So one row of every group is run through the whole model as
well, alone and changed in the same way, and where the two differ by more than rounding the targets run whole rows
(`FullForward`), in one batch or one by one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastcov.hooks import evaluation_mode, isolated
from fastmemit.errors import FastmemitError, UnknownArchitecture
from fastmemit.logits import head_reads
from fastmemit.models import ModelAdapter, hidden_of, probe_ids, token_states, with_hidden
from fastmemit.models.running import difference, tolerance
from fastmemit.targets.rows import Row
from fastmemit.targets.suffix import Site, SuffixForward, module_at
from fastmemit.tokens import pad_batch

log = logging.getLogger(__name__)


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
    alone = FullForward(adapter, layer, rows[number : number + 1], site, alone=True)
    columns = range(len(rows[number].ids) - rows[number].subject)
    value = alone.start + alone.start.roll(1, -1) / 2
    with torch.no_grad():
        want = alone.logits(value, [0] * len(columns), columns)
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
            off = max(difference(got, want), difference(forward.start[number : number + 1], alone.start))
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
            if ("can be changed", layer) in adapter.measured:
                continue
            why = _refusal(adapter, layer, "block")
            if why is not None:
                if _refusal(adapter, layer, "projection") is not None:
                    raise why
                log.warning("%s Only method rome can edit this layer.", why)
            adapter.measured["can be changed", layer] = True


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
