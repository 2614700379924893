"""The errors of fastmemit: one type for each thing that a caller may want to tell apart."""

from __future__ import annotations


class FastmemitError(Exception):
    """Base of every error that fastmemit raises on purpose.

    Its message may quote a file; control characters in it are spelled out.
    """

    def __init__(self, message: str = "") -> None:
        from fastcov.errors import printable  # loads torch, which --help need not wait for

        super().__init__(printable(message))


class BadRequest(FastmemitError, ValueError):
    """An edit request that cannot be carried out as it is written."""


class DuplicateRequest(BadRequest):
    """Two requests of one batch edit the same subject in the same prompt."""


class ConflictingEdits(BadRequest):
    """Two saved edits that shall be put together write the same fact."""


class MissedFacts(FastmemitError):
    """An edit after which the model does not say all of its facts, though that was asked for."""


class BadAdapter(FastmemitError, ValueError):
    """An adapter that is no change of plain weights, or an edit that no adapter can hold."""


class HubError(FastmemitError):
    """Something that the hub refused, does not have, or cannot be asked for now."""


class BadData(FastmemitError, ValueError):
    """A malformed record; the message names its index and the field."""


class BadCorpus(FastmemitError, ValueError):
    """A corpus that cannot be read as text."""


class UnknownArchitecture(FastmemitError):
    """The part of a model that would be edited cannot be told from its structure."""


class QuantisedWeight(FastmemitError):
    """A weight that is not stored in floating point and so cannot take an edit."""


class InferenceWeight(FastmemitError):
    """A weight that was made under inference mode, which torch lets nobody write to elsewhere."""


class OffloadedWeight(FastmemitError):
    """A weight that is not in memory, as offloading leaves it."""


class BadLayer(FastmemitError, ValueError):
    """A layer that the model does not have."""


class BadConfig(FastmemitError, ValueError):
    """A setting with a name or a value that makes no sense."""


class ModelNotFound(FastmemitError):
    """A model name that leads to no model that can be loaded."""


class WrongModel(FastmemitError):
    """An edit or a statistic that was made for another model."""


class NonFiniteEdit(FastmemitError, ValueError):
    """An edit with NaN or infinity, or one after which a weight would hold them."""


class BadUndo(FastmemitError):
    """An undo that would not restore the weights as they were."""


class DamagedFile(FastmemitError):
    """A file that is cut short, altered or of another format."""
