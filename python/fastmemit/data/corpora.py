"""Text to collect statistics on, of files, the package, the hub or the model itself, and the batches made of it."""

from __future__ import annotations

import hashlib
import json
import os
import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import fastcov
from fastcov.batching import Prefetcher, pinned
from fastcov.files import StrPath, printable_logger
from fastmemit import parallel
from fastmemit.data.reading import (
    MAX_LINE,
    PREFIX,
    Line,
    check_file,
    decode,
    is_json_list,
    name_meant,
    open_stream,
    parse_json,
    read_lines,
    read_values,
)
from fastmemit.errors import BadCorpus
from fastmemit.text import continue_texts

logger = printable_logger(__name__)

#: English Wikipedia as the hub has it today; the older ``wikipedia`` data set is gone.
WIKIPEDIA_HUB = "hub:wikimedia/wikipedia:20231101.en"
BATCH_TOKENS = 4096  # of a batch, padding included
DEVICE_BATCH_TOKENS = 16384  # on an accelerator, where a batch feeds one launch

# Beginnings that lead to different subjects and kinds of text.
OPENINGS = (
    "The history of", "In mathematics,", "She was born in", "The city lies", "According to", "The recipe calls for",
    "During the war,", "A new species of", "The company announced", "Dear Sir,", "In the first half of the match,",
    "The river", "Scientists at", "The novel tells the story of", "To install the", "He played", "The island of",
    "The law was passed in", "Many people believe that", "The temperature of", "Once upon a time,", "The orchestra",
    "Question: What is", "The patient", "Our team", "The church was built", "Prices rose", "The human body",
    "When I was young,", "The capital of", "An engine", "The king", "In computer science,", "The bird",
    "Breaking news:", "The festival takes place", "Step 1:", "The painting", "The language is spoken",
    "On the morning of", "The planet", "The school", "Chapter 1", "The president", "For dinner,", "The train",
    "Music", "The mountain",
)  # fmt: skip
#: Tokens that the model adds to an opening, openings at a time, most probable tokens that it samples among.
WRITTEN_TOKENS, WRITTEN_TOGETHER, TOP_K = 120, 24, 200

_JSON = (".json", ".jsonl", ".ndjson")
_CHOICES = (
    "give a .txt, .json or .jsonl file, builtin, self (text written by the model), wikipedia, "
    "or hub:NAME[:CONFIG][@SPLIT]."
)
_OFFLINE = "without a network, pass a text file, --corpus self or --corpus builtin."
# Documents held back while a hub stream is shuffled: some 30 MB of Wikipedia, a few seconds. The
# stream's files are shuffled as well, so that two seeds do not read the same shelf.
_SHUFFLE_BUFFER = 10_000
_BAR_AFTER_SECONDS = 2.0  # a bar for an index that takes longer; most files need no time at all
_READ_AHEAD = 4  # batches
_TOKENISED_TOGETHER = 16


def is_clean_text(value: object) -> bool:
    """Whether `value` is text that can be encoded (JSON can spell half of a surrogate pair)."""
    try:
        return isinstance(value, str) and value.encode("utf-8") is not None
    except UnicodeEncodeError:
        return False


@dataclass(frozen=True)
class Corpus:
    """A set of documents that can be read again and again in a seeded random order."""

    #: How it was asked for; of a file its name alone: it goes into files that people share, and folders are private.
    name: str
    #: SHA-256 in hex of the content, wherever a file lies; of a hub data set that of its name, revision and field.
    fingerprint: str
    read: Callable[[int], Iterator[str]] = field(repr=False, compare=False)  # all documents once, in a seed's order
    n_documents: int | None = None  # None where only reading them would tell
    by_model: bool = False  # who reads runs the model that writes; so not in another thread while it runs

    def documents(self, seed: int = 0) -> Iterator[str]:
        """Yield every document that is not only white space, once, in an order drawn from `seed`."""
        return self.read(seed)

    def __len__(self) -> int:
        if self.n_documents is None:
            raise TypeError(f"The number of documents of {self.name} is not known before reading.")
        return self.n_documents

    def __bool__(self) -> bool:
        # A corpus of unknown length is still there; an empty one is never made.
        return True


def load_corpus(spec: StrPath, *, field: str = "text") -> Corpus:
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
    name = os.fspath(spec)
    if name == "builtin":
        folder = files("fastmemit.data") / "corpus"
        texts = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".txt")), key=lambda e: e.name)
        prose = "\n\n".join(entry.read_text(encoding="utf-8").strip() for entry in texts)
        return corpus_from_texts("builtin", prose.split("\n\n"))
    if name == "self":
        raise BadCorpus(
            "The corpus 'self' is written by a model, so it cannot be opened without one; "
            "pass corpus='self' to Editor.precompute, or --corpus self."
        )
    if not is_at_hand(name):
        return _from_hub(name, WIKIPEDIA_HUB if name == "wikipedia" else name, field)
    return _from_file(name, Path(name), field)


