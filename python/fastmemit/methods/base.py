"""What every method shares: keys at the subject, trial writes, the way from requests to factors.

A method computes on the model itself, because MEMIT's upper layers must see its lower ones and
ROME's later facts its earlier ones written.  All of that happens inside `Workspace.plan`, which
gives the weights their bits back whatever happens: nothing is applied before all is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fastcov import CholeskyFactor, LowRank, NullSpace
from fastcov.linalg import updated
from fastmemit.activations import ContextReading, ReadCache, Reading, Subjects, read_at_subject
from fastmemit.delta import add_low_rank, restore
from fastmemit.edits import Edit, EditStack, Writing
from fastmemit.methods.config import Config
from fastmemit.models import ModelAdapter
from fastmemit.request import EditRequest, check_batch
from fastmemit.targets import Target
from fastmemit.tokens import subject_row

Blocks = tuple[Tensor, ...]


@dataclass(frozen=True)
class _Held:
    """The last factor that was made for a layer, and what it was made of."""

    base: CholeskyFactor
    blocks: Blocks
    factor: CholeskyFactor


class PreservedKeys:
    """Edit keys by the edit and layer that they were written for.

    Hand it to `fastmemit.Editor.edit`, which preserves the keys that are in it and adds those of
    the new edit.  The keys of an edit count while the edit is in the weights: an undo takes them
    out, and applying the edit again brings them back.  Edits from a file hold no keys.
    """

    def __init__(self) -> None:
        # An edit that is undone and forgotten takes its keys with it.
        self._keys: WeakKeyDictionary[Edit, Mapping[int, Blocks]] = WeakKeyDictionary()
        self._held: dict[int, _Held] = {}

    def add(self, edit: Edit, keys: Mapping[int, Sequence[Tensor]]) -> None:
        """Preserve the keys of an edit.

        Args:
            edit: The edit.
            keys: Layer -> blocks K (d_k, B), float64, in the order in which they were written.
        """
        self._keys[edit] = {layer: tuple(blocks) for layer, blocks in keys.items()}

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The edits whose keys count now, in the order in which they were added."""
        return tuple(edit for edit in self._keys if edit.applied)

    def blocks(self, layer: int) -> Blocks:
        """What counts now at a layer: blocks K (d_k, B) in the order in which they were added."""
        return tuple(k for edit in self.edits for k in self._keys[edit].get(layer, ()))

    def __len__(self) -> int:
        """How many keys count now, at the layer that has most."""
        layers = {layer for edit in self.edits for layer in self._keys[edit]}
        return max((sum(k.shape[1] for k in self.blocks(layer)) for layer in layers), default=0)

    def factor(self, layer: int, base: CholeskyFactor, written: Sequence[Tensor] = ()) -> CholeskyFactor:
        """The factor of ``A + sum K_p K_p^T`` of a layer.

        Only what is new since the last call is worked in, as long as A is the same.

        Args:
            layer: The layer.
            base: The factor of A.
            written: Further keys (d_k, B): of facts that the present batch has written already.

        Raises:
            fastcov.BadInput: Keys are of another width than A.
        """
        blocks = (*self.blocks(layer), *written)
        if not blocks:
            self._held.pop(layer, None)
            return base
        held = self._held.get(layer)
        known = len(held.blocks) if held is not None else 0
        same = held is not None and held.base is base and len(blocks) >= known
        if held is None or not (same and all(map(_is, held.blocks, blocks))):
            held, known = _Held(base, (), base), 0
        if len(blocks) > known:
            new = torch.cat([block.to(base.device) for block in blocks[known:]], 1)
            held = _Held(base, blocks, updated(held.factor, new))
        self._held[layer] = held
        return held.factor


def _is(one: Tensor, other: Tensor) -> bool:
    return one is other


Factors = dict[str, tuple[Tensor, Tensor]]
EditKeys = dict[int, list[Tensor]]  # layer -> keys (d_k, B), float64, block by block


