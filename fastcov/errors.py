"""The errors of fastcov.

Every message is one sentence that names the value, the place and the fix. Values that a program may need are attributes
as well; all have defaults, so that the errors survive pickling between processes.
"""

from __future__ import annotations

from fastcov.files import printable


class FastcovError(Exception):
    """Base class of every error that fastcov raises on purpose; control characters in its message are spelled out."""

    def __init__(self, message: str = "", **about: object) -> None:
        super().__init__(printable(message))
        if unknown := [name for name in about if not hasattr(type(self), name)]:
            raise TypeError(f"{type(self).__name__} has no attribute {unknown[0]!r}")
        vars(self).update(about)


class BadInput(FastcovError, ValueError):
    """An argument of a kind, shape or size that is not taken, or a model or moment that lacks what is asked of it."""


class BudgetNotMet(BadInput):
    """The corpus ended before the budget of keys was met, with `found` keys of `wanted`."""

    found: int = 0
    wanted: int = 0


class NonFinite(FastcovError):
    """Keys or a matrix hold NaN or infinity, or the squares of keys overflow their sum."""

    entries: int = 0  # how many entries of a matrix do; 0 where that is not known
    where: tuple[int, int] | None = None  # row and column of the first one


class NotPositiveDefinite(FastcovError):
    """A matrix has no Cholesky factor, even with the largest jitter that was allowed."""

    tried: tuple[float, ...] = ()  # the jitters that were tried, relative to the mean of the diagonal
    d: int = 0  # the width of the matrix
    rank: int | None = None  # about how many of its directions are there, None where that was not estimated


class NoNullSpace(FastcovError):
    """An update that is confined to a null space has no direction there, or a key has no part."""

    columns: tuple[int, ...] = ()  # the edit keys that have no part in it; empty where it has no direction at all


class KernelUnavailable(FastcovError):
    """A kernel that was asked for by name cannot run here."""


class ProcessLost(FastcovError):
    """The process of this `rank` (None: unknown), which collects together with this one, does not answer any more."""

    rank: int | None = None


class FailedElsewhere(FastcovError):
    """The process of this `rank` failed, and says itself what happened; this one only stops too."""

    rank: int = 0


class StaleCheckpoint(FastcovError):
    """What was read again after an interruption is not what had been read before it."""


class StoreMismatch(FastcovError):
    """A stored moment is sound, but of another thing than the one expected."""

    field: str = ""  # the name of the field that differs
    stored: object = None  # its value in the file, None where the file has no such field
    expected: object = None


class StoreDamaged(FastcovError):
    """A stored moment is not what was written: truncated, altered, or not a moment at all."""
