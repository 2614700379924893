"""Facts to edit and text to collect statistics on.

`load_records`, `load_zsre` and `load_requests` read facts, `batches` deals them out, `load_corpus` opens text.
"""

from fastmemit.data.corpora import Corpus, corpus_from_texts, load_corpus
from fastmemit.data.records import (
    COUNTERFACT_HUB,
    Record,
    ZsreRecord,
    batches,
    builtin_facts,
    load_records,
    load_requests,
    load_zsre,
)  # fmt: skip

__all__ = [
    "COUNTERFACT_HUB", "Corpus", "Record", "ZsreRecord", "batches", "builtin_facts", "corpus_from_texts",
    "load_corpus", "load_records", "load_requests", "load_zsre",
]  # fmt: skip
