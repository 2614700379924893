"""The files of a sweep, field by field: ``sweep.json``, ``results.jsonl`` and ``timings.jsonl``.

``results.jsonl`` holds one finished cell a line and nothing that differs from run to run: the same plan gives the same
lines. What differs, the seconds and the machine, is in ``timings.jsonl``. Shares of a sweep that several processes
divide are in ``results-1of4.jsonl`` and so on.
"""

from __future__ import annotations

from typing import Any, TypedDict

from fastmemit.evaluation.perplexity import Perplexity
from fastmemit.evaluation.scores import ScoreTable


class CellRecord(TypedDict):
    """One record of a cell; shares in [0, 1], None where the record has no such prompts."""

    case_id: int
    batch: int  # which edited batch it was in, counted from 0
    before: dict[str, float | None]  # es, ps, ns, ea, pa, na of the unedited model, and others
    after: dict[str, float | None]  # the same of the edited one


class CellPlace(TypedDict):
    """Where a cell stands in the grid: all that tells it from the others of its sweep."""

    method: str  # one of fastmemit.methods.METHODS
    batch_size: int
    batches: int  # edited one after the other, each on the unedited weights
    multiplier: float | None  # d_m; None: the full precompute
    settings: dict[str, Any]  # overrides of the method's settings, such as {"relative_ridge": 1e-3}
    bos: bool  # whether the first position of a document is a key
    seed: int  # of the order of the corpus, and so of which keys are preserved


class Cell(CellPlace):
    """One finished cell."""

    key: str  # its name: memit/b16x10/x2, with +name=value, -bos and /seed1 where they apply
    keys: int  # preserved keys a layer (of the widest layer)
    scores: ScoreTable  # after the edits, in percent
    before: ScoreTable  # the unedited model, on the same records
    records: list[CellRecord]
    perplexity: Perplexity | None  # None where it was not asked for
    jitter: dict[str, float]  # layer -> what its factor had to add, relative to the diagonal


class Timing(TypedDict):
    """What a cell took, and where."""

    key: str
    seconds: dict[str, float]  # factor, edit, evaluate, undo, perplexity
    hardware: str
    versions: dict[str, str]
    finished: str  # ISO 8601, UTC


class Sweep(TypedDict):
    """``sweep.json``: what is the same for all cells, and checked when a sweep goes on."""

    format: int
    model: str
    fingerprint: str
    tokenizer: str
    dtype: str
    data: dict[str, Any]  # name and sha256 of the records file
    corpus: dict[str, Any]  # name and fingerprint
    seed: int  # of the choice and order of records, and of the contexts
    max_length: int | None
    full_keys: int | None  # what "full" stands for, if the corpus has so many
    perplexity: dict[str, Any] | None  # name and sha256 of the text, tokens, batches
    methods: dict[str, dict[str, Any]]  # the settings of each method, before a cell's own
