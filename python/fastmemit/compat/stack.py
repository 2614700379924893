"""What is in the weights of a model that other code edits too, read off the weights."""

from __future__ import annotations

from torch import nn

from fastmemit.applied import Edit, EditStack
from fastmemit.delta import Delta
from fastmemit.models import fingerprint


class Unknown(Delta):
    """What others have written into the weights."""

    def digest(self) -> str:
        """What the weights are with it."""
        return f"unknown:{self.provenance['weights']}"


class LiveStack(EditStack):
    """The edits in a model that others edit too.

    Args:
        model: The model.
        baseline: The fingerprint of the unedited model; None takes the model as it is for unedited.
    """

    def __init__(self, model: nn.Module, baseline: str | None) -> None:
        super().__init__(model)
        self._now = fingerprint(model)
        self._looked = True  # so that what was just looked at is not looked at again
        self._fingerprint = baseline or self._now

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the model when it was first seen."""
        assert self._fingerprint is not None
        return self._fingerprint

    def changed(self) -> list[str]:
        """Nothing: whatever changes the weights is an edit here."""
        return []

    def look(self) -> None:
        """See what is in the weights now."""
        if not self._looked:
            self._now = fingerprint(self._model)
        self._looked = False

    @property
    def edits(self) -> tuple[Edit, ...]:
        """Nothing if the weights are the unedited ones, else whatever it is that is in them."""
        if self._now == self.fingerprint:
            return ()
        return (Edit(Unknown({}, {"weights": self._now}), self),)

    def digests(self) -> list[str]:
        """What the weights are with what is in them, if anything is."""
        return [edit.delta.digest() for edit in self.edits]

    def state(self) -> str:
        """What identifies the weights as they were when last looked at."""
        return self._now
