"""The results of a sweep on disk: a line a cell, written at once, and put in order at the end."""

from __future__ import annotations

import json
import lzma
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from fastcov.parsing import parse_json
from fastcov.printable import printable_logger
from fastcov.store import atomic_file
from fastmemit.errors import BadData
from fastmemit.files import alone

log = printable_logger(__name__)

RESULTS, TIMINGS = "results.jsonl", "timings.jsonl"
_UNBOUNDED = "inf"
_LARGEST = 1 << 30  # bytes of lines that a compressed file may hold
_MEMORY = 1 << 27  # bytes that decompressing may take besides


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of lines; what a killed process left of the last one is left out.

    Raises:
        BadData: Another line is not a JSON object with a key, or this is no file.
        OSError: The file cannot be read.
    """
    if not path.is_file():
        raise BadData(f"{str(path)!r} is not a file; put the results there that a sweep wrote.")
    lines = _content(path).split(b"\n")
    found = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            value = parse_json(line)
            if not isinstance(value, dict) or not isinstance(value.get("key"), str):
                raise ValueError("it has no key")
            value = _with_perplexity(value, _UNBOUNDED, math.inf)
        except ValueError as error:
            if number == len(lines):  # no end of line behind it: it was never finished
                log.warning("%s ends in the middle of a line, which is left out", path)
                break
            raise BadData(
                f"Line {number} of {str(path)!r} is not a result ({error}); delete the line, and "
                "the sweep will run its cell again."
            ) from error
        found.append(value)
    return found


def _content(path: Path) -> bytes:
    """The bytes of a plain file, or of one that `xz` compressed."""
    data = path.read_bytes()
    if path.suffix != ".xz":
        return data
    try:
        reader = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY)
        found = reader.decompress(data, max_length=_LARGEST)
    except lzma.LZMAError as error:
        raise BadData(f"{str(path)!r} cannot be decompressed ({error}); restore it from a copy.") from None
    if not reader.eof or reader.unused_data:
        raise BadData(f"{str(path)!r} is cut short, or holds more than {_LARGEST >> 30} GiB; restore it from a copy.")
    return found


def read_results(folder: Path, name: str = RESULTS) -> dict[str, dict[str, Any]]:
    """The finished cells of a folder by key, those of shards and of files that `xz` compressed included.

    Args:
        folder: The sweep's.
        name: ``results.jsonl`` or ``timings.jsonl``.

    Raises:
        BadData: A line is damaged, or two files have different results of one cell.
    """
    stem = name.removesuffix(".jsonl")
    found: dict[str, dict[str, Any]] = {}
    where: dict[str, Path] = {}
    for path in sorted([*folder.glob(f"{stem}*.jsonl"), *folder.glob(f"{stem}*.jsonl.xz")]):
        for value in read_lines(path):
            key = value["key"]
            if key in found and found[key] != value and name == RESULTS:
                raise BadData(
                    f"{str(where[key])!r} and {str(path)!r} have different results of {key}; "
                    "delete the line that is not of this sweep."
                )
            found.setdefault(key, value)
            where.setdefault(key, path)
    return found


def read_unedited(path: Path, fingerprint: str, cases: Sequence[int]) -> dict[int, dict[str, Any]] | None:
    """The unedited model's scores that a sweep kept, by case.

    Args:
        path: The file, ``unedited.json``.
        fingerprint: Of the model.
        cases: The records, in their order.

    Returns:
        The scores; None where there is no such file, or it is of another model or other records.

    Raises:
        BadData: The file is not what was written.
    """
    if not path.is_file():
        return None
    try:
        stored = parse_json(path.read_bytes())
        if (stored["fingerprint"], stored["cases"]) != (fingerprint, list(cases)):
            return None
        found = {value["case_id"]: dict(value) for value in stored["scores"]}
        if list(found) != list(cases):
            raise ValueError("its scores are not those of its cases")
        return found
    except (ValueError, TypeError, KeyError) as error:
        raise BadData(
            f"{str(path)!r} is not what was written ({error}); delete it, and the unedited scores are taken again."
        ) from error


class ResultsFile:
    """A file of lines that one process writes and that is whole after every line.

    Args:
        path: The file; it may be there already.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def repair(self) -> None:
        """Cut off what a killed process left of its last line."""
        if not self.path.is_file():
            return
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            with open(self.path, "r+b") as file:
                file.truncate(whole)

    def append(self, value: Mapping[str, Any]) -> None:
        """Add a line, and see that it is on the disk.

        Raises:
            OSError: It cannot be written; the lines before stay, and no part of this one.
        """
        line = line_of(value)
        with open(self.path, "ab", buffering=0) as file:  # closing has nothing left to write
            before = file.seek(0, os.SEEK_END)
            try:
                left = memoryview(line)
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except BaseException:
                with suppress(OSError):
                    file.truncate(before)
                raise


def line_of(value: Mapping[str, Any]) -> bytes:
    """One line of a results file.

    A perplexity without bound, for which JSON has no number, is the text "inf" there.

    Raises:
        ValueError: Another number is not finite, which no reader takes.
    """
    value = unbounded_as_text(value)
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return (text + "\n").encode()


def unbounded_as_text(value: Mapping[str, Any]) -> dict[str, Any]:
    """A result with the text "inf" for a perplexity without bound, as files have it."""
    return _with_perplexity(value, math.inf, _UNBOUNDED)


def _with_perplexity(value: Mapping[str, Any], one: Any, other: Any) -> dict[str, Any]:
    """A line with `other` for `one` in its perplexity, a number (sequences) or several (sweeps)."""
    found = value.get("perplexity")
    if isinstance(found, Mapping):
        found = {name: other if part == one else part for name, part in found.items()}
    elif found == one:
        found = other
    return {**value, "perplexity": found} if "perplexity" in value else dict(value)


def gather(folder: Path, keys: Sequence[str]) -> None:
    """Gather results and timings of all shards into one file each, in the order of the plan.

    Nothing is lost on the way: the whole file is there before a shard's goes, and that of a shard that runs at this
    time stays; the next sweep gathers the rest of it. Cells of another plan in the same folder stay, behind the others.
    """
    with ExitStack() as stack:
        ended = []
        for path in sorted(folder.glob("results-*of*.jsonl")):
            try:
                stack.enter_context(locked(path))
            except BadData:
                log.warning("%s is still being written; what it has now is gathered", path)
            else:
                ended.append(path)
        for name in (RESULTS, TIMINGS):
            _write_in_order(folder, name, keys)
        for path in ended:
            for name in (RESULTS, TIMINGS):
                of_shard = path.name.replace("results", name.removesuffix(".jsonl"), 1)
                path.with_name(of_shard).unlink(missing_ok=True)


def _write_in_order(folder: Path, name: str, keys: Sequence[str]) -> None:
    found = read_results(folder, name)
    order = [*(key for key in keys if key in found), *(k for k in found if k not in set(keys))]
    with atomic_file(folder / name) as file:
        for key in order:
            file.write(line_of(found[key]))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Nobody else writes this file inside.

    Raises:
        BadData: Another process does so now.
    """
    lock = path.with_name(f".{path.name}.lock")
    with alone(lock, "writing these results", wait=False) as ours:
        if not ours and lock.exists():  # where there are no locks, no file of one stays
            raise BadData(
                f"Another process is writing {str(path)!r}; wait for it, or divide the cells with "
                "--shard 1/2 and --shard 2/2."
            )
        yield
