"""Files: written whole or not at all; text of strangers made printable, and their JSON read with one meaning.

Safetensors files are written here, so that their bytes depend on their content alone.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import secrets
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor

#: What a safetensors file calls each dtype that is written.
DTYPE_NAMES = {torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16"}
#: A place in the file system, as every public function takes it.
StrPath = str | os.PathLike[str]
_WRITE_BYTES = 16 << 20  # written and digested at a time

#: Lists and objects inside one another at most. Python's own limit is met in different places by
#: what reads a value, shows it and compares it; this one is met first, and where it is read.
MAX_DEPTH = 100

# The C0 and C1 controls with DEL; Unicode's Bidi_Control, which reorders what is around it; line ends for Unicode,
# though for no terminal; and halves of surrogate pairs, which no encoding can write.
_CONTROLS = (*range(0x20), *range(0x7F, 0xA0))
_BIDI = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_OTHERS = (0x2028, 0x2029, *range(0xD800, 0xE000))
_FIELD = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in (*_CONTROLS, *_BIDI, *_OTHERS)}
_LINES = {code: text for code, text in _FIELD.items() if chr(code) not in "\n\t"}


def printable(text: str, *, lines: bool = False) -> str:
    """`text` with every control character spelled out; `lines` leaves line feeds and tabs.

    Everything that reaches a person goes through here: messages of errors, lines of the command line and of logs, and
    what a report is made of.
    """
    # The test is quick, and text with nothing to spell out is almost all of it.
    return text if text.isprintable() else text.translate(_LINES if lines else _FIELD)


class _Printable(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(record.getMessage(), lines=True), None
        return True


def printable_logger(name: str) -> logging.Logger:
    """A module's logger, for records that quote files: they are printable whoever handles them."""
    found = logging.getLogger(name)
    if not any(isinstance(one, _Printable) for one in found.filters):
        found.addFilter(_Printable())
    return found


logger = printable_logger(__name__)


def parse_json(text: str | bytes) -> Any:
    """The value in a JSON text, or in its bytes in UTF-8.

    Raises:
        ValueError: It is not UTF-8 or not JSON (`json.JSONDecodeError` says where), has NaN or an infinity or a number
            beyond float64, an object has a key twice (of which readers take the first or the last), a whole number has
            thousands of digits, or lists and objects are more than `MAX_DEPTH` deep.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    too_deep = ValueError(f"lists and objects are more than {MAX_DEPTH} deep")
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_float=_number, parse_constant=_no_number)
    except RecursionError:
        raise too_deep from None
    # What has few brackets is not deep, and most texts have few.
    level = [value] if text.count("[") + text.count("{") > MAX_DEPTH else []
    for _ in range(MAX_DEPTH):
        parts = [list(one.values()) if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list))]
        level = [inner for part in parts for inner in part if isinstance(inner, (dict, list))]
    if level:
        raise too_deep
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r:.80} is there twice in one object")
            seen.add(key)
    return found


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text:.40} is too large")
    return value


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, in C order on the CPU."""
    flat: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


@dataclass(frozen=True)
class Later:
    """A tensor of this dtype and shape that is fetched when it is its turn to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    fetch: Callable[[], Tensor]


def write_safetensors(
    file: BinaryIO, tensors: Mapping[str, Tensor | Later], metadata: Mapping[str, str], *, digest: bool = False
) -> None:
    """Write a safetensors file whose bytes depend on its content alone, tensors and metadata in their order.

    The library writes metadata in no fixed order, and reports a full disk as an error of its own. With `digest` there
    is a last tensor ``sha256``, uint8 (32,), the digest of all bytes before it. OSError is raised where the file cannot
    be written.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in tensors.items():
        size = math.prod(tensor.shape) * tensor.dtype.itemsize
        offsets = [offset, offset + size]
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        offset += size
    if digest:
        header["sha256"] = {"dtype": "U8", "shape": [32], "data_offsets": [offset, offset + 32]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    written = hashlib.sha256()

    def write(data: bytes | memoryview) -> None:
        for start in range(0, len(data), _WRITE_BYTES):
            piece = data[start : start + _WRITE_BYTES]
            if digest:
                written.update(piece)
            file.write(piece)

    write(len(head).to_bytes(8, "little") + head)
    for tensor in tensors.values():
        write(raw_bytes(tensor.fetch() if isinstance(tensor, Later) else tensor))
    if digest:
        file.write(written.digest())


@contextlib.contextmanager
def atomic_file(path: StrPath) -> Iterator[BinaryIO]:
    """A file to write that takes its name only when all is written and on the disk; missing folders are made.

    On any exception the temporary file beside it is removed, and a former file stays as it was. A file that is replaced
    hands on its mode, and its owner and group where the system lets it. Through a symbolic link the file behind it is
    written. A device, a pipe, or what this process has open as its output (``/dev/stdout``) is no file that could be
    replaced: it is written into. Where nobody reads a pipe for five seconds, a warning says that what is written is
    lost.

    Raises:
        IsADirectoryError: It is a folder.
        OSError: The file cannot be written, or it is a socket.
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
    head = os.fsencode(final.name)[:200].decode("utf-8", "ignore")  # of 255 bytes, 30 more are needed here
    temporary = final.with_name(f".{head}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
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
    """What is no file to be replaced, open for writing; None for a file."""
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
                message = "nobody reads the pipe %r, so what is written into it is lost; start its reader first"
                logger.warning(message, os.fspath(path))
                return open(os.devnull, "wb")
            time.sleep(0.05)
        else:
            os.set_blocking(descriptor, True)
            return os.fdopen(descriptor, "wb")
