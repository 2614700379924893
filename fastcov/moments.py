"""The uncentred second moment of keys: a sum that grows, a mean that is read; how many keys, and how far to shrink."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real

import torch
import torch.distributed as dist
from torch import Tensor

from fastcov.distributed import add_up_lower, reducing_device
from fastcov.errors import BadInput, NonFinite
from fastcov.hooks import isolated, key_rows, matrix, shares_entries, square
from fastcov.ops import check_keys

_NORMED = 128  # rows of 16 bits whose norms a CPU takes at a time: it converts them first
_SQUARED = 256  # rows of a sum whose squares are summed at a time
_MIRRORED = 64  # rows mirrored at a time, few enough for the cache


class SecondMoment:
    """The running sum of ``k k^T`` over keys k, and how many there were.

    Of the sum `lower` (d, d) only the lower triangle means anything; readings are symmetric copies. The mean is C_0 of
    equation (2) of arXiv 2506.04226 divided by the number of keys, uncentred, so that the number of keys does not
    change the weight it gets.

    Args:
        d: The width of the keys.
        dtype: The dtype of the sum, float32 or float64. Keys of any floating dtype are taken.
        device: Where the sum lives, and where keys must come from.
        quartic: Whether to sum ``||k||^4`` too, for `ledoit_wolf`; it costs 0.4 to 1.6 % of every update.

    Attributes:
        lower: The sum itself (d, d), not a copy.
        count: How many keys were added.
        quartic: The sum of ``||k||^4``, float64 () on the sum's device (float32 on Apple's GPUs); None where not known.

    Raises:
        ValueError: A width below 1, or another dtype.
    """

    @isolated()
    def __init__(
        self,
        d: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        quartic: bool = False,
    ) -> None:
        if isinstance(d, bool) or not isinstance(d, int) or d < 1:
            raise ValueError(
                f"The width of the keys must be a whole number of at least 1 but is {d!r}; "
                "pass the projection's input width."
            )
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"The sum must be float32 or float64 but is {dtype}; pass one of them.")
        self.lower = torch.zeros(d, d, dtype=dtype, device=device)
        self.count = 0
        self.quartic: Tensor | None = _zero(self.device) if quartic else None

    @classmethod
    @isolated()
    def from_lower(cls, lower: Tensor, count: int, quartic: Tensor | float | None = None) -> SecondMoment:
        """Take over a sum (d, d), float32 or float64, of which the lower triangle is filled.

        It is not copied unless nothing could be added to it: a NumPy array, one whose entries share memory, or one that
        was made under inference mode. `quartic` is the sum of ``||k||^4`` over its `count` keys where that is known.

        Raises:
            BadInput: The matrix is no dense square one of numbers.
            ValueError: A negative count, or another dtype.
        """
        given = lower
        lower = square(lower, "A sum", meta=True)
        if not isinstance(given, Tensor) or lower.is_inference() or shares_entries(lower):
            lower = lower.clone(memory_format=torch.contiguous_format)
        if isinstance(count, bool) or count != int(count) or count < 0:
            raise ValueError(f"The number of keys cannot be {count}; pass how many were summed.")
        moment = cls(lower.shape[0], dtype=lower.dtype, device="meta")
        moment.lower, moment.count = lower, int(count)
        moment.quartic = None if quartic is None else _zero(lower.device) + quartic
        return moment

    @isolated()
    def update(self, x: Tensor, mask: Tensor | None = None) -> SecondMoment:
        """Add keys, where they lie, and return this moment; on a GPU this waits.

        Keys x (..., d) are float32, float64, float16 or bfloat16, on the sum's device, or a NumPy array; those count
        whose mask (...) is non-zero.

        Raises:
            BadInput: Keys that are not d wide or not floating point, live on another device, or do not fit the mask.
            NonFinite: Keys that count hold NaN or infinity, or the sum of their squares overflows its dtype; the moment
                is as it was.
        """
        x = matrix(x, "Keys", meta=True)
        check_keys(self.lower, x)
        pieces = list(key_rows(x, mask))  # (n, d), (n,) each
        norms = [self._norms(rows, part) for rows, part in pieces]
        if not self.lower.is_meta and not self._surely_finite(norms):
            self._refuse_non_finite(pieces)
            norms = [self._norms(rows.double(), part) for rows, part in pieces]
        for (rows, part), lengths in zip(pieces, norms, strict=True):
            kept = rows.shape[0] if part is None else int(part.sum())
            self.add_rows(rows, None if part is None else part.to(rows.device), kept, lengths)
        return self

    def add_rows(self, rows: Tensor, mask: Tensor | None, kept: int, norms: Tensor | None = None) -> None:
        """Add rows (n, d) of which the caller has counted those that the mask keeps; nothing is waited for.

        Their norms (n,) are taken where they are needed and not given. Whether the sum is finite shows in the diagonal
        of `lower`. To be called inside `isolated`.

        Raises:
            BadInput: They are not d wide, of a dtype that is not taken, or on another device.
        """
        check_keys(self.lower, rows)
        torch.ops.fastcov.rank_k_update(self.lower, rows, mask)
        if self.quartic is not None:
            norms = self._norms(rows, mask) if norms is None else norms
            self.quartic += norms.to(self.quartic.dtype).pow(4).sum()
        self.count += kept

    @isolated()
    def merge(self, other: SecondMoment) -> SecondMoment:
        """Add another moment's keys; the other one stays as it is. The quartic is known where both know it.

        Raises:
            BadInput: It is no moment, or one of another width.
        """
        check_moment(other, "A merge")
        if other.d != self.d:
            raise BadInput(
                f"A moment of width {other.d} cannot be merged into one of width {self.d}; "
                "merge moments of the same projection."
            )
        self.lower += other.lower.to(self.lower)
        self.count += other.count
        if self.quartic is None or other.quartic is None:
            self.quartic = None
        else:
            self.quartic += other.quartic.to(self.quartic)
        return self

    @isolated()
    def all_reduce(self, group: dist.ProcessGroup | None = None) -> SecondMoment:
        """Add up the moments of all processes of a group; every one then holds the total.

        Little more than the lower triangle is sent. The last bits of a sum depend on how many processes there are.
        Without an initialised process group there is one, and nothing to add.
        """
        if dist.is_available() and dist.is_initialized():
            device = reducing_device(self.lower.device)
            unknown = int(self.quartic is None)
            counts = torch.tensor([self.count, unknown], dtype=torch.int64, device=device)
            quartic = _zero(device) if self.quartic is None else self.quartic.to(device)
            for total in (counts, quartic):
                dist.all_reduce(total, group=group)
            add_up_lower(self.lower, group)
            self.count, unknown = counts.tolist()
            start = _zero(self.lower.device)
            self.quartic = None if unknown else start + quartic.to(start.dtype).to(start.device)
        return self

    @isolated()
    def to(self, device: torch.device | str) -> SecondMoment:
        """The same moment on a device; this one where it lives there already."""
        moved = self.lower.to(device)
        if moved is self.lower:
            return self
        # On the way to a GPU without float64, it is rounded before it is moved.
        quartic = None if self.quartic is None else self.quartic.to(_zero(moved.device).dtype)
        known = None if quartic is None else quartic.to(moved.device)
        return SecondMoment.from_lower(moved, self.count, known)

    @property
    def d(self) -> int:
        """The width of the keys."""
        return self.lower.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the sum."""
        return self.lower.dtype

    @property
    def device(self) -> torch.device:
        """Where the sum lives."""
        return self.lower.device

    @property
    @isolated()
    def sum(self) -> Tensor:
        """The sum of ``k k^T``, a symmetric copy (d, d)."""
        return mirror(self.lower.clone())

    @property
    @isolated()
    def second_moment(self) -> Tensor:
        """The mean of ``k k^T``, a symmetric copy (d, d).

        Raises:
            BadInput: No key was added.
        """
        if self.count == 0:
            raise BadInput(f"This moment of width {self.d} has seen no key and has no mean; update it first.")
        return mirror(self.lower / self.count)

    def _norms(self, rows: Tensor, mask: Tensor | None) -> Tensor:
        """The norms of rows (n, d) as (n,), 0 of those that do not count; nothing is waited for."""
        # Squares of float16 overflow above 256, and those of float32 before a float64 sum does.
        wide = torch.float64 in (rows.dtype, self.lower.dtype)
        norms = _norms(rows, torch.float64 if wide else torch.float32)
        if mask is not None:  # what is masked may be anything, NaN included
            norms = norms.masked_fill(~mask.to(norms.device), 0)
        return norms

    def _surely_finite(self, pieces: Sequence[Tensor]) -> bool:
        """Whether no sum of squares of keys with these norms, (n,) each, comes near an overflow."""
        if not any(len(piece) for piece in pieces):
            return True
        norms = torch.cat([*pieces]) if len(pieces) > 1 else pieces[0]
        largest, highest = norms.max(), torch.linalg.vector_norm(self.lower.diagonal(), float("inf"))
        # NaN is no larger than anything, and so is not sure.
        if norms.is_cpu:
            norm, before = float(largest), float(highest)
        else:  # one read from the device
            wide = torch.promote_types(norms.dtype, highest.dtype)
            norm, before = torch.stack([largest.to(wide), highest.to(wide)]).tolist()
        return bool(norm * norm * len(norms) + before < torch.finfo(self.dtype).max)

    def _refuse_non_finite(self, pieces: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        """Refuse keys that would leave a sum that is not finite."""
        kept = torch.cat([rows if part is None else rows[part.to(rows.device)] for rows, part in pieces])
        bad = int((~kept.isfinite().all(-1)).sum())
        if bad:
            raise NonFinite(
                f"{bad} of {len(kept)} keys of width {self.d} hold NaN or infinity, and none of "
                "them was added; run the model in another dtype (bfloat16 or float32)."
            )
        kept = kept.cpu().double()  # through the CPU: not every device has float64
        total = kept.square().sum(0) + self.lower.diagonal().cpu().double()
        if not float(total.max()) < torch.finfo(self.dtype).max:
            raise NonFinite(
                f"The squares of the keys of width {self.d} overflow {self.dtype} (largest key "
                f"{float(kept.abs().max()):.3g}), and none of them was added; pass dtype=torch.float64."
            )

    def __repr__(self) -> str:
        return f"SecondMoment(d={self.d}, count={self.count}, dtype={self.dtype}, device={str(self.device)!r})"

    def _repr_html_(self) -> str:
        about = f"{self.count:,} keys of width {self.d}, {str(self.dtype).removeprefix('torch.')} on {self.device}"
        return f"<p><b>SecondMoment</b>: {about}</p>"


def check_moment(moment: object, name: str) -> None:
    """Refuse what is no `SecondMoment` as BadInput, in a sentence that begins with a name of what takes one."""
    if not isinstance(moment, SecondMoment):
        raise BadInput(
            f"{name} takes a SecondMoment, not a {type(moment).__name__}; make one of a matrix and "
            "the number of keys with SecondMoment.from_lower."
        )


def mirror(A: Tensor) -> Tensor:
    """Write the lower triangle of A (d, d) over its upper one, in place, and return A; of A.mT, the other way round."""
    d = A.shape[0]
    for start in range(0, d, _MIRRORED):
        stop = min(start + _MIRRORED, d)
        corner = A[start:stop, start:stop]
        corner.copy_(corner.tril() + corner.tril(-1).mT)
        # Through a contiguous copy: reading columns a power of two apart misses the cache.
        A[start:stop, stop:] = A[stop:, start:stop].contiguous().mT
    return A


def _zero(device: torch.device) -> Tensor:
    """What a sum of fourth powers starts from, ()."""
    wide = device.type != "mps"  # Apple's GPUs have no float64
    return torch.zeros((), dtype=torch.float64 if wide else torch.float32, device=device)


def _norms(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The norms of rows (n, d) as (n,), without a copy of the rows in another dtype."""
    n = rows.shape[0]
    if rows.dtype == dtype or rows.device.type != "cpu":
        whole: Tensor = torch.linalg.vector_norm(rows, dim=-1, dtype=dtype)
        return whole
    step = min(_NORMED, n // 4 + 1)
    norms = torch.empty(n, dtype=dtype, device=rows.device)
    for start in range(0, n, step):
        part = slice(start, start + step)
        torch.linalg.vector_norm(rows[part], dim=-1, dtype=dtype, out=norms[part])
    return norms


@isolated()
def ledoit_wolf(moment: SecondMoment) -> float:
    """The intensity of Ledoit and Wolf, for independent keys of any distribution.

    ``a = min(1, (q / n - tr S^2) / (n (tr S^2 - (tr S)^2 / d)))`` with q the sum of ``||k||^4``: how far single keys
    lie from S, over how far S lies from the identity. ("A well-conditioned estimator for large-dimensional covariance
    matrices", Journal of Multivariate Analysis 88, 2004, section 3.) From 0, the moment as it is, to 1, a multiple of
    the identity.

    Raises:
        BadInput: It is no moment, has seen no key, or was not collected with ``quartic=True``.
        NonFinite: The sum holds NaN or infinity.
    """
    n, trace, squares = _traces(moment)
    if moment.quartic is None:
        raise BadInput(
            f"This moment of width {moment.d} does not know the sum of ||k||^4 that Ledoit-Wolf needs, because it was "
            "collected without quartic=True, imported, or stored by an older version; collect it with quartic=True "
            '(precompute --quartic), or give shrinkage="oas".'
        )
    if not float(moment.quartic) < float("inf"):
        raise NonFinite(
            f"The sum of ||k||^4 of this moment of width {moment.d} holds NaN or infinity; collect "
            "the keys again, or in float64."
        )
    spread = squares - trace * trace / moment.d
    error = max(float(moment.quartic) / n - squares, 0.0) / n
    if moment.d == 1 or spread <= 0.0:  # a multiple of the identity already
        return 0.0
    return min(error / spread, 1.0)


@isolated()
def oas(moment: SecondMoment) -> float:
    """The oracle approximating shrinkage, for Gaussian keys; from 0 to 1 as `ledoit_wolf`.

    ``a = min(1, (tr S^2 + (tr S)^2) / ((n + 1) (tr S^2 - (tr S)^2 / d)))``, the fixed point that "Shrinkage algorithms
    for MMSE covariance estimation" (Chen, Wiesel, Eldar and Hero, IEEE Transactions on Signal Processing 58, 2010)
    gives in equation (23), without its terms in ``2 / d``, which scikit-learn leaves out as well.

    Raises:
        BadInput: It is no moment, or has seen no key.
        NonFinite: The sum holds NaN or infinity.
    """
    n, trace, squares = _traces(moment)
    if moment.d == 1:
        return 0.0
    spread = (n + 1) * (squares - trace * trace / moment.d)
    total = squares + trace * trace
    return total / spread if spread > total else 1.0


#: The ways to find an intensity, by the name that settings give.
SHRINKAGES: Mapping[str, Callable[[SecondMoment], float]] = {
    "none": lambda moment: 0.0,
    "ledoit-wolf": ledoit_wolf,
    "oas": oas,
}


@isolated()
def shrunk(C: Tensor | SecondMoment, intensity: float, *, in_place: bool = False) -> Tensor:
    """``(1 - a) C + a mean(diag C) I``, of a second moment (d, d) or a moment's mean, for a from 0 to 1.

    Entry by entry, so that of a matrix with one triangle filled the result has the same triangle. In place it is
    written over C, a tensor, to spare a copy.

    Raises:
        BadInput: C is no dense square matrix of numbers, cannot be written over, or is a moment without a key.
        ValueError: The intensity is not from 0 to 1.
    """
    check_intensity(intensity)
    found = C.second_moment if isinstance(C, SecondMoment) else square(C, "A second moment")
    if in_place and (not isinstance(C, Tensor) or C.is_inference() or shares_entries(C)):
        raise BadInput(
            f"This {type(C).__name__} cannot be written over: only a tensor can that was not made "
            "under inference mode and whose entries each have a place; leave out in_place."
        )
    C = found if in_place else found.clone(memory_format=torch.contiguous_format)
    if intensity:
        mean = C.diagonal().mean()
        C.mul_(1 - intensity).diagonal().add_(intensity * mean)
    return C


def check_intensity(intensity: float) -> None:
    """Refuse an intensity that is not from 0 to 1 with a ValueError."""
    if not isinstance(intensity, (int, float)) or not 0 <= intensity <= 1:
        raise ValueError(
            f"The intensity of a shrinkage must be from 0 to 1 but is {intensity!r}; "
            "give what fastcov.oas or fastcov.ledoit_wolf says."
        )


def _traces(moment: SecondMoment) -> tuple[int, float, float]:
    """n, tr S and tr S^2, from the lower triangle."""
    check_moment(moment, "An estimate of shrinkage")
    n = moment.count
    if n == 0:
        raise BadInput(
            f"This moment of width {moment.d} has seen no key, and there is nothing to shrink; update it first."
        )
    lower = moment.lower
    diagonal = lower.diagonal().cpu().double()  # through the CPU: not every device has float64
    below = 0.0
    for start in range(0, moment.d, _SQUARED):
        rows = slice(start, start + _SQUARED)
        # Norms are taken, and not squares, which float32 need not hold.
        for part in (lower[rows, :start], lower[rows, rows].tril(-1)):
            below += float(torch.linalg.vector_norm(part, dtype=_zero(lower.device).dtype)) ** 2
    trace = float(diagonal.sum()) / n
    squares = (2 * below + float(diagonal.square().sum())) / n / n
    if not squares < float("inf"):
        raise NonFinite(
            f"The sum of width {moment.d} holds NaN or infinity, or its squares overflow; "
            "collect the keys again, or in float64."
        )
    return n, trace, squares


def budget(multiplier: float, d_k: int) -> int:
    """The number of keys to collect of width d_k: ``round(multiplier * d_k)``, at least 1.

    The multiplier is the paper's dynamic multiplier d_m (arXiv 2506.04226, section 4): 10 is recommended for every
    model, 2 is near parity for some, and 1 collapses everywhere, because the smallest eigenvalue of a second moment of
    ``d_m * d_k`` samples is biased low by about ``(1 - 1/sqrt(d_m))^2``.

    Raises:
        BadInput: The multiplier is NaN, infinite, not above 0 or so small that no key is left, or d_k is not a whole
            number above 0.
    """
    if not _is(d_k, Integral) or d_k <= 0:
        raise BadInput(
            f"The width of the keys d_k must be a whole number above 0 but is {d_k!r}; "
            "pass the input width of the edited projection."
        )
    if not _is(multiplier, Real):
        raise BadInput(f"The multiplier must be a number above 0 but is {multiplier!r}; 10 is recommended.")
    if not math.isfinite(multiplier) or multiplier <= 0:
        raise BadInput(f"The multiplier must be finite and above 0 but is {multiplier!r}; 10 is recommended.")
    keys = float(multiplier) * int(d_k)
    if not math.isfinite(keys):
        raise BadInput(f"The multiplier {multiplier!r} times the key width {d_k} overflows; 10 is recommended.")
    if round(keys) == 0:
        raise BadInput(
            f"The multiplier {multiplier!r} times the key width {d_k} rounds to no key at all; "
            f"pass more than {0.5 / d_k:g} (10 is recommended)."
        )
    return round(keys)


def _is(value: object, kind: type) -> bool:
    """Whether a value is a number of a kind, NumPy's included; True and False are no numbers."""
    return isinstance(value, kind) and not isinstance(value, bool)
