"""The errors of fastmemit: one type for each thing that a caller may want to tell apart."""

from __future__ import annotations


def counted(number: int, one: str, many: str = "") -> str:
    """A number and what it is of: ``"1 fact"``, ``"2 facts"``, or `many` where a plural takes more than an s."""
    return f"{number} {one if number == 1 else many or one + 's'}"


class FastmemitError(Exception):
    """Base of every error that fastmemit raises on purpose.

    Its message may quote a file; control characters in it are spelled out.
    """

    def __init__(self, message: str = "") -> None:
        from fastcov.files import printable  # loads torch, which --help need not wait for

        super().__init__(printable(message))


class BadRequest(FastmemitError, ValueError):
    """Edit requests that cannot be carried out as they are written, alone or together."""


class MissedFacts(FastmemitError):
    """An edit after which the model does not say all of its facts, though that was asked for."""


class BadData(FastmemitError, ValueError):
    """A malformed record, whose index and field are named, or an adapter that is no change of plain weights."""


class BadCorpus(FastmemitError, ValueError):
    """A corpus that cannot be read as text."""


class UnknownArchitecture(FastmemitError):
    """The part of a model that would be edited cannot be told from its structure."""


class BadLayer(FastmemitError, ValueError):
    """A layer that the model does not have."""


class BadConfig(FastmemitError, ValueError):
    """A setting with a name or a value that makes no sense."""


class ModelNotFound(FastmemitError):
    """A model name that leads to no model that can be loaded."""


class WrongModel(FastmemitError):
    """A model that an edit or a statistic is not of, or one with a weight that cannot take an edit."""


class NonFiniteEdit(FastmemitError, ValueError):
    """An edit with NaN or infinity, or one after which a weight would hold them."""


class BadUndo(FastmemitError):
    """An undo that would not restore the weights as they were."""


class DamagedFile(FastmemitError):
    """A file that is cut short, altered or of another format."""
