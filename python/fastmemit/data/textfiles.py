"""Documents in files that may be larger than memory: indexed in one pass, then read one by one.

The pass checks every byte and every field, so that a bad line is reported before the model has run, and hashes the
content. What stays in memory is sixteen bytes a document.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastmemit.data.reading import MAX_LINE, Line, decode, is_clean_text, parse_json, read_lines
from fastmemit.errors import BadCorpus

# A bar for an index that takes longer than this; most files need no time at all.
_BAR_AFTER_SECONDS = 2.0


@dataclass(frozen=True)
class DocumentFile:
    """Where the documents of a file are.

    Args:
        path: The file.
        fingerprint: SHA-256 of its text and of how documents are cut from it, in hex.
        starts: Offset of each document's first byte, (n,).
        sizes: Length of each document in bytes, (n,).
        parse: Makes the document of the text found there and a name of the place.
    """

    path: Path
    fingerprint: str
    starts: array[int]
    sizes: array[int]
    parse: Callable[[str, str], str] = field(repr=False)
    _state: tuple[int, int] = field(repr=False)

    def documents(self, seed: int) -> Iterator[str]:
        """Yield the documents in an order drawn from `seed`.

        Raises:
            BadCorpus: The file has changed since it was indexed.
        """
        if not self.path.exists() or _state(self.path) != self._state:
            raise BadCorpus(f"{self.path} has changed since it was opened; open the corpus again.")
        order = list(range(len(self.starts)))
        random.Random(seed).shuffle(order)
        with self.path.open("rb") as file:
            for index in order:
                file.seek(self.starts[index])
                start = self.starts[index]  # a byte order mark is dropped at the file's alone
                text = decode(file.read(self.sizes[index]), self.path, start, BadCorpus)
                yield self.parse(text, f"Byte {start} of {self.path}")


def index_paragraphs(path: Path) -> DocumentFile:
    """Index a text file whose documents are separated by blank lines.

    Raises:
        BadCorpus: The file is not UTF-8, or a document is larger than 256 MiB.
    """
    state = _state(path)
    starts, sizes = array("q"), array("q")
    digest = hashlib.sha256(b"paragraphs\0")
    inside = False
    for line in _lines(path):
        digest.update(line.text.encode())
        blank = not line.text.strip()
        if not blank and not inside:
            starts.append(line.offset)
            sizes.append(0)
        if not blank:
            sizes[-1] = line.offset + line.size - starts[-1]
            if sizes[-1] > MAX_LINE:
                raise BadCorpus(
                    f"The document at byte {starts[-1]} of {path} is larger than "
                    f"{MAX_LINE >> 20} MiB; put blank lines between documents."
                )
        inside = not blank
    return DocumentFile(path, digest.hexdigest(), starts, sizes, _paragraph, state)


def index_json_lines(path: Path, name: str) -> DocumentFile:
    """Index a file with one JSON object a line, whose field `name` is the document.

    Raises:
        BadCorpus: A line is not UTF-8, not JSON, or has no such field that is text.
    """

    def parse(text: str, place: str) -> str:
        return text_of(parse_json(text, place, BadCorpus), name, place).strip()

    state = _state(path)
    starts, sizes = array("q"), array("q")
    digest = hashlib.sha256(f"json\0{name}\0".encode())
    for line in _lines(path):
        digest.update(line.text.encode())
        if line.text.strip() and parse(line.text, f"Line {line.number} of {path}"):
            starts.append(line.offset)
            sizes.append(line.size)
    return DocumentFile(path, digest.hexdigest(), starts, sizes, parse, state)


def text_of(value: Any, name: str, place: str) -> str:
    """The document in a JSON value: the text itself, or the field `name` of an object.

    Raises:
        BadCorpus: There is no such field (the message lists those there are), or it is not text.
    """
    found = value
    if isinstance(value, dict):
        if name not in value:
            fields = ", ".join(map(str, value))[:120] or "none"
            raise BadCorpus(
                f"{place} has no field {name!r} (its fields: {fields}); name the one that holds the text with field=."
            )
        found = value[name]
    if not is_clean_text(found):
        where = f"Field {name!r} of {place[0].lower()}{place[1:]}" if found is not value else place
        kind = "broken Unicode" if isinstance(found, str) else "not text"
        raise BadCorpus(
            f"{where} is {kind} ({found!r:.40}); write each document as text, or name the field "
            "that holds it with field=."
        )
    return str(found)


def _paragraph(text: str, place: str) -> str:
    return text.replace("\r\n", "\n").strip()


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _lines(path: Path) -> Iterator[Line]:
    with tqdm(
        total=path.stat().st_size,
        desc=f"Indexing {path.name}",
        unit="B",
        unit_scale=True,
        delay=_BAR_AFTER_SECONDS,
        leave=False,
    ) as bar:
        for line in read_lines(path, BadCorpus):
            yield line
            bar.update(line.size)
