"""Facts to edit and text to collect statistics on.

`load_records` and `load_requests` read facts, `batches` deals them out, `load_corpus` opens text.
"""

from fastmemit.data.corpora import Corpus, corpus_from_texts, load_corpus
from fastmemit.data.counterfact import (
    COUNTERFACT_HUB,
    Record,
    batches,
    builtin_facts,
    load_records,
    load_requests,
)

__all__ = [
    "COUNTERFACT_HUB",
    "Corpus",
    "Record",
    "batches",
    "builtin_facts",
    "corpus_from_texts",
    "load_corpus",
    "load_records",
    "load_requests",
]