@dataclass
class Workspace(Generic[Config]):
    """What a method works with while it plans one batch.

    Attributes:
        adapter: The model.
        tokenizer: Its tokenizer.
        config: The settings.
        contexts: Texts before the prompts, the first one ``""``.
        factor: Layer -> Cholesky factor of ``w C + ridge I``.
        null_space: Layer -> the null space of C, for AlphaEdit.
        targets: Requests -> target vectors on the model as it is now; the flag says whether it is still the model that
            the batch began with, so that stored vectors may serve.
        stack: The edits in the weights, which gives weights their bits back.
        preserved: Keys of earlier edits, which are preserved too.
        reads: Where readings of the unedited model are kept; None for a model that is edited.
        state: What identifies the weights that the batch begins with, for `reads`.
        factors: What has been written so far, by weight name, in the weights' own orientation.
        keys: The keys of what has been written so far, by layer.
    """

    adapter: ModelAdapter
    tokenizer: Any
    config: Config
    contexts: tuple[str, ...]
    factor: Callable[[int], CholeskyFactor]
    null_space: Callable[[int], NullSpace]
    targets: Callable[[Sequence[EditRequest], bool], list[Target]]
    stack: EditStack
    preserved: PreservedKeys | None = None
    reads: ReadCache | None = None
    state: str = ""
    factors: Factors = field(default_factory=dict)
    keys: EditKeys = field(default_factory=dict)
    _trial: Writing | None = None

    def solver(self, layer: int) -> CholeskyFactor:
        """The factor of all that a layer shall preserve.

        ``w C + ridge I``, and with `preserved` also ``K_p K_p^T`` of every edit in it and of the facts that this batch
        has written into the layer already.
        """
        base = self.factor(layer)
        if self.preserved is None:
            return base
        return self.preserved.factor(layer, base, self.keys.get(layer, ()))

    def earlier_keys(self, layer: int) -> tuple[Tensor, ...]:
        """The preserved keys (d_k, B): of earlier edits, and what this one has written there."""
        if self.preserved is None:
            return ()
        return (*self.preserved.blocks(layer), *self.keys.get(layer, ()))

    def write(self, layer: int, change: LowRank, keys: Tensor) -> None:
        """Add a change (d, d_k) to a layer's weight; it and its keys (d_k, B) are kept."""
        self.keys.setdefault(layer, []).append(keys)
        left, right = (t.to("cpu", torch.float32) for t in (change.left, change.right))
        if self.adapter.weight_is_transposed(layer):
            left, right = right, left
        name = self.adapter.weight_name(layer)
        if name in self.factors:
            old_left, old_right = self.factors[name]
            left, right = torch.cat([old_left, left], 1), torch.cat([old_right, right], 1)
        self.factors[name] = (left.contiguous(), right.contiguous())
        # From the unedited weight in one step, as the delta will be applied.
        assert self._trial is not None
        weight = self._stored_weight(layer)
        restore([weight], [self._trial.before(name)])
        add_low_rank(weight, *self.factors[name])

    def plan(self, method: Callable[[Workspace, list[EditRequest]], None], requests: Sequence[EditRequest]) -> Factors:
        """Run a method and leave the weights as they were.

        Raises:
            BadRequest: There are no requests, or two of them contradict each other.
        """
        batch = check_batch(requests)
        self.factors, self.keys = {}, {}
        self._trial = self.stack.trial(map(self.adapter.weight_name, self.config.layers))
        with self._trial, self._trial:
            method(self, batch)
        return self.factors

    def _stored_weight(self, layer: int) -> Tensor:
        """The weight as the model stores it, (d, d_k) or transposed; writing to it is editing."""
        weight = self.adapter.weight(layer)
        return weight.T if self.adapter.weight_is_transposed(layer) else weight

    # -- what methods read from the model ---------------------------------------------------------

    def subjects(self, requests: Sequence[EditRequest]) -> Subjects:
        """A batch to be read at one layer after the other; see `read`."""
        return Subjects(self.adapter, self.tokenizer, requests, self.contexts)

    def read(self, subjects: Subjects, layer: int) -> Reading:
        """What a batch shows at a layer, with what has been written so far below it.

        Layers are read in ascending order.
        """
        last = self.config.layers[-1]
        make = partial(subjects.read, layer, last)
        if self.reads is None or self.factors:
            reading = make()
        else:
            reading = self.reads.get((self.state, subjects.key(layer, last)), make)
        subjects.resume(reading)
        return reading

    def context_outputs(self, layer: int, requests: Sequence[EditRequest]) -> ContextReading:
        """Keys and the projection's outputs in every context, with what has been written so far."""
        make = partial(self._context_outputs, layer, requests)
        if self.reads is None or self.factors:
            return make()
        return self.reads.get((self.state, tuple(requests), self.contexts, layer), make)

    def _context_outputs(self, layer: int, requests: Sequence[EditRequest]) -> ContextReading:
        rows = [subject_row(self.tokenizer, context, request) for request in requests for context in self.contexts]
        module = self.adapter.projection(layer)
        (keys,), (outputs,) = read_at_subject(self.adapter, rows, inputs=[module], outputs=[module])
        shape = (len(requests), len(self.contexts), -1)
        return ContextReading(keys.double().reshape(shape), outputs.double().reshape(shape))


def averaged_keys(keys: Tensor) -> Tensor:
    """Half the bare prompt's key, half the mean of the other contexts' (MEMIT, equation 19).

    Args:
        keys: (B, contexts, d_k), the bare prompt first.

    Returns:
        K (d_k, B).
    """
    bare = keys[:, 0]
    if keys.shape[1] == 1:
        return bare.T
    return (0.5 * bare + 0.5 * keys[:, 1:].mean(1)).T


Solve = Callable[[int, Tensor, Tensor], LowRank]  # layer, K (d_k, B), R (d, B)


def write_layers(work: Workspace, requests: list[EditRequest], solve: Solve) -> None:
    """Write a batch into ``config.layers``, each layer a share of what is still missing.

    For each layer the activations are read afresh, after the layers below it were written.

    Args:
        work: The workspace.
        requests: The facts.
        solve: Makes the change of a layer from the keys and the residuals there.
    """
    adapter, layers = work.adapter, work.config.layers
    goal = torch.stack([t.vector for t in work.targets(requests, True)]).double()  # (B, d)
    subjects = work.subjects(requests)
    for position, layer in enumerate(layers):
        read = work.read(subjects, layer)
        keys = averaged_keys(read.keys)  # (d_k, B)
        missing = goal.to(read.block.device) - read.block
        missing = missing / share(work.config.spread, len(layers) - position)
        # The last edited block may be on another device than this layer, its norm and its factor.
        missing = missing.to(read.outputs.device)
        residual = adapter.projection_residual(layer, read.outputs, missing, subjects.bare_ids)
        work.write(layer, solve(layer, keys, residual.T), keys)


def share(spread: str, left: int) -> float:
    """By what a layer divides the residual while so many layers are left, itself among them.

    ``"linear"``: by their number, L - i (MEMIT); ``"sqrt"``: by its square root (PMET).
    """
    return math.sqrt(left) if spread == "sqrt" else left
