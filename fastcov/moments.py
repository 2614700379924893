"""The uncentred second moment of keys, as a sum that grows and a mean that is read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fastcov.distributed import add_up_lower, reducing_device
from fastcov.errors import BadInput, EmptyCorpus, NonFiniteKeys, WrongWidth
from fastcov.hooks import isolated, key_rows
from fastcov.inputs import matrix, shares_entries, square
from fastcov.ops import rank_k_update

_BLOCK = 1024  # rows mirrored at a time: the temporary is one block, not a second matrix
_NORMED = 128  # rows of 16 bits whose norms a CPU takes at a time: it converts them first


class SecondMoment:
    """The running sum of ``k k^T`` over keys k, and how many there were.

    The canonical layout: the sum is a matrix (d, d) of which only the lower triangle means anything; whatever lies
    above the diagonal is never read as data. Readings are symmetric copies. The mean is C_0 of equation (2) of arXiv
    2506.04226 divided by the number of keys, uncentred, so that the number of keys does not change the weight it gets.

    Beside the sum there is one more number, the sum of ``||k||^4``, which says how far single keys lie from the mean:
    `fastcov.ledoit_wolf` needs it, and no second moment can tell it afterwards.

    Args:
        d: The width of the keys.
        dtype: Of the sum, float32 or float64. Keys of any floating dtype are taken; products are never summed in less
            than float32.
        device: Where the sum lives, and where keys must come from.

    Raises:
        ValueError: A width below 1, or another dtype.
    """

    @isolated()
    def __init__(self, d: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> None:
        if isinstance(d, bool) or not isinstance(d, int) or d < 1:
            raise ValueError(
                f"The width of the keys must be a whole number of at least 1 but is {d!r}; "
                "pass the projection's input width."
            )
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"The sum must be float32 or float64 but is {dtype}; pass one of them.")
        self._sum = torch.zeros(d, d, dtype=dtype, device=device)
        self._count = 0
        self._quartic: Tensor | None = _zero(self._sum.device)

    @classmethod
    @isolated()
    def from_lower(cls, lower: Tensor, count: int, quartic: Tensor | float | None = None) -> SecondMoment:
        """Take over a sum of which the lower triangle is filled.

        It is not copied unless nothing could be added to it: where it is a NumPy array, its entries share memory, or it
        was made under inference mode.

        Args:
            lower: The sum, shape (d, d), float32 or float64.
            count: How many keys are in it.
            quartic: The sum of ``||k||^4`` over them; None where nobody knows it.

        Raises:
            WrongWidth: The matrix is not square.
            BadInput: It is no dense matrix of numbers.
            ValueError: A negative count, or another dtype.
        """
        given = lower
        lower = square(lower, "A sum", meta=True)
        if not isinstance(given, Tensor) or lower.is_inference() or shares_entries(lower):
            lower = lower.clone(memory_format=torch.contiguous_format)
        if isinstance(count, bool) or count != int(count) or count < 0:
            raise ValueError(f"The number of keys cannot be {count}; pass how many were summed.")
        moment = cls(lower.shape[0], dtype=lower.dtype, device="meta")
        moment._sum = lower
        moment._count = int(count)
        moment._quartic = None if quartic is None else _zero(lower.device) + quartic
        return moment

    @isolated()
    def update(
        self, x: Tensor, mask: Tensor | None = None, *, kept: int | None = None, check: bool = True
    ) -> SecondMoment:
        """Add keys, where they lie: none is copied, gathered or converted on the way to the kernel.

        Args:
            x: Keys, shape (..., d), float32, float64, float16 or bfloat16, on the sum's device; or a NumPy array of
                them.
            mask: Which of them count, shape (...), non-zero means kept; None keeps all.
            kept: How many keys the mask keeps, where the caller has counted them: to count a mask on a GPU is to wait
                for it. It is taken at its word.
            check: Whether to refuse keys that would leave a sum that is not finite, before any is added; on a GPU this
                waits. Without it, see whether the diagonal of `lower` is finite afterwards.

        Returns:
            This moment.

        Raises:
            WrongWidth: The keys are not d wide, or the mask does not fit them.
            NonFiniteKeys: Keys that count hold NaN or infinity, or the sum of their squares overflows its dtype; the
                moment is as it was.
            BadInput: Keys that are not floating point or that live on another device.
        """
        x = matrix(x, "Keys", meta=True)
        if x.dim() == 0 or x.shape[-1] != self.d:
            raise WrongWidth(
                f"Keys of shape {tuple(x.shape)} do not fit a sum of width {self.d}; "
                "their last dimension must be that width."
            )
        pieces = list(key_rows(x, mask))  # (n, d), (n,) each
        norms = [self._norms(rows, part) for rows, part in pieces]
        if check and not self._sum.is_meta and not self._surely_finite(norms):
            self._refuse_non_finite(pieces)
            norms = [self._norms(rows.double(), part) for rows, part in pieces]
        added = 0
        for (rows, part), lengths in zip(pieces, norms, strict=True):
            rank_k_update(self._sum, rows, mask=part)
            if self._quartic is not None:
                self._quartic += lengths.to(self._quartic.dtype).pow(4).sum()
            if kept is None:
                added += rows.shape[0] if part is None else int(part.sum())
        self._count += added if kept is None else kept
        return self

    @isolated()
    def merge(self, other: SecondMoment) -> SecondMoment:
        """Add another moment's keys; the other one stays as it is.

        Raises:
            WrongWidth: The other moment is of another width.
            BadInput: It is no moment.
        """
        check_moment(other, "A merge")
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

    @isolated()
    def all_reduce(self, group: dist.ProcessGroup | None = None) -> SecondMoment:
        """Add up the moments of all processes of a group; every one then holds the total.

        Little more than the lower triangle is sent. The order of the additions, and with it the last bits of a sum,
        depends on how many processes there are.

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

    @isolated()
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
    @isolated()
    def sum(self) -> Tensor:
        """The sum of ``k k^T``, a symmetric copy (d, d)."""
        return _mirror(self._sum.clone())

    @property
    @isolated()
    def second_moment(self) -> Tensor:
        """The mean of ``k k^T``, a symmetric copy (d, d).

        Raises:
            EmptyCorpus: No key was added.
        """
        if self._count == 0:
            raise EmptyCorpus(f"This moment of width {self.d} has seen no key and has no mean; update it first.")
        return _mirror(self._sum / self._count)

    def _norms(self, rows: Tensor, mask: Tensor | None) -> Tensor:
        """The norms of rows (n, d) as (n,), 0 of those that do not count; nothing is waited for."""
        # Squares of float16 overflow above 256, and those of float32 before a float64 sum does.
        wide = torch.float64 in (rows.dtype, self._sum.dtype)
        norms = _norms(rows, torch.float64 if wide else torch.float32)
        if mask is not None:  # what is masked may be anything, NaN included
            norms = norms.masked_fill(~mask.to(norms.device), 0)
        return norms

    def _surely_finite(self, pieces: Sequence[Tensor]) -> bool:
        """Whether no sum of squares of keys with these norms, (n,) each, comes near an overflow."""
        norms = torch.cat([*pieces]) if pieces else torch.empty(0)
        if norms.numel() == 0:
            return True
        highest = self._sum.diagonal().abs().max()
        wide = torch.promote_types(norms.dtype, highest.dtype)
        # One read from the device. NaN is no larger than anything, and so is not sure.
        norm, before = torch.stack([norms.max().to(wide), highest.to(wide)]).tolist()
        return bool(norm * norm * len(norms) + before < torch.finfo(self.dtype).max)

    def _refuse_non_finite(self, pieces: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        """Refuse keys that would leave a sum that is not finite."""
        kept = torch.cat([rows if part is None else rows[part.to(rows.device)] for rows, part in pieces])
        bad = int((~kept.isfinite().all(-1)).sum())
        if bad:
            raise NonFiniteKeys(
                f"{bad} of {len(kept)} keys of width {self.d} hold NaN or infinity, and none of "
                "them was added; run the model in another dtype (bfloat16 or float32)."
            )
        kept = kept.cpu().double()  # through the CPU: not every device has float64
        total = kept.square().sum(0) + self._sum.diagonal().cpu().double()
        if not float(total.max()) < torch.finfo(self.dtype).max:
            raise NonFiniteKeys(
                f"The squares of the keys of width {self.d} overflow {self.dtype} (largest key "
                f"{float(kept.abs().max()):.3g}), and none of them was added; pass "
                "dtype=torch.float64."
            )

    def __repr__(self) -> str:
        """Width, count, dtype and device."""
        return f"SecondMoment(d={self.d}, count={self.count}, dtype={self.dtype}, device={str(self.device)!r})"


def check_moment(moment: object, name: str) -> None:
    """Refuse what is no `SecondMoment`, in a sentence that begins with a name of what takes one.

    Raises:
        BadInput: It is something else.
    """
    if not isinstance(moment, SecondMoment):
        raise BadInput(
            f"{name} takes a SecondMoment, not a {type(moment).__name__}; make one of a matrix and "
            "the number of keys with SecondMoment.from_lower."
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
