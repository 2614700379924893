"""The keys of earlier edits, preserved beside those of the corpus (sequential MEMIT).

A batch that is written after others must not undo them: ``A = w C + ridge I + sum K_p K_p^T`` over the keys of the
earlier edits, layer by layer, as they were when each batch was written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fastcov import CholeskyFactor
from fastcov.factor import updated
from fastmemit.applied import Edit

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
            fastcov.WrongWidth: Keys are of another width than A.
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
