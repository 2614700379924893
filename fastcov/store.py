"""Moments on disk: one safetensors file each, with provenance, atomic and verified.

The file holds one tensor, ``sum``: the lower triangle of the sum of ``k k^T``, row by row, as a vector of d (d + 1) / 2
numbers. Its metadata are ``format``, ``d``, ``count``, ``dtype``, ``sha256`` (of the tensor's bytes), ``quartic`` (the
sum of ``||k||^4``, absent where it is not known, as in files of the first version), ``provenance`` (a JSON object of
what the moment belongs to) and ``check`` (SHA-256 of all the other metadata), so that neither half can change
unnoticed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fastcov.batching import raw_bytes
from fastcov.errors import StoreDamaged, StoreMismatch, StoreMissing
from fastcov.hooks import isolated
from fastcov.moments import SecondMoment, check_moment
from fastcov.parsing import parse_json
from fastcov.printable import printable_logger

logger = printable_logger(__name__)

FORMAT = 1
_DTYPES = {"F32": torch.float32, "F64": torch.float64}
#: What a safetensors file calls each dtype that is written.
DTYPE_NAMES = {torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16"}
_WRITE_BYTES = 64 << 20
_ABSENT = object()


@isolated()
def save_moment(path: str | os.PathLike[str], moment: SecondMoment, provenance: Mapping[str, Any]) -> None:
    """Write a moment; the file under this name is either the old one or the whole new one.

    Args:
        path: Where to; missing folders are made.
        moment: What to write; its sum is stored as it is, without rounding.
        provenance: What the moment belongs to (model, module, corpus, ...), as JSON values.

    Raises:
        ValueError: The provenance is not JSON.
        BadInput: It is no moment.
        OSError: The file cannot be written; nothing is left of the attempt.
    """
    check_moment(moment, "A store")
    triangle = packed(moment.lower)  # (d (d + 1) / 2,)
    metadata = {
        "format": str(FORMAT),
        "d": str(moment.d),
        "count": str(moment.count),
        "dtype": DTYPE_NAMES[triangle.dtype],
        "sha256": hashlib.sha256(raw_bytes(triangle)).hexdigest(),
        "provenance": _json(provenance),
    }
    # Optional, so that the format stays the same: a reader that does not know it loads the rest.
    if moment.quartic is not None and math.isfinite(quartic := float(moment.quartic)):
        metadata["quartic"] = repr(quartic)  # the shortest text of these very bits
    metadata["check"] = _digest(metadata)
    with atomic_file(path) as file:
        write_safetensors(file, {"sum": triangle}, metadata)


def write_safetensors(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whose bytes depend on its content alone.

    The library writes metadata in no fixed order, and reports a full disk as an error of its own.

    Args:
        file: Open for writing.
        tensors: In the order in which they are written.
        metadata: In its order.

    Raises:
        OSError: The file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    file.write(len(head).to_bytes(8, "little") + head)
    for tensor in tensors.values():
        data = raw_bytes(tensor)
        for start in range(0, len(data), _WRITE_BYTES):
            file.write(data[start : start + _WRITE_BYTES])


@isolated()
def load_moment(
    path: str | os.PathLike[str], expect: Mapping[str, Any] | None = None
) -> tuple[SecondMoment, dict[str, Any]]:
    """Read a moment and what it belongs to, every byte verified.

    Args:
        path: The file.
        expect: Provenance that the file must have, field by field; fields not named here may be anything. Compared
            before the sum is read.

    Returns:
        The moment, on the CPU, and its provenance.

    Raises:
        StoreMissing: There is no such file.
        StoreDamaged: The file is not what was written.
        StoreMismatch: A field of the provenance is not as expected, or a newer version wrote it.
    """
    with _opened(path) as (file, metadata):
        provenance = _provenance(path, metadata)
        if expect is not None:
            _compare(path, provenance, expect)
        triangle: Tensor = file.get_tensor("sum")
    d, count = _number(path, metadata, "d"), _number(path, metadata, "count")
    if triangle.dim() != 1 or d < 1 or triangle.numel() != d * (d + 1) // 2:
        raise _damaged(path, f"holds a sum of shape {tuple(triangle.shape)} for a width of {d}")
    if triangle.dtype != _DTYPES.get(metadata.get("dtype", "")):
        raise _damaged(path, f"holds a sum of {triangle.dtype} and says {_said(metadata, 'dtype')}")
    found = hashlib.sha256(raw_bytes(triangle)).hexdigest()
    if found != metadata.get("sha256"):
        raise _damaged(path, "holds a sum whose bytes have changed")
    lower = unpacked(triangle, d)
    return SecondMoment.from_lower(lower, count, _quartic(path, metadata)), provenance


def read_provenance(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a stored moment belongs to, from the header alone.

    Raises:
        StoreMissing: There is no such file.
        StoreDamaged: The header is not what was written, or the file is too short or too long.
        StoreMismatch: A newer version wrote it.
    """
    with _opened(path) as (_, metadata):
        return _provenance(path, metadata)


