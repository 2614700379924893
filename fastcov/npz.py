"""Moments as other editing codebases keep them: one ``.npz`` file of NumPy arrays for each module.

ROME, MEMIT and what grew from them store the sum of ``k k^T`` as a full symmetric matrix ``mom2.mom2``, the number of
keys as ``mom2.count``, and as ``sample_size`` the number of documents that was asked for, without which their loaders
collect again. The reader takes files from strangers: nothing is unpickled, what else a file holds is never looked at,
and declared sizes and headers are compared with what a moment of that width needs before memory is taken for it.
"""

from __future__ import annotations

import lzma
import os
import tokenize
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcov.errors import BadInput, FastcovError, NonFinite, StoreDamaged
from fastcov.files import StrPath, atomic_file
from fastcov.hooks import isolated
from fastcov.linalg import non_finite
from fastcov.moments import SecondMoment, check_moment

_BLOCK = 512  # rows looked at a time
_ROUNDING = 1e-3  # more than a float32 sum of 44 million keys has


def check_finite(total: Tensor, name: str) -> None:
    """Refuse a matrix (d, d) with entries that are no finite numbers, as NonFinite in a sentence about `name`."""
    if bad := non_finite(total):
        entries, (row, column) = bad
        raise NonFinite(
            f"{name} holds NaN or infinity, first in row {row}, column {column}; "
            "collect it again, from a model in float32 or bfloat16.",
            entries=entries,
            where=(row, column),
        )


def not_a_sum(total: Tensor) -> str | None:
    """Why a finite matrix (d, d) cannot be a sum of ``k k^T``, or None.

    Such a sum is symmetric, its diagonal is not negative, and no entry is larger than the geometric mean of the two
    entries of the diagonal that it belongs to (Cauchy and Schwarz), up to rounding. Its eigenvalues are not looked at.
    """
    diagonal = total.diagonal().double()  # (d,)
    if bool((diagonal < 0).any()):
        place = int((diagonal < 0).nonzero()[0])
        return f"place {place} of its diagonal is {float(diagonal[place]):g}"
    if not bool(diagonal.any()):
        return "its diagonal is zero"
    scale = diagonal.sqrt()
    slack = 1e-7 * float(diagonal.mean())  # squares of tiny keys underflow before products do
    for start in range(0, total.shape[0], _BLOCK):
        stop = start + _BLOCK
        rows = total[start:stop].double()
        allowed = scale[start:stop, None] * scale
        apart = (rows - total[:, start:stop].mT).abs_() > _ROUNDING * allowed + slack
        if bool(apart.any()):
            i, j = (int(k) for k in apart.nonzero()[0])
            return f"it is not symmetric in row {start + i}, column {j}"
        beyond = rows.abs() > (1 + _ROUNDING) * allowed + slack
        if bool(beyond.any()):
            i, j = (int(k) for k in beyond.nonzero()[0])
            return f"row {start + i}, column {j} is larger than its diagonal allows"
    return None


SUM, COUNT, SAMPLE_SIZE = "mom2.mom2", "mom2.count", "sample_size"

#: The widest keys that a file may claim where nobody knows the width; Llama-3.1-405B has 53,248.
MAX_WIDTH = 1 << 16

_HEADER = 1 << 12  # bytes; an array's header has some 120
_OTHER = 1 << 26  # bytes of arrays that are not looked at
_EXPANSION = 64  # keys are noise to a compressor: it saves less than half of their sum
# What NumPy writes. Of the others Python takes a whole chunk at once, however far it expands.
_PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# From NumPy, which looks for Python 2 in a header that is not Python, also tokenize's error; an
# unknown compression is NotImplementedError, an encrypted member RuntimeError.
_UNREADABLE = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, tokenize.TokenError, NotImplementedError, RuntimeError,
    ValueError, OverflowError,
)  # fmt: skip


@dataclass(frozen=True)
class NpzMoment:
    """The moment of an ``.npz`` file, and how many documents were asked for, None in a file that does not say."""

    moment: SecondMoment
    sample_size: int | None


@isolated()
def save_npz(path: StrPath, moment: SecondMoment, *, sample_size: int, dtype: torch.dtype = torch.float32) -> None:
    """Write a moment so that the loaders of other codebases take it as their own; equal moments give equal files.

    The sum is written as float32 or float64. `sample_size` is what the loader is configured with (``mom2_n_samples``):
    with another number it collects again.

    Raises:
        BadInput: It is no moment.
        ValueError: Another dtype, a sample size below 1, or a moment of no key.
        NonFinite: The sum holds NaN or infinity, or is too large for `dtype`.
        OSError: The file cannot be written; nothing is left of the attempt.
    """
    import numpy as np

    check_moment(moment, "An .npz file")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"A sum is written as float32 or float64 but not as {dtype}.")
    if type(sample_size) is not int or sample_size < 1:
        raise ValueError(f"sample_size must be a whole number above 0 but is {sample_size!r}.")
    if moment.count < 1:
        raise ValueError(f"The moment for {os.fspath(path)!r} has seen no key; update it first.")
    total = moment.sum.cpu().to(dtype)  # (d, d), both triangles
    check_finite(total, f"The sum for {os.fspath(path)!r}")
    count, asked = (np.asarray(number, dtype=np.int64) for number in (moment.count, sample_size))
    arrays: dict[str, Any] = {COUNT: count, SUM: total.numpy(), SAMPLE_SIZE: asked}
    with atomic_file(path) as file:
        np.savez(file, **arrays)


