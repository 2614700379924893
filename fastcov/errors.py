"""The errors of fastcov: one class per thing that a caller may want to handle differently.

Every message is one sentence that names the value, the place and the mend. Values that a program may need are
attributes as well; all have defaults, so that the errors survive pickling between processes.
"""

from __future__ import annotations

from fastcov.printable import printable


class FastcovError(Exception):
    """Base class of every error that fastcov raises on purpose.

    Its message may quote a file; control characters in it are spelled out.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


class NotPositiveDefinite(FastcovError):
    """A matrix has no Cholesky factor, even with the largest jitter that was allowed.

    Attributes:
        tried: The jitters that were tried, relative to the mean of the diagonal.
        d: The width of the matrix.
        rank: About how many of its d directions are there, None where that was not estimated.
    """

    def __init__(
        self, message: str = "", *, tried: tuple[float, ...] = (), d: int = 0, rank: int | None = None
    ) -> None:
        super().__init__(message)
        self.tried = tried
        self.d = d
        self.rank = rank


class NonFiniteKeys(FastcovError):
    """Keys hold NaN or infinity, or their squares overflow the sum."""


class NonFiniteMatrix(FastcovError):
    """A matrix that is to be factorised or solved with holds NaN or infinity.

    Attributes:
        entries: How many of its entries do.
        where: Row and column of the first one, None where that is not known.
    """

    def __init__(self, message: str = "", *, entries: int = 0, where: tuple[int, int] | None = None) -> None:
        super().__init__(message)
        self.entries = entries
        self.where = where


class ResidualTooLarge(FastcovError):
    """A solve with a float32 factor could not be refined to the accuracy asked for.

    Attributes:
        residual: The norm of ``B - A X`` over that of B, in the worst column.
        tolerance: What was asked for.
    """

    def __init__(self, message: str = "", *, residual: float = 0.0, tolerance: float = 0.0) -> None:
        super().__init__(message)
        self.residual = residual
        self.tolerance = tolerance


class NoNullSpace(FastcovError):
    """An update that is confined to a null space has no direction there, or a key has no part.

    Attributes:
        columns: The edit keys that have no part in it; empty where it has no direction at all.
    """

    def __init__(self, message: str = "", *, columns: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.columns = columns


class BadInput(FastcovError, ValueError):
    """An argument that is no matrix of numbers, or numbers of a kind that is not taken."""


class WrongWidth(FastcovError, ValueError):
    """Keys or matrices have another width than what they are combined with."""


class EmptyCorpus(FastcovError, ValueError):
    """There is not a single key to learn from."""


class QuarticUnknown(FastcovError):
    """A moment does not know the sum of ``||k||^4``, which an estimate needs."""


class BudgetNotMet(FastcovError, ValueError):
    """The corpus ended before the budget of keys was met.

    Attributes:
        found: How many keys there were.
        wanted: How many keys were asked for.
    """

    def __init__(self, message: str = "", *, found: int = 0, wanted: int = 0) -> None:
        super().__init__(message)
        self.found = found
        self.wanted = wanted


class BadBudget(FastcovError, ValueError):
    """A multiplier or a number of keys that asks for nothing, or for no number at all."""


class UnknownModule(FastcovError, LookupError):
    """The model has no module of this path."""


class HookNeverRan(FastcovError):
    """A hooked module was not called in a complete forward pass."""


class KernelUnavailable(FastcovError):
    """A kernel that was asked for by name cannot run here."""


class ProcessLost(FastcovError):
    """A process that collects together with this one does not answer any more.

    Attributes:
        rank: Which one, None where that is not known.
    """

    def __init__(self, message: str = "", *, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class FailedElsewhere(FastcovError):
    """Another process failed, which says itself what happened; this one only stops too.

    Attributes:
        rank: Which one.
    """

    def __init__(self, message: str = "", *, rank: int = 0) -> None:
        super().__init__(message)
        self.rank = rank


class StaleCheckpoint(FastcovError):
    """What was read again after an interruption is not what had been read before it."""


class StoreMismatch(FastcovError):
    """A stored moment is sound, but of another thing than the one expected.

    Attributes:
        field: The name of the field that differs.
        stored: Its value in the file, None where the file has no such field.
        expected: The value that was expected.
    """

    def __init__(self, message: str = "", *, field: str = "", stored: object = None, expected: object = None) -> None:
        super().__init__(message)
        self.field = field
        self.stored = stored
        self.expected = expected


class StoreDamaged(FastcovError):
    """A stored moment is not what was written: truncated, altered, or not a moment at all."""


class StoreMissing(FastcovError):
    """There is no stored moment at this path."""