def packed(lower: Tensor) -> Tensor:
    """The lower triangle of a matrix (d, d), row by row, as (d (d + 1) / 2,) on the CPU."""
    lower = lower.detach().cpu()
    return torch.cat([lower[i, : i + 1] for i in range(lower.shape[0])])


def unpacked(triangle: Tensor, d: int) -> Tensor:
    """What `packed` was given, (d, d), with zeros above the diagonal."""
    lower = torch.zeros(d, d, dtype=triangle.dtype)
    for i, row in enumerate(torch.split(triangle, list(range(1, d + 1)))):
        lower[i, : i + 1] = row
    return lower


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write that takes its name only when all is written and on the disk.

    On any exception the temporary file beside it is removed, and a former file stays as it was. A file that is replaced
    hands on its mode, and its owner and group where the system lets it. Through a symbolic link the file behind it is
    written. A device, a pipe, or what this process has open as its output (``/dev/stdout``) is no file that could be
    replaced: it is written into. Where nobody reads a pipe for five seconds, a warning says that what is written is
    lost.

    Args:
        path: The final name; missing folders are made.

    Raises:
        OSError: The file cannot be written, or it is a folder or a socket.
    """
    given = Path(path)
    try:
        former = os.stat(given)
    except FileNotFoundError:  # a link to nowhere among them, whose file is then made
        former = None
    if former is not None and stat.S_ISDIR(former.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(given))
    stream = former and _stream(given, former)
    if stream is not None:
        with stream as file:
            yield file
        return
    final = Path(os.path.realpath(given))
    final.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile, whose files only their owner can read: statistics are shared. What replaces a
    # file that others may not read is not theirs to read while it is written either.
    temporary = final.with_name(_temporary(final.name))
    mode = 0o666 if former is None else 0o600
    try:
        with open(temporary, "xb", opener=partial(os.open, mode=mode)) as file:
            if former is not None:
                _hand_on(file.fileno(), former)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, final)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    # The name itself reaches the disk with the folder; not every system lets a folder be synced.
    with contextlib.suppress(OSError):
        folder = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


_NAME_BYTES = 200  # of 255, which the name of a temporary file needs 30 more of


def _temporary(name: str) -> str:
    head = os.fsencode(name)[:_NAME_BYTES].decode("utf-8", "ignore")
    return f".{head}.{os.getpid()}-{secrets.token_hex(4)}.tmp"


def _hand_on(descriptor: int, former: os.stat_result) -> None:
    """Give a new file the mode of the one it replaces, and its owner as far as that is allowed."""
    if os.name != "posix":
        return
    mode = stat.S_IMODE(former.st_mode)
    try:
        os.fchown(descriptor, -1, former.st_gid)
    except OSError:  # another group would get what was meant for the former one
        mode = mode & ~0o070 | (mode & 0o007) << 3
    with contextlib.suppress(OSError):
        os.fchown(descriptor, former.st_uid, -1)
    os.fchmod(descriptor, mode)


def _stream(path: Path, found: os.stat_result) -> BinaryIO | None:
    """What is no file to be replaced, open for writing; None for a file.

    Raises:
        OSError: It cannot be opened.
    """
    for descriptor, text in ((1, sys.stdout), (2, sys.stderr)):
        with contextlib.suppress(OSError):
            if os.path.samestat(found, os.fstat(descriptor)):
                with contextlib.suppress(AttributeError, ValueError):
                    text.flush()  # what was printed before comes before
                return os.fdopen(os.dup(descriptor), "wb")
    if os.path.realpath(path.parent) == os.path.realpath("/proc/self/fd"):
        return os.fdopen(os.dup(int(path.name)), "wb")  # /dev/fd/3 is the shell's 3>file
    if stat.S_ISFIFO(found.st_mode):
        return _pipe(path)
    return None if stat.S_ISREG(found.st_mode) else open(path, "wb")


_READER_SECONDS = 5.0


def _pipe(path: Path) -> BinaryIO:
    """A named pipe; without a reader, which a plain open would wait for without end, nothing."""
    until = time.monotonic() + _READER_SECONDS
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            if time.monotonic() >= until:
                logger.warning(
                    "nobody reads the pipe %r, so what is written into it is lost; start its reader first",
                    os.fspath(path),
                )
                return open(os.devnull, "wb")
            time.sleep(0.05)
        else:
            os.set_blocking(descriptor, True)
            return os.fdopen(descriptor, "wb")


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[Any, dict[str, str]]]:
    """The open file and its metadata, checked; the sum is not read yet."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).exists():
        raise StoreMissing(f"There is no stored moment at {os.fspath(path)!r}; precompute it first.")
    if not Path(path).is_file():  # to open a pipe is to wait for somebody to write into it
        raise _damaged(path, "is not a file")
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            _check(path, metadata)
            if set(file.keys()) != {"sum"}:
                raise _damaged(path, f"holds {sorted(file.keys())!s:.80} and not a sum")
            yield file, metadata
    except SafetensorError as error:
        raise _damaged(path, f"is not a readable safetensors file ({error!s:.120})") from error


