"""A corpus that the model writes itself: no network, no file, and in the model's own language."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any

from fastmemit import parallel
from fastmemit.data.corpora import Corpus, load_corpus
from fastmemit.errors import BadCorpus
from fastmemit.sampling import continue_texts

# Beginnings that lead to different subjects and kinds of text.
OPENINGS = (
    "The history of", "In mathematics,", "She was born in", "The city lies", "According to",
    "The recipe calls for", "During the war,", "A new species of", "The company announced",
    "Dear Sir,", "In the first half of the match,", "The river", "Scientists at",
    "The novel tells the story of", "To install the", "He played", "The island of",
    "The law was passed in", "Many people believe that", "The temperature of", "Once upon a time,",
    "The orchestra", "Question: What is", "The patient", "Our team", "The church was built",
    "Prices rose", "The human body", "When I was young,", "The capital of", "An engine",
    "The king", "In computer science,", "The bird", "Breaking news:", "The festival takes place",
    "Step 1:", "The painting", "The language is spoken", "On the morning of", "The planet",
    "The school", "Chapter 1", "The president", "For dinner,", "The train", "Music", "The mountain",
)  # fmt: skip
TOKENS = 120
ROWS = 24
TOP_K = 200


class SelfWritten(Corpus):
    """A corpus whose documents the model writes as they are asked for.

    Who asks for them runs the model. So they are not to be read in another thread while it runs.
    """


def self_written(model: Any, tokenizer: Any, fingerprint: str) -> SelfWritten:
    """Text that a model writes, document by document, as it is asked for.

    Args:
        model: The unedited model.
        tokenizer: Its tokenizer.
        fingerprint: Of the model: part of the corpus's own.

    Returns:
        A corpus without end; each document continues one of `OPENINGS` by `TOKENS` tokens, sampled among the `TOP_K`
        most probable.
    """
    recipe = [fingerprint, OPENINGS, TOKENS, ROWS, TOP_K]
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()

    def read(seed: int) -> Iterator[str]:
        number = 0
        while True:
            openings = [OPENINGS[(number + i) % len(OPENINGS)] for i in range(ROWS)]
            # A seed of its own for each batch, so that a corpus can be read on at any place.
            batch_seed = (seed * 1_000_003 + number) % 2**63
            new = continue_texts(model, tokenizer, openings, TOKENS, top_k=TOP_K, seed=batch_seed)
            yield from (begin + rest for begin, rest in zip(openings, new, strict=True))
            number += ROWS

    return SelfWritten("self", digest, read)


def open_corpus(
    corpus: str | os.PathLike[str] | Corpus, model: Any, tokenizer: Any, fingerprint: str, field: str
) -> Corpus:
    """A corpus by its name, ``"self"`` included; one that is open already is given back.

    Args:
        corpus: What `fastmemit.data.load_corpus` takes, or ``"self"``.
        model: Who writes it then.
        tokenizer: Its tokenizer.
        fingerprint: The model's.
        field: Where the text is in a JSON object.

    Raises:
        BadCorpus: It cannot be read, or not by several processes.
    """
    if isinstance(corpus, Corpus):
        return corpus
    if corpus == "self":
        if parallel.current() is not None:
            raise BadCorpus(
                "The corpus 'self' is written by one model as it goes and cannot be divided "
                "between processes; give a file, or run in one process."
            )
        return self_written(model, tokenizer, fingerprint)
    return load_corpus(str(corpus), field=field)