def is_at_hand(spec: StrPath) -> bool:
    """Whether a corpus of this name needs neither a model nor the hub: a file, or ``"builtin"``."""
    name = os.fspath(spec)
    return name not in ("self", "wikipedia") and not name.startswith(PREFIX)


def corpus_from_texts(name: str, texts: Iterable[str]) -> Corpus:
    """A corpus of texts in memory, but for white ones; a `BadCorpus` if none is left or one is broken Unicode."""
    documents = [text.strip() for text in texts if text.strip()]
    for index, text in enumerate(documents):
        if not is_clean_text(text):
            raise BadCorpus(f"Text {index} of {name} is broken Unicode ({text!r:.40}); correct it.")
    if not documents:
        raise BadCorpus(f"The corpus {name} holds no text; give one with words in it.")
    digest = hashlib.sha256(b"texts\0")
    for text in documents:
        digest.update(len(text).to_bytes(8, "little") + text.encode())

    def read(seed: int) -> Iterator[str]:
        order = list(range(len(documents)))
        random.Random(seed).shuffle(order)
        return (documents[index] for index in order)

    return Corpus(name, digest.hexdigest(), read, len(documents))


def corpus_of_lines(path: Path) -> Corpus:
    """Each line of a text file as a document, prompts for example; a JSON file as by `load_corpus`, with its errors."""
    if path.suffix.lower() in _JSON:
        return load_corpus(path)
    check_file(path, BadCorpus)
    return corpus_from_texts(path.name, (line.text for line in read_lines(path, BadCorpus)))


# Files may be larger than memory, so documents are indexed in one pass and then read one by one. The pass checks every
# byte and every field, so that a bad line is reported before the model has run, and hashes the content.


def _from_file(name: str, path: Path, field: str) -> Corpus:
    suffix = path.suffix.lower()
    if not path.exists():
        what = "file" if suffix or len(path.parts) > 1 else "corpus or file"
        raise BadCorpus(f"There is no {what} {name!r}; {_CHOICES}{name_meant(name)}")
    check_file(path, BadCorpus)
    if suffix not in (".txt", *_JSON):
        ending = f"ends in {suffix!r}" if suffix else "has no ending"
        raise BadCorpus(f"The corpus file {name!r} {ending}; {_CHOICES}")
    if suffix in _JSON and is_json_list(path):
        values = enumerate(read_values(path, BadCorpus))
        return corpus_from_texts(path.name, [_text_of(v.value, field, f"Item {i} of {path}") for i, v in values])

    def parse(text: str, place: str) -> str:
        if suffix == ".txt":
            return text.replace("\r\n", "\n").strip()
        return _text_of(parse_json(text, place, BadCorpus), field, place).strip()

    state = _state(path)
    digest = hashlib.sha256(b"paragraphs\0" if suffix == ".txt" else f"json\0{field}\0".encode())
    starts, sizes = array("q"), array("q")  # bytes
    inside = False  # a paragraph
    for line in _lines(path):
        digest.update(line.text.encode())
        blank = not line.text.strip()
        if suffix == ".txt" and inside and not blank:
            sizes[-1] = line.offset + line.size - starts[-1]
        elif not blank and (suffix == ".txt" or parse(line.text, f"Line {line.number} of {path}")):
            starts.append(line.offset)
            sizes.append(line.size)
        inside = not blank
        if sizes and sizes[-1] > MAX_LINE:
            raise BadCorpus(
                f"The document at byte {starts[-1]} of {path} is larger than {MAX_LINE >> 20} MiB; put blank lines "
                "between documents."
            )
    if not starts:
        raise BadCorpus(f"The corpus {name} holds no text; give one with words in it.")
    if len(starts) == 1 and suffix == ".txt":
        logger.warning(
            "%s has no blank line and so is one document, of which no more than the model's "
            "context is read; put blank lines between documents.",
            path,
        )

    def read(seed: int) -> Iterator[str]:
        if not path.exists() or _state(path) != state:
            raise BadCorpus(f"{path} has changed since it was opened; open the corpus again.")
        order = list(range(len(starts)))
        random.Random(seed).shuffle(order)
        with path.open("rb") as file:
            for index in order:
                start = starts[index]  # a byte order mark is dropped at the file's alone
                file.seek(start)
                text = decode(file.read(sizes[index]), path, start, BadCorpus)
                yield parse(text, f"Byte {start} of {path}")

    return Corpus(path.name, digest.hexdigest(), read, len(starts))


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _lines(path: Path) -> Iterator[Line]:
    size = path.stat().st_size
    about = f"Indexing {path.name}"
    with tqdm(total=size, desc=about, unit="B", unit_scale=True, delay=_BAR_AFTER_SECONDS, leave=False) as bar:
        for line in read_lines(path, BadCorpus):
            yield line
            bar.update(line.size)