def _check(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Refuse metadata of another format, or that are not what was written."""
    sound = metadata.get("check") == _digest(metadata)
    version = _whole(metadata.get("format", ""))
    if sound and version is not None and version > FORMAT:
        raise StoreMismatch(
            f"The moment {os.fspath(path)!r} has format {version} but this fastcov knows {FORMAT}; "
            "upgrade, or delete the file and precompute again.",
            field="format",
            stored=version,
            expected=FORMAT,
        )
    if not sound:
        raise _damaged(path, "has a header that is not what was written")


def _quartic(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> float | None:
    """The sum of ``||k||^4``, or None in a file that does not say."""
    if "quartic" not in metadata:
        return None
    try:
        value = float(metadata["quartic"])
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise _damaged(path, f"says {metadata['quartic']!r:.40} for a sum of fourth powers")
    return value


def _provenance(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        value = parse_json(metadata["provenance"])
    except (KeyError, ValueError) as error:
        raise _damaged(path, "has no readable provenance") from error
    if not isinstance(value, dict):
        raise _damaged(path, "has a provenance that is not an object")
    return value


def _number(path: str | os.PathLike[str], metadata: Mapping[str, str], name: str) -> int:
    value = _whole(metadata.get(name, ""))
    if value is None:
        raise _damaged(path, f"says {_said(metadata, name)} for its {name}")
    return value


def _whole(text: str) -> int | None:
    """The number in a text of up to 18 digits, which is more than any count."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 18 else None


def _said(metadata: Mapping[str, str], name: str) -> str:
    return f"{metadata.get(name)!r:.40}"


def _compare(path: str | os.PathLike[str], provenance: Mapping[str, Any], expect: Mapping[str, Any]) -> None:
    for field, value in json.loads(_json(expect)).items():
        stored = provenance.get(field, _ABSENT)
        if stored != value:
            shown = "not on record" if stored is _ABSENT else repr(stored)
            raise StoreMismatch(
                f"The moment {os.fspath(path)!r} is of something else: its {field} is {shown} but "
                f"{value!r} is expected; precompute it for these settings, in another file.",
                field=field,
                stored=None if stored is _ABSENT else stored,
                expected=value,
            )


def _json(values: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(dict(values), sort_keys=True, allow_nan=False)
        parse_json(text)  # what a reader would refuse is not written
        return text
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Provenance must be JSON but is not ({error}); pass text, numbers, lists and objects."
        ) from error


def _digest(metadata: Mapping[str, str]) -> str:
    kept = {name: value for name, value in metadata.items() if name != "check"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _damaged(path: str | os.PathLike[str], what: str) -> StoreDamaged:
    return StoreDamaged(f"The file {os.fspath(path)!r} {what}; delete it and precompute the moment again.")