@isolated()
def load_npz(path: StrPath, *, width: int | None = None) -> NpzMoment:
    """Read a moment that another codebase wrote, on the CPU and in the dtype of the file.

    Its keys must have this width; None takes any up to `MAX_WIDTH`.

    Raises:
        FastcovError: There is no such file.
        BadInput: The keys are of another width.
        NonFinite: The sum holds NaN or infinity.
        StoreDamaged: It is no such file, is cut short, is larger than a moment of this width, needs to be unpickled, or
            holds what no sum of ``k k^T`` can be.
    """
    if not Path(path).is_file():
        raise FastcovError(f"There is no file {os.fspath(path)!r}; check its path.")
    widest = MAX_WIDTH if width is None else width
    if os.path.getsize(path) > 8 * widest**2 + _OTHER:  # before its list of contents is read
        raise StoreDamaged(_damaged(path, f"is larger than any moment of width {widest}"))
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(path, archive)
            for name in (COUNT, SUM):
                if name not in members:
                    listed = ", ".join(f"{each:.40}" for each in sorted(members)[:8]) or "nothing"
                    raise StoreDamaged(_damaged(path, f"has no {name} (it holds {listed})"))
            _check_sum(path, archive, members, width)
            count = _scalar(path, archive, members[COUNT], COUNT)
            asked = members.get(SAMPLE_SIZE)
            sample_size = None if asked is None else _scalar(path, archive, asked, SAMPLE_SIZE)
            if count < 1:
                raise StoreDamaged(_damaged(path, f"counts {count} keys"))
            total = _read(archive, members[SUM])
    except _UNREADABLE as error:
        if isinstance(error, BadInput):
            raise
        raise StoreDamaged(_damaged(path, f"is not a readable .npz file ({error})")) from error
    matrix = torch.from_numpy(total.astype(total.dtype.newbyteorder("="), order="C", copy=False))
    check_finite(matrix, f"The sum in {os.fspath(path)!r}")
    if (wrong := not_a_sum(matrix)) is not None:
        raise StoreDamaged(_damaged(path, f"holds no sum of k k^T, for {wrong}"))
    return NpzMoment(SecondMoment.from_lower(matrix, count), sample_size)


def _members(path: StrPath, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The archive's arrays by name."""
    found: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        if name in found:
            raise StoreDamaged(_damaged(path, f"holds {name!r:.40} twice"))
        if info.compress_type not in _PACKED:
            raise StoreDamaged(_damaged(path, f"packs {name!r:.40} in a way that NumPy does not"))
        found[name] = info
    return found


def _check_sum(path: StrPath, archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], width: int | None) -> None:
    """Compare what the sum's header and the archive declare with what the width needs."""
    info = members[SUM]
    shape, dtype, header = _header(path, archive, info)
    if dtype.kind != "f" or dtype.itemsize not in (4, 8):
        raise StoreDamaged(_damaged(path, f"holds a sum of {dtype}, not of float32 or float64"))
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] < 1:
        raise StoreDamaged(_damaged(path, f"holds a sum of shape {shape}, not a square"))
    if width is not None and shape[0] != width:
        raise BadInput(
            f"The file {os.fspath(path)!r} is of keys of width {shape[0]} but those of this module "
            f"have {width}; take the file of this model and layer."
        )
    if shape[0] > MAX_WIDTH:
        raise BadInput(
            f"The file {os.fspath(path)!r} claims keys of width {shape[0]}, beyond {MAX_WIDTH}; "
            "say which width is right if it is."
        )
    needed = header + shape[0] * shape[1] * dtype.itemsize
    if info.file_size != needed:
        raise StoreDamaged(
            _damaged(path, f"has {info.file_size} bytes for a sum of shape {shape}, which takes {needed}")
        )
    if info.file_size > _EXPANSION * info.compress_size + (1 << 24):
        raise StoreDamaged(_damaged(path, f"expands {info.compress_size} bytes to {info.file_size}"))


def _scalar(path: StrPath, archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> int:
    """A whole number that is an array of one entry."""
    shape, dtype, header = _header(path, archive, info)
    if shape not in ((), (1,)) or dtype.kind not in "iuf":
        raise StoreDamaged(_damaged(path, f"has a {name} that is {dtype} of shape {shape}, not a whole number"))
    if info.file_size != header + dtype.itemsize:
        raise StoreDamaged(_damaged(path, f"has a {name} of {info.file_size} bytes"))
    value = float(_read(archive, info).reshape(()))
    if not value.is_integer():
        raise StoreDamaged(_damaged(path, f"has a {name} of {value:g}, which is not a whole number"))
    return int(value)


def _header(path: StrPath, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[tuple[int, ...], Any, int]:
    """Shape and dtype of an array, and how many bytes come before its numbers."""
    from numpy.lib import format as npy

    with archive.open(info) as stream:
        version = npy.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise StoreDamaged(_damaged(path, f"holds an array of version {version}"))
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read(stream, max_header_size=_HEADER)
        if dtype.hasobject:
            raise StoreDamaged(_damaged(path, f"holds Python objects as {info.filename.removesuffix('.npy')}"))
        return shape, dtype, stream.tell()


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Any:
    """An array, from a member whose header was checked."""
    from numpy.lib import format as npy

    with archive.open(info) as stream:
        return npy.read_array(stream, allow_pickle=False, max_header_size=_HEADER)


def _damaged(path: StrPath, what: str) -> str:
    return f"The file {os.fspath(path)!r} {what}; get it again, or precompute the moment here."
