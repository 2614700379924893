"""What a batch shows at its subjects, layer by layer from the lowest edited one up.

Two passes over the model: the bare prompts, as far up as the last edited block, and the other
contexts, up to the edited projection.  What enters an edited block is kept, so that the next layer
is read without running again what lies below and has not changed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastmemit.activations import SubjectPass
from fastmemit.models import ModelAdapter
from fastmemit.request import EditRequest
from fastmemit.targets.rows import subject_row


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
        return _bytes(self.keys, self.outputs, self.block) + sum(p.nbytes for p in self.passes)


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
        return _bytes(self.keys, self.outputs)


_Read = TypeVar("_Read", Reading, ContextReading)


class ReadCache:
    """What the unedited model shows, kept over several plans.

    What a method reads before it has written anything depends on the weights and the requests, not
    on the statistics: all that EMMET reads, MEMIT's first layer, ROME's first fact.  A sweep over
    multipliers that hands the same cache to each `fastmemit.Editor.plan` or `edit` reads it once,
    and gets the same bits.  Nothing of an edited model is kept.

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
        """Run as far as this layer needs.

        Args:
            layer: The layer to edit next.  Nothing below it may have changed since it was read.
            last: The last edited layer, at or above `layer`.
        """
        if not self._passes:
            self._passes = tuple(self._begin())
        adapter, projection = self._adapter, self._adapter.projection(layer)
        keep = layer if layer < last else 0
        # Of one module the input comes before its output, and the block's output last of all.
        keys, (out, block), bare = self._passes[0].read(
            adapter, inputs=[projection], outputs=[projection, adapter.block(last)], keep=keep
        )
        passes = [bare]
        read = [keys[0].double()[:, None]]  # (B, 1, d_k)
        for others in self._passes[1:]:
            keys, _, after = others.read(adapter, inputs=[projection], keep=keep)
            read.append(keys[0].double().reshape(len(self._requests), len(self._contexts) - 1, -1))
            passes.append(after)
        return Reading(torch.cat(read, 1), out.double(), block.double(), tuple(passes))

    def _begin(self) -> list[SubjectPass]:
        rows = [
            [subject_row(self._tokenizer, context, request) for context in self._contexts] for request in self._requests
        ]
        passes = [SubjectPass.of(self._adapter, [row[0] for row in rows])]
        if len(self._contexts) > 1:
            others = [each for row in rows for each in row[1:]]
            passes.append(SubjectPass.of(self._adapter, others))
        return passes


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
