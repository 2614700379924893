"""Edits on a model: applied, undone bit for bit, and refused where an undo would not be one."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from torch import Tensor, nn

from fastmemit.delta import Delta, restore
from fastmemit.errors import BadUndo, WrongModel
from fastmemit.models import checksum, fingerprint
from fastmemit.outcomes import Outcome


class Edit:
    """One edit of one model: a delta, and whether it is in the weights now.

    Made by `fastmemit.Editor`; a file of it holds the delta alone.

    Attributes:
        delta: What it adds to the weights.
        outcomes: What became of each fact when the edit was made, in their order; empty where the
            model was not asked, as for an edit from a file.
    """

    def __init__(self, delta: Delta, stack: EditStack) -> None:
        self.delta = delta
        self.outcomes: tuple[Outcome, ...] = ()
        self._stack = stack

    @property
    def applied(self) -> bool:
        """Whether the edit is in the weights now."""
        return self._stack.holds(self)

    def apply(self) -> Edit:
        """Put the edit into the weights.

        Raises:
            BadUndo: It is in them already.
            WrongModel: The model lacks a weight, or has it in another shape.
            QuantisedWeight: A weight is not stored in floating point.
            OffloadedWeight: A weight is not in memory.
        """
        self._stack.push(self)
        return self

    def undo(self) -> None:
        """Give the weights the bits that they had before this edit.

        Raises:
            BadUndo: The edit is not applied; a later edit of the same weights still is; or
                something else has changed the weights since.
        """
        self._stack.pop(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the delta to a safetensors file.

        Raises:
            OSError: The file cannot be written; a former file stays as it was.
        """
        self.delta.save(path)

    def __repr__(self) -> str:
        method = self.delta.provenance.get("method", "unknown method")
        state = "applied" if self.applied else "not applied"
        said = f", {sum(o.said for o in self.outcomes)} of them said" if self.outcomes else ""
        return f"<Edit: {len(self.delta.requests)} facts by {method!s:.20}{said}, {state}>"


@dataclass
class _Layer:
    """An applied edit, the bits that it covers, and what the weights are with it on them."""

    edit: Edit
    before: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, str] = field(default_factory=dict)


class EditStack:
    """The edits that are in a model's weights, in the order in which they came.

    Edits of the same weight are undone last first: a later one was computed on, and rounded onto,
    what the earlier ones left.  Edits that share no weight can be undone in any order.

    Args:
        model: The model whose weights are edited.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._layers: list[_Layer] = []
        self._fingerprint: str | None = None

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the model without any edit of this stack.

        Raises:
            WrongModel: It was never taken and edits are applied now.
        """
        if self._fingerprint is None:
            if self._layers:
                raise WrongModel("The model was edited before it was identified; undo all edits.")
            self._fingerprint = fingerprint(self._model)
        return self._fingerprint

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The applied edits, oldest first."""
        return tuple(layer.edit for layer in self._layers)

    def holds(self, edit: Edit) -> bool:
        """Whether an edit is applied."""
        return any(layer.edit is edit for layer in self._layers)

    def check(self, edit: Edit) -> None:
        """Refuse an edit of another model's stack.

        Raises:
            WrongModel: It is one.
        """
        if edit._stack is not self:
            raise WrongModel(
                f"{edit!r} belongs to another editor; save it there and load it with this one."
            )

    def state(self) -> str:
        """What identifies the weights as they are now: the model, then the edits on it."""
        return "+".join([self.fingerprint, *(layer.edit.delta.digest() for layer in self._layers)])

    def push(self, edit: Edit) -> None:
        """Apply an edit; see `Edit.apply`."""
        if self.holds(edit):
            raise BadUndo(f"{edit!r} is in the weights already; undo it before applying it again.")
        _ = self.fingerprint  # taken while the weights are still the model's own
        edit.delta.check(self._model)
        weights = self._weights(edit)
        layer = _Layer(edit, {name: weight.clone() for name, weight in weights.items()})
        edit.delta.add_to(self._model)
        layer.after = {name: checksum(weight) for name, weight in weights.items()}
        self._layers.append(layer)

    def pop(self, edit: Edit) -> None:
        """Undo an edit; see `Edit.undo`."""
        if not self.holds(edit):
            raise BadUndo(f"{edit!r} cannot be undone, because it is not in the weights.")
        place = next(i for i, layer in enumerate(self._layers) if layer.edit is edit)
        layer = self._layers[place]
        for later in self._layers[place + 1 :]:
            shared = sorted(layer.before.keys() & later.before.keys())
            if shared:
                raise BadUndo(
                    f"{edit!r} cannot be undone while the later {later.edit!r} lies on it in "
                    f"{shared[0]}; undo the later one first."
                )
        weights = self._weights(edit)
        for name, weight in weights.items():
            if checksum(weight) != layer.after[name]:
                raise BadUndo(
                    f"{name} was changed by something else since {edit!r} was applied, so undoing "
                    "it would destroy that change; load the model again to be rid of both."
                )
        restore(list(weights.values()), [layer.before[name] for name in weights])
        del self._layers[place]

    def _weights(self, edit: Edit) -> dict[str, Tensor]:
        named = dict(self._model.named_parameters(remove_duplicate=False))
        return {name: named[name].detach() for name in edit.delta.factors}
