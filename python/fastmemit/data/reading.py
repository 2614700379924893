"""Text and JSON files as they come from other people, and data sets of the hub: checked, never guessed at.

What is wrong is raised as the `error` that a caller names.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlopen

from fastcov import files
from fastcov.files import atomic_file
from fastmemit.files import cache_dir, shared_folder

MAX_WHOLE_FILE = 1 << 30  # bytes of a file that must be read whole: a JSON list, a text for perplexity
MAX_LINE = 1 << 28  # bytes of one line or one document
PREFIX = "hub:"  # how a hub data set is named where a file could stand too
#: What may stand in the place of a file.
NAMES = ("builtin", "counterfact", "mquake", "rippleedits", "self", "wikipedia", "zsre")

_SECONDS = 60  # that an address may be silent
_BOM = b"\xef\xbb\xbf"
_SPLIT = re.compile(r"[A-Za-z0-9_.]+")


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


def name_meant(word: str) -> str:
    """``" Did you mean 'x'?"`` where a word that is no file is nearly a name, else nothing."""
    near = difflib.get_close_matches(word.lower(), NAMES, 1, 0.7)
    return f" Did you mean {near[0]!r}?" if near else ""


def check_file(path: Path, error: type[Exception]) -> None:
    """Make sure that `path` is a file with something in it."""
    if path.is_dir():
        raise error(f"{path} is a folder; give one file.")
    if not path.exists():
        raise error(f"The file {path} does not exist; check its path.{name_meant(str(path))}")
    if path.stat().st_size == 0:
        raise error(f"The file {path} is empty; give one that holds data.")


def read_whole(path: Path, error: type[Exception], fix: str) -> bytes:
    """The bytes of a file that is taken in one piece; the error says what to do where it is too large for that."""
    check_file(path, error)
    size = path.stat().st_size
    if size > MAX_WHOLE_FILE:
        raise error(
            f"{path} has {size / 2**30:.1f} GiB, more than the {MAX_WHOLE_FILE >> 30} GiB that are read in one piece; "
            f"{fix}."
        )
    return path.read_bytes()


def read_lines(path: Path, error: type[Exception]) -> Iterator[Line]:
    """Yield the lines of a UTF-8 file, of `MAX_LINE` bytes at most; a byte order mark at the start is dropped."""
    offset = number = 0
    with path.open("rb") as file:
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
    """`raw`, found `offset` bytes into the file, as text, if it is UTF-8."""
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
    """The JSON value in `text`; a message of what is wrong carries `place`."""
    try:
        return files.parse_json(text)
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
        return file.read(4096).removeprefix(_BOM).lstrip().startswith(b"[")


def read_values(path: Path, error: type[Exception]) -> Iterator[Value]:
    """Yield the values of a JSON list, or of a file with one JSON value a line.

    Which of the two it is shows in its first character, not in its name. White lines are skipped; one object over
    several lines is refused.
    """
    check_file(path, error)
    if is_json_list(path):
        text = decode(read_whole(path, error, "write one object a line"), path, 0, error)
        for index, value in enumerate(parse_json(text, str(path), error)):
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


class HubName(NamedTuple):
    """What ``hub:NAME[:CONFIG][@SPLIT]`` names."""

    name: str  # the data set, such as ``wikimedia/wikipedia``, or a local folder of files
    config: str | None  # one of its configurations, such as ``20231101.en``
    split: str | None  # one of its splits

    def __str__(self) -> str:
        return self.name if self.config is None else f"{self.name} ({self.config})"

    @property
    def spec(self) -> str:
        """The name and the configuration as they are written, without the split."""
        return PREFIX + (self.name if self.config is None else f"{self.name}:{self.config}")


def parse_name(spec: str, error: type[Exception]) -> HubName:
    """Take ``hub:NAME``, ``hub:NAME:CONFIG`` or either with ``@SPLIT`` apart."""
    rest, split = spec.removeprefix(PREFIX).strip(), None
    # A folder may have an @ in its name; a data set on the hub has none.
    if "@" in rest and not Path(rest).is_dir():
        rest, _, split = rest.rpartition("@")
        if not _SPLIT.fullmatch(split):
            raise error(
                f"{spec!r} names no split behind its @; write hub:NAME[:CONFIG]@SPLIT with one "
                "split's name, such as train."
            )
    name, _, config = rest.partition(":")
    if not name.strip():
        raise error(f"{spec!r} names no data set; write hub:NAME[:CONFIG][@SPLIT].")
    return HubName(name.strip(), config.strip() or None, split)


def load_splits(spec: str, error: type[Exception], fix: str) -> dict[str, Any]:
    """The split that is named, or all, of a hub data set, downloaded (and cached by `datasets`).

    `fix` ends the sentence that says that `datasets` cannot load it.
    """
    wanted = parse_name(spec, error)
    try:
        import datasets

        loaded = dict(datasets.load_dataset(wanted.name, wanted.config))
    except Exception as bad:
        raise error(_cannot_load(wanted, bad, fix)) from bad
    if wanted.split is None:
        return loaded
    if wanted.split not in loaded:
        raise error(_no_split(wanted, wanted.split, list(loaded)))
    return {wanted.split: loaded[wanted.split]}


def open_stream(spec: str, error: type[Exception], fix: str) -> tuple[Any, HubName, str]:
    """One split as a stream (``train`` if none is named), what it is of, and its revision; nothing is loaded whole."""
    wanted = parse_name(spec, error)
    split = wanted.split or "train"
    try:
        import datasets

        builder = datasets.load_dataset_builder(wanted.name, wanted.config)
        stream = builder.as_streaming_dataset(split=split)
    except Exception as bad:
        known = re.search(r"Bad split: .*Available splits: \[(.*)\]", str(bad))
        if known:
            splits = [name.strip(" '\"") for name in known.group(1).split(",")]
            raise error(_no_split(wanted, split, splits)) from bad
        raise error(_cannot_load(wanted, bad, fix)) from bad
    return stream, wanted._replace(split=split), str(builder.hash)


def _no_split(wanted: HubName, split: str, known: list[str]) -> str:
    return (
        f"The hub data set {wanted} has no split {split!r} (its splits: {', '.join(known)}); name "
        f"one of them, as in {wanted.spec}@{known[0]}."
    )


def _cannot_load(wanted: HubName, bad: Exception, fix: str) -> str:
    lines = str(bad).strip().splitlines()
    reason = f"{type(bad).__name__}: {lines[0][:160]}" if lines else type(bad).__name__
    return f"The hub data set {wanted} could not be loaded ({reason.rstrip('.')}); {fix}"


def downloaded(name: str, address: str, error: type[Exception]) -> Path:
    """The file at an address, kept in the cache under a name; without a network `error`, in one sentence."""
    path = cache_dir() / "data" / f"{name}.json"
    if path.is_file():
        return path
    missing = f"The data {name!r} cannot be fetched from {address} ({{}}); give its file instead of the name."
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        raise error(missing.format("HF_HUB_OFFLINE is set"))
    try:
        with urlopen(address, timeout=_SECONDS) as found:
            data = found.read(MAX_WHOLE_FILE + 1)
    except (OSError, HTTPException) as failed:  # a URLError is an OSError; an answer that is cut short is not
        raise error(missing.format(str(getattr(failed, "reason", failed)).rstrip("."))) from None
    if len(data) > MAX_WHOLE_FILE:
        raise error(missing.format(f"it is larger than {MAX_WHOLE_FILE:,} bytes"))
    shared_folder(path.parent)
    with atomic_file(path) as file:
        file.write(data)
    return path
