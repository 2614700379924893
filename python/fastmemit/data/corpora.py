"""Text to collect statistics on: files, the package's own prose, or a data set from the hub."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastcov.printable import printable_logger
from fastmemit.data import hub
from fastmemit.data.reading import check_file, is_clean_text, is_json_list, read_values
from fastmemit.data.textfiles import index_json_lines, index_paragraphs, text_of
from fastmemit.errors import BadCorpus

logger = printable_logger(__name__)

#: English Wikipedia as the hub has it today; the older ``wikipedia`` data set is gone.
WIKIPEDIA_HUB = "hub:wikimedia/wikipedia:20231101.en"

_JSON = (".json", ".jsonl", ".ndjson")
_CHOICES = (
    "give a .txt, .json or .jsonl file, builtin, self (text written by the model), wikipedia, "
    "or hub:NAME[:CONFIG][@SPLIT]."
)
_OFFLINE = "without a network, pass a text file, --corpus self or --corpus builtin."

# Documents held back while a hub stream is shuffled: some 30 MB of Wikipedia, a few seconds. The
# stream's files are shuffled as well, so that two seeds do not read the same shelf.
_SHUFFLE_BUFFER = 10_000


@dataclass(frozen=True)
class Corpus:
    """A set of documents that can be read again and again in a seeded random order.

    Args:
        name: How the corpus was asked for; of a file its name alone, because the name goes into files that people share
            and folders are nobody else's business.
        fingerprint: SHA-256 in hex of the content, or for a hub data set of its name, revision and field; the same text
            gives the same one wherever the file lies.
        read: Yields all documents once, in the order of a seed.
        n_documents: How many there are; None where only reading them would tell.
    """

    name: str
    fingerprint: str
    read: Callable[[int], Iterator[str]] = field(repr=False, compare=False)
    n_documents: int | None = None

    def documents(self, seed: int = 0) -> Iterator[str]:
        """Yield every document that is not only white space, once, in an order drawn from `seed`.

        Raises:
            BadCorpus: The source broke off, or its file has changed.
        """
        return self.read(seed)

    def __len__(self) -> int:
        """The number of documents.

        Raises:
            TypeError: It is not known.
        """
        if self.n_documents is None:
            raise TypeError(f"The number of documents of {self.name} is not known before reading.")
        return self.n_documents

    def __bool__(self) -> bool:
        # A corpus of unknown length is still there; an empty one is never made.
        return True


def load_corpus(spec: str | Path, *, field: str = "text") -> Corpus:
    """Open a corpus.

    Args:
        spec: A file, or a name. In a ``.txt`` file blank lines separate the documents; one without any is a single
            document, of which a model reads no more than its context. A ``.jsonl`` or ``.json`` file holds one object a
            line, or a list; either may hold plain texts too. ``"builtin"`` is the package's own prose, ``"wikipedia"``
            English Wikipedia from the hub, ``"hub:NAME[:CONFIG][@SPLIT]"`` one split of any data set there (``train``
            if none is named). Both are streamed: a collect downloads what it reads, and some documents ahead of it from
            which it draws their order.
        field: Where the text is in a JSON object or a hub row.

    Raises:
        BadCorpus: There is no such corpus, it is not UTF-8 (the byte is named), a line has no such field (the line and
            its fields are named), or there is no text in it.
    """
    name = str(spec)
    if name == "builtin":
        return _builtin()
    if name == "self":
        raise BadCorpus(
            "The corpus 'self' is written by a model, so it cannot be opened without one; "
            "pass corpus='self' to Editor.precompute, or --corpus self."
        )
    if _on_hub(name):
        return _from_hub(name, WIKIPEDIA_HUB if name == "wikipedia" else name, field)
    return _from_file(name, Path(spec), field)


def is_at_hand(spec: str | Path) -> bool:
    """Whether a corpus of this name needs neither a model nor the hub: a file, or ``"builtin"``."""
    return str(spec) != "self" and not _on_hub(str(spec))


def _on_hub(name: str) -> bool:
    return name == "wikipedia" or name.startswith(hub.PREFIX)


def corpus_from_texts(name: str, texts: Iterable[str]) -> Corpus:
    """A corpus of texts in memory; those of only white space are left out.

    Raises:
        BadCorpus: Nothing is left, or a text holds half of a surrogate pair.
    """
    kept = [text.strip() for text in texts if text.strip()]
    for index, text in enumerate(kept):
        if not is_clean_text(text):
            raise BadCorpus(f"Text {index} of {name} is broken Unicode ({text!r:.40}); correct it.")
    if not kept:
        raise BadCorpus(f"The corpus {name} holds no text; give one with words in it.")
    digest = hashlib.sha256(b"texts\0")
    for text in kept:
        digest.update(len(text).to_bytes(8, "little") + text.encode())

    def read(seed: int) -> Iterator[str]:
        order = list(range(len(kept)))
        random.Random(seed).shuffle(order)
        return (kept[index] for index in order)

    return Corpus(name, digest.hexdigest(), read, len(kept))


def _builtin() -> Corpus:
    folder = files("fastmemit.data") / "corpus"
    texts = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".txt")), key=lambda e: e.name)
    prose = "\n\n".join(entry.read_text(encoding="utf-8").strip() for entry in texts)
    return corpus_from_texts("builtin", prose.split("\n\n"))


def _from_file(name: str, path: Path, field: str) -> Corpus:
    suffix = path.suffix.lower()
    if not path.exists():
        what = "file" if suffix or len(path.parts) > 1 else "corpus or file"
        raise BadCorpus(f"There is no {what} {name!r}; {_CHOICES}")
    check_file(path, BadCorpus)
    if suffix not in (".txt", *_JSON):
        ending = f"ends in {suffix!r}" if suffix else "has no ending"
        raise BadCorpus(f"The corpus file {name!r} {ending}; {_CHOICES}")
    if suffix in _JSON and is_json_list(path):
        values = read_values(path, BadCorpus)
        return corpus_from_texts(
            path.name, [text_of(value, field, f"Item {i} of {path}") for i, (_, value) in enumerate(values)]
        )
    indexed = index_json_lines(path, field) if suffix in _JSON else index_paragraphs(path)
    count = len(indexed.starts)
    if count == 0:
        raise BadCorpus(f"The corpus {name} holds no text; give one with words in it.")
    if count == 1 and suffix == ".txt":
        logger.warning(
            "%s has no blank line and so is one document, of which no more than the model's "
            "context is read; put blank lines between documents.",
            path,
        )
    return Corpus(path.name, indexed.fingerprint, indexed.documents, count)


def _from_hub(name: str, spec: str, field: str) -> Corpus:
    stream, found, revision = hub.open_stream(spec, BadCorpus, _OFFLINE)
    columns = stream.column_names
    if columns is not None and field not in columns:
        raise BadCorpus(
            f"The hub data set {found.spec.removeprefix(hub.PREFIX)} has no field {field!r} "
            f"(its fields: {', '.join(columns)}); name the one that holds the text with field=."
        )
    recipe = {"hub": found.spec, "revision": revision, "split": found.split, "field": field}
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()

    def read(seed: int) -> Iterator[str]:
        rows = iter(stream.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER))
        for index, row in enumerate(_unbroken(rows, name)):
            text = text_of(dict(row), field, f"Row {index} of {name}").strip()
            if text:
                yield text

    return Corpus(name, digest, read)


def _unbroken(rows: Iterator[Any], name: str) -> Iterator[Any]:
    """The rows, with whatever a download may raise as one sentence."""
    done = 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as bad:
            reason = str(bad).strip().partition("\n")[0][:160]
            raise BadCorpus(
                f"The corpus {name} broke off after {done} documents "
                f"({type(bad).__name__}: {reason}); run it again, or {_OFFLINE}"
            ) from bad
        done += 1
        yield row
