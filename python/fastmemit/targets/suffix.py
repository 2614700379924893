"""Run only what a target's change can reach: blocks above the edited one, tokens from the subject.

The change enters at the output of one block, at the subject's last token.  Blocks up to that one
and tokens before that one never see it, so both run once: the hidden states that leave the edited
block and the attention keys and values of the earlier tokens are kept, and each step of the
optimisation feeds them to the model's own code.  No architecture is written twice: the blocks up to
the edited one are replaced by pass-throughs for the time of a step, and the kept keys and values
are given to the model as a cache that hands them out and never grows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from fastmemit.logits import head_reads
from fastmemit.models import ModelAdapter, hidden_of
from fastmemit.targets.rows import Row


class PrefixLayer(DynamicLayer):  # type: ignore[misc]
    """Constant keys and values (n, heads, P, width) in front of whatever a step brings."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The prefix and the new states, joined; nothing is remembered."""
        keys = torch.cat([self.keys, key_states], dim=-2)
        return keys, torch.cat([self.values, value_states], dim=-2)


class SuffixForward:
    """The model above block `layer` on the tokens from each row's subject on.

    Args:
        adapter: The model.
        layer: The block at whose output the change enters.
        rows: N rows; their subjects are aligned in column P, prefixes to the left of it (padded on
            the left), suffixes of up to S tokens from it on (padded on the right).
        capture_projection: Also keep the edited projection's output at the subject (for ROME).

    Attributes:
        subject_hidden: (N, d) what leaves block `layer` at the subject, float32.
        subject_projection: (N, d) what leaves its projection there, float32, or None.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        layer: int,
        rows: Sequence[Row],
        *,
        capture_projection: bool = False,
    ) -> None:
        self._adapter, self._layer = adapter, layer
        self._lengths = torch.tensor([len(row.ids) - row.subject for row in rows])
        self._prefix = max(row.subject for row in rows)
        ids, mask = align(rows, self._prefix, int(self._lengths.max()))
        self._ids, self._mask = ids.to(adapter.device), mask.to(adapter.device)
        self._positions = (self._mask.cumsum(1) - 1).clamp(min=0)
        self.subject_projection: Tensor | None = None
        self._run_once(capture_projection)

    @torch.no_grad()
    def _run_once(self, capture_projection: bool) -> None:
        kept: dict[str, Any] = {}
        adapter, layer = self._adapter, self._layer
        with ExitStack() as hooks:
            hooks.callback(_on_output(adapter.block(layer), kept, "block").remove)
            if capture_projection:
                hooks.callback(_on_output(adapter.projection(layer), kept, "projection").remove)
            # No logits are needed here: one position through the output head instead of all.
            hooks.enter_context(head_reads(adapter, [0], [0]))
            cache = DynamicCache()
            adapter.model(
                input_ids=self._ids,
                attention_mask=self._mask,
                position_ids=self._positions,
                past_key_values=cache,
                use_cache=True,
            )
        column = self._prefix
        self._returns_tuple = isinstance(kept["block"], tuple)
        # A copy, so that the prefix's columns are freed.
        self._hidden = hidden_of(kept["block"])[:, column:].clone()
        self.subject_hidden = self._hidden[:, 0].float()
        if capture_projection:
            # Some blocks flatten their tokens before the projection: (N * L, d).
            out = hidden_of(kept["projection"]).reshape(*self._ids.shape, -1)
            self.subject_projection = out[:, column].float()
        self._kept = [
            (entry.keys[:, :, :column].clone(), entry.values[:, :, :column].clone())
            for entry in cache.layers[layer + 1 :]
        ]

    def _cache(self) -> Cache:
        # The model asks the first layer how long the past is; the passed-through layers answer with
        # a tensor of that length that has no memory behind it.
        n = len(self._lengths)
        empty = self._hidden.new_zeros(()).expand(n, 1, self._prefix, 1)
        below = [PrefixLayer(empty, empty) for _ in range(self._layer + 1)]
        return Cache(layers=below + [PrefixLayer(k, v) for k, v in self._kept])

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replace the blocks up to the edited one by pass-throughs until the block ends."""
        with ExitStack() as stack:
            for index in range(self._layer + 1):
                inject = index == self._layer
                stack.enter_context(forward_as(self._adapter.block(index), self._passing(inject)))
            yield

    def _passing(self, inject: bool) -> Any:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            out = self._injected if inject else hidden_states
            return (out,) if self._returns_tuple else out

        return forward

    def logits(self, subject_hidden: Tensor, rows: list[int], columns: list[int]) -> Tensor:
        """Logits with the edited block's output at the subjects replaced.

        Args:
            subject_hidden: (N, d) the new hidden states at the rows' subjects; carries gradients.
            rows: M row numbers to read.
            columns: M columns to read, counted from the row's subject.

        Returns:
            (M, vocabulary) logits, as the model's own code gives them.
        """
        changed = subject_hidden.to(self._hidden)[:, None]  # (N, 1, d)
        self._injected = torch.cat([changed, self._hidden[:, 1:]], dim=1)
        with head_reads(self._adapter, rows, columns):
            out = self._adapter.model(
                input_ids=self._ids[:, self._prefix :],
                attention_mask=self._mask,
                position_ids=self._positions[:, self._prefix :],
                past_key_values=self._cache(),
                use_cache=True,
            )
        del self._injected
        return out.logits[0]

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
        self._hidden = self._hidden[index.to(self._hidden.device), :suffix]
        self.subject_hidden = self.subject_hidden[index.to(self.subject_hidden.device)]
        if self.subject_projection is not None:
            here = index.to(self.subject_projection.device)
            self.subject_projection = self.subject_projection[here]
        self._kept = [(k[index.to(k.device)], v[index.to(v.device)]) for k, v in self._kept]


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
