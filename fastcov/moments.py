"""The uncentred second moment of keys, as a sum that grows and a mean that is read."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fastcov.errors import EmptyCorpus, WrongWidth
from fastcov.keys import key_rows
from fastcov.ops import rank_k_update
from fastcov.processes import add_up_lower, reducing_device

_BLOCK = 1024  # rows mirrored at a time: the temporary is one block, not a second matrix
_NORMED = 128  # rows of 16 bits whose norms a CPU takes at a time: it converts them first


class SecondMoment:
    """The running sum of ``k k^T`` over keys k, and how many there were.

    The canonical layout: the sum is a matrix (d, d) of which only the lower triangle means
    anything; whatever lies above the diagonal is never read as data. Readings are symmetric
    copies. The mean is C_0 of equation (2) of arXiv 2506.04226 divided by the number of keys,
    uncentred, so that the number of keys does not change the weight it gets.

    Beside the sum there is one more number, the sum of ``||k||^4``, which says how far single keys
    lie from the mean: `fastcov.ledoit_wolf` needs it, and no second moment can tell it afterwards.

    Args:
        d: The width of the keys.
        dtype: Of the sum, float32 or float64. Keys of any floating dtype are taken; products are
            never summed in less than float32.
        device: Where the sum lives, and where keys must come from.

    Raises:
        ValueError: A width below 1, or another dtype.
    """

    def __init__(
        self,
        d: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if d < 1:
            raise ValueError(
                f"The width of the keys must be at least 1 but is {d}; "
                "pass the projection's input width."
            )
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"The sum must be float32 or float64 but is {dtype}; pass one of them."
            )
        self._sum = torch.zeros(d, d, dtype=dtype, device=device)
        self._count = 0
        self._quartic: Tensor | None = _zero(self._sum.device)

    @classmethod
    def from_lower(
        cls, lower: Tensor, count: int, quartic: Tensor | float | None = None
    ) -> SecondMoment:
        """Take over a sum of which the lower triangle is filled; it is not copied.

        Args:
            lower: The sum, shape (d, d), float32 or float64.
            count: How many keys are in it.
            quartic: The sum of ``||k||^4`` over them; None where nobody knows it.

        Raises:
            WrongWidth: The matrix is not square.
            ValueError: A negative count, or another dtype.
        """
        if lower.dim() != 2 or lower.shape[0] != lower.shape[1]:
            raise WrongWidth(
                f"A sum must be a square matrix but has shape {tuple(lower.shape)}; pass (d, d)."
            )
        if count < 0:
            raise ValueError(f"The number of keys cannot be {count}; pass how many were summed.")
        moment = cls(lower.shape[0], dtype=lower.dtype, device="meta")
        moment._sum = lower
        moment._count = int(count)
        moment._quartic = None if quartic is None else _zero(lower.device) + quartic
        return moment

    def update(
        self, x: Tensor, mask: Tensor | None = None, *, kept: int | None = None
    ) -> SecondMoment:
        """Add keys, where they lie: none is copied, gathered or converted on the way to the kernel.

        Args:
            x: Keys, shape (..., d), float32, float64, float16 or bfloat16, on the sum's device.
            mask: Which of them count, shape (...), non-zero means kept; None keeps all.
            kept: How many keys the mask keeps, where the caller has counted them: to count a mask
                on a GPU is to wait for it. It is taken at its word.

        Returns:
            This moment.

        Raises:
            WrongWidth: The keys are not d wide, or the mask does not fit them.
            ValueError: Keys that are not floating point or that live on another device.
        """
        added = 0
        for rows, part in key_rows(x, mask):  # (n, d), (n,)
            rank_k_update(self._sum, rows, mask=part)
            self._add_quartic(rows, part)
            if kept is None:
                added += rows.shape[0] if part is None else int(part.sum())
        self._count += added if kept is None else kept
        return self

    def merge(self, other: SecondMoment) -> SecondMoment:
        """Add another moment's keys; the other one stays as it is.

        Raises:
            WrongWidth: The other moment is of another width.
        """
        if other.d != self.d:
            raise WrongWidth(
                f"A moment of width {other.d} cannot be merged into one of width {self.d}; "
                "merge moments of the same projection."
            )
        self._sum += other._sum.to(self._sum)
        self._count += other._count
        if self._quartic is None or other._quartic is None:
            self._quartic = None
        else:
            self._quartic += other._quartic.to(self._quartic)
        return self

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> SecondMoment:
        """Add up the moments of all processes of a group; every one then holds the total.

        Little more than the lower triangle is sent. The order of the additions, and with it the
        last bits of a sum, depends on how many processes there are.

        Without an initialised process group there is one process, and nothing to add.
        """
        if dist.is_available() and dist.is_initialized():
            device = reducing_device(self._sum.device)
            unknown = int(self._quartic is None)
            counts = torch.tensor([self._count, unknown], dtype=torch.int64, device=device)
            quartic = _zero(device) if self._quartic is None else self._quartic.to(device)
            for total in (counts, quartic):
                dist.all_reduce(total, group=group)
            add_up_lower(self._sum, group)
            self._count, unknown = counts.tolist()
            start = _zero(self._sum.device)
            self._quartic = None if unknown else start + quartic.to(start.dtype).to(start.device)
        return self

    def to(self, device: torch.device | str) -> SecondMoment:
        """The same moment on a device; this one where it lives there already."""
        moved = self._sum.to(device)
        if moved is self._sum:
            return self
        # On the way to a GPU without float64, it is rounded before it is moved.
        quartic = None if self._quartic is None else self._quartic.to(_zero(moved.device).dtype)
        known = None if quartic is None else quartic.to(moved.device)
        return SecondMoment.from_lower(moved, self._count, known)

    @property
    def d(self) -> int:
        """The width of the keys."""
        return self._sum.shape[0]

    @property
    def count(self) -> int:
        """How many keys were added."""
        return self._count

    @property
    def quartic(self) -> Tensor | None:
        """The sum of ``||k||^4``, float64 () on the sum's device (float32 on Apple's GPUs).

        None where it is not known: the sum was taken over without it.
        """
        return self._quartic

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the sum."""
        return self._sum.dtype

    @property
    def device(self) -> torch.device:
        """Where the sum lives."""
        return self._sum.device

    @property
    def lower(self) -> Tensor:
        """The sum itself (d, d), not a copy; only its lower triangle means anything."""
        return self._sum

    @property
    def sum(self) -> Tensor:
        """The sum of ``k k^T``, a symmetric copy (d, d)."""
        return _mirror(self._sum.clone())

    @property
    def second_moment(self) -> Tensor:
        """The mean of ``k k^T``, a symmetric copy (d, d).

        Raises:
            EmptyCorpus: No key was added.
        """
        if self._count == 0:
            raise EmptyCorpus(
                f"This moment of width {self.d} has seen no key and has no mean; update it first."
            )
        return _mirror(self._sum / self._count)

    def _add_quartic(self, rows: Tensor, mask: Tensor | None) -> None:
        """Add ``||k||^4`` of the kept rows (n, d); neither a row nor the device is waited for."""
        if self._quartic is None:
            return
        # Squares of float16 overflow above 256, and those of float32 before a float64 sum does.
        wide = torch.float64 in (rows.dtype, self._sum.dtype)
        norms = _norms(rows.detach(), torch.float64 if wide else torch.float32)  # (n,)
        if mask is not None:  # what is masked may be anything, NaN included
            norms = norms.masked_fill(~mask.to(norms.device), 0)
        self._quartic += norms.to(self._quartic.dtype).pow(4).sum()

    def __repr__(self) -> str:
        """Width, count, dtype and device."""
        return (
            f"SecondMoment(d={self.d}, count={self.count}, dtype={self.dtype}, "
            f"device={str(self.device)!r})"
        )


def _zero(device: torch.device) -> Tensor:
    """What a sum of fourth powers starts from, ()."""
    wide = device.type != "mps"  # Apple's GPUs have no float64
    return torch.zeros((), dtype=torch.float64 if wide else torch.float32, device=device)


def _norms(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The norms of rows (n, d) as (n,), without a copy of the rows in another dtype."""
    n = rows.shape[0]
    whole = rows.dtype == dtype or rows.device.type != "cpu"
    step = max(n, 1) if whole else min(_NORMED, n // 4 + 1)
    norms = torch.empty(n, dtype=dtype, device=rows.device)
    for start in range(0, n, step):
        part = slice(start, start + step)
        torch.linalg.vector_norm(rows[part], dim=-1, dtype=dtype, out=norms[part])
    return norms


def _mirror(matrix: Tensor) -> Tensor:
    """Write the lower triangle of a matrix (d, d) over its upper one, in place."""
    d = matrix.shape[0]
    for start in range(0, d, _BLOCK):
        stop = min(start + _BLOCK, d)
        corner = matrix[start:stop, start:stop]
        corner.copy_(corner.tril() + corner.tril(-1).mT)
        matrix[start:stop, stop:] = matrix[stop:, start:stop].mT
    return matrix