def _text_of(value: Any, name: str, place: str) -> str:
    """The document in a JSON value: the text itself, or the field `name` of an object."""
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


def _from_hub(name: str, spec: str, field: str) -> Corpus:
    stream, found, revision = open_stream(spec, BadCorpus, _OFFLINE)
    columns = stream.column_names
    if columns is not None and field not in columns:
        raise BadCorpus(
            f"The hub data set {found.spec.removeprefix(PREFIX)} has no field {field!r} "
            f"(its fields: {', '.join(columns)}); name the one that holds the text with field=."
        )
    recipe = {"hub": found.spec, "revision": revision, "split": found.split, "field": field}

    def read(seed: int) -> Iterator[str]:
        index = -1
        try:
            for index, row in enumerate(stream.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)):
                text = _text_of(dict(row), field, f"Row {index} of {name}").strip()
                if text:
                    yield text
        except BadCorpus:
            raise
        except Exception as bad:  # whatever a download may raise
            reason = str(bad).strip().partition("\n")[0][:160]
            raise BadCorpus(
                f"The corpus {name} broke off after {index + 1} documents "
                f"({type(bad).__name__}: {reason}); run it again, or {_OFFLINE}"
            ) from bad

    return Corpus(name, hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest(), read)


def self_written(model: Any, tokenizer: Any, fingerprint: str) -> Corpus:
    """Text without end that an unedited model writes, document by document, as it is asked for.

    Each document continues one of `OPENINGS`. The model's fingerprint is part of the corpus's own.
    """
    recipe = [fingerprint, OPENINGS, WRITTEN_TOKENS, WRITTEN_TOGETHER, TOP_K]

    def read(seed: int) -> Iterator[str]:
        for number in count(0, WRITTEN_TOGETHER):
            openings = [OPENINGS[(number + i) % len(OPENINGS)] for i in range(WRITTEN_TOGETHER)]
            # A seed of its own for each batch, so that a corpus can be read on at any place.
            batch_seed = (seed * 1_000_003 + number) % 2**63
            new = continue_texts(model, tokenizer, openings, WRITTEN_TOKENS, top_k=TOP_K, seed=batch_seed)
            yield from (begin + rest for begin, rest in zip(openings, new, strict=True))

    return Corpus("self", hashlib.sha256(json.dumps(recipe).encode()).hexdigest(), read, by_model=True)


def open_corpus(corpus: StrPath | Corpus, model: Any, tokenizer: Any, fingerprint: str, field: str) -> Corpus:
    """A corpus by its name as `load_corpus` takes it, or ``"self"``; one that is open already is given back."""
    if isinstance(corpus, Corpus):
        return corpus
    if corpus != "self":
        return load_corpus(corpus, field=field)
    if parallel.CURRENT.get() is not None:
        raise BadCorpus(
            "The corpus 'self' is written by one model as it goes and cannot be divided "
            "between processes; give a file, or run in one process."
        )
    return self_written(model, tokenizer, fingerprint)


def tokens_per_batch(device: torch.device) -> int:
    """How many tokens a batch has where the model takes its input on this device."""
    return BATCH_TOKENS if device.type == "cpu" else DEVICE_BATCH_TOKENS


@contextmanager
def corpus_batches(
    corpus: Corpus,
    tokenizer: Any,
    device: torch.device,
    *,
    tokens: int,
    context: int,
    seed: int = 0,
    start: int = 0,
    skip: int = 0,
    reading: Callable[[int], None] | None = None,
) -> Iterator[Iterator[Mapping[str, Any]]]:
    """Batches of the first `tokens` tokens of a corpus, padding aside, for `fastcov.collect_moments`.

    Text is read, tokenised, padded and pinned by a thread, which is gone when the context is left; nothing else may use
    the tokenizer inside. A corpus that the model writes is read by the caller's own thread, as the batches are asked
    for. The batches are the same either way; how large they are depends on the device.

    Documents are cut at `context` tokens, of which the first `skip` are no keys and do not count. Tokens before `start`
    count and are read, but are in a batch only where later ones of their document need them. `reading` is called, in
    the caller's thread, with the number of tokens of each document read.
    """
    ahead: Prefetcher[Mapping[str, Any]] = Prefetcher(_READ_AHEAD)
    threaded = not corpus.by_model
    told = ahead.relayed(reading) if threaded and reading is not None else reading

    def tokenised() -> Iterator[list[int]]:
        texts = corpus.documents(seed)
        while not ahead.stopped and (chunk := list(islice(texts, _TOKENISED_TOGETHER))):
            for ids in tokenizer(chunk, truncation=True, max_length=context)["input_ids"]:
                if told is not None:
                    told(len(ids))
                yield ids

    taken = fastcov.between(tokenised(), start, tokens, context, skip)
    batches = pinned(fastcov.bucket(taken, tokens_per_batch(device)), device)
    with ahead.read(batches) if threaded else nullcontext(batches) as read:
        yield read
