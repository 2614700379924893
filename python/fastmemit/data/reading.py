"""Text and JSON files as they come from other people: read once, checked, never guessed at."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fastcov import parsing

#: A file that must be parsed whole (a JSON list) may not be larger than this, in bytes.
MAX_WHOLE_FILE = 1 << 30

#: One line or one document may not be larger than this, in bytes.
MAX_LINE = 1 << 28

_BOM = b"\xef\xbb\xbf"


class Line(NamedTuple):
    """One line of a text file."""

    number: int  # from 1
    offset: int  # of its first byte in the file
    size: int  # in bytes, with its line end
    text: str


class Value(NamedTuple):
    """One JSON value and where it stands, in words for an error message."""

    place: str
    value: Any


def check_file(path: Path, error: type[Exception]) -> None:
    """Make sure that `path` is a file with something in it.

    Raises:
        error: It does not exist, is a folder, or is empty.
    """
    if path.is_dir():
        raise error(f"{path} is a folder; give one file.")
    if not path.exists():
        raise error(f"The file {path} does not exist; check its path.")
    if path.stat().st_size == 0:
        raise error(f"The file {path} is empty; give one that holds data.")


def read_lines(path: Path, error: type[Exception]) -> Iterator[Line]:
    """Yield the lines of a UTF-8 file; a byte order mark at the start is dropped.

    Raises:
        error: A byte is not UTF-8 (its position is named), or a line is over `MAX_LINE`.
    """
    offset = 0
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE + 1):
            number += 1
            if len(raw) > MAX_LINE:
                raise error(
                    f"Line {number} of {path} is longer than {MAX_LINE >> 20} MiB; "
                    "split it into one record or document a line."
                )
            yield Line(number, offset, len(raw), decode(raw, path, offset, error))
            offset += len(raw)


def decode(raw: bytes, path: Path, offset: int, error: type[Exception]) -> str:
    """`raw`, found `offset` bytes into the file, as text.

    Raises:
        error: It is not UTF-8.
    """
    try:
        return (raw.removeprefix(_BOM) if offset == 0 else raw).decode("utf-8")
    except UnicodeDecodeError as bad:
        # bad.start counts from after a byte order mark that was taken off.
        start = offset + bad.start + (len(_BOM) if offset == 0 and raw.startswith(_BOM) else 0)
        raise error(
            f"{path} is not UTF-8 text: byte {start} (0x{bad.object[bad.start]:02x}) cannot be "
            "decoded; save the file as UTF-8."
        ) from None


def parse_json(text: str, place: str, error: type[Exception]) -> Any:
    """The JSON value in `text`.

    Raises:
        error: It is not JSON; the message carries `place`.
    """
    try:
        return parsing.parse_json(text)
    except json.JSONDecodeError as bad:
        where = f"line {bad.lineno}, " if "\n" in text.strip() else ""
        raise error(
            f"{place} is not JSON ({where}column {bad.colno}: {bad.msg}); write a JSON list, or one JSON object a line."
        ) from None
    except ValueError as bad:
        raise error(f"{place} cannot be read as JSON ({bad}); correct or remove it.") from None


def is_json_list(path: Path) -> bool:
    """Whether the file's first character that is not white space opens a list."""
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(_BOM).lstrip()
    return head.startswith(b"[")


def read_whole(path: Path, error: type[Exception]) -> str:
    """A whole UTF-8 file of at most `MAX_WHOLE_FILE` bytes.

    Raises:
        error: It is larger, or not UTF-8.
    """
    size = path.stat().st_size
    if size > MAX_WHOLE_FILE:
        raise error(
            f"{path} is a JSON list of {size / 2**30:.1f} GiB, more than the "
            f"{MAX_WHOLE_FILE >> 30} GiB that are parsed in one piece; write one object a line."
        )
    return decode(path.read_bytes(), path, 0, error)


def read_values(path: Path, error: type[Exception]) -> Iterator[Value]:
    """Yield the values of a JSON list, or of a file with one JSON value a line.

    Which of the two it is shows in its first character, not in its name. White lines are skipped.

    Raises:
        error: The file is missing, empty, not UTF-8, not JSON, or one object over several lines.
    """
    check_file(path, error)
    if is_json_list(path):
        for index, value in enumerate(parse_json(read_whole(path, error), str(path), error)):
            yield Value(f"item {index}", value)
        return
    for line in read_lines(path, error):
        if not line.text.strip():
            continue
        place = f"Line {line.number} of {path}"
        if line.text.strip() == "{":  # an object that somebody indented; a JSONL line is complete
            raise error(
                f"{place} opens one JSON object that goes on over several lines; write a list of "
                "records, [ ... ], or each record on a line of its own."
            )
        yield Value(f"line {line.number}", parse_json(line.text, place, error))


def is_clean_text(value: object) -> bool:
    """Whether `value` is text that can be encoded (JSON can spell half of a surrogate pair)."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
