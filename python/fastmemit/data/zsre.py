"""zsRE in MEND's format: questions that are rewritten to their answers, and unrelated questions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmemit.data.counterfact import Problem, Record, read_all, text
from fastmemit.data.reading import read_values
from fastmemit.errors import BadData, BadRequest
from fastmemit.request import EditRequest

#: How a zsRE file is named where another file could stand too.
PREFIX = "zsre:"

_LOC = "nq question: "


@dataclass(frozen=True)
class ZsreRecord(Record):
    """One question to answer anew, a rephrased one, and an unrelated one with an answer of its own."""

    #: The answers of `neighbourhood`, in its order; there is no ``target_true`` that they would share.
    neighbourhood_answers: tuple[str, ...] = ()


def load_zsre(source: str | Path, *, skip_malformed: bool = False) -> list[ZsreRecord]:
    """Read zsRE records in MEND's format, as MEMIT's evaluation reads them.

    The question `src` with ``{}`` for its subject is the prompt and the first of `answers` the new answer (`alt` is not
    read); `rephrase` is the one paraphrase. `loc` is the unrelated question: it keeps its beginning "nq question: " and
    gets a "?", and `loc_ans` is its answer. A record's number is its place in the file, from 0.

    Args:
        source: A JSON list or JSONL file, with or without ``zsre:`` before its path.
        skip_malformed: Log records that cannot be read and go on without them.
    """
    path = Path(str(source).removeprefix(PREFIX))
    return read_all(str(path), list(read_values(path, BadData)), _record, skip_malformed)


def is_zsre(source: str | Path) -> bool:
    """Whether records are asked for as zsRE, or their file's first one has zsRE's fields."""
    if str(source).startswith(PREFIX):
        return True
    path = Path(source)
    if not path.is_file() or path.stat().st_size == 0:
        return False  # a name, or a file that is refused elsewhere
    first = next(read_values(path, BadData), None)
    return first is not None and isinstance(first.value, Mapping) and {"src", "loc"} <= set(first.value)


def _record(index: int, value: Mapping[str, Any]) -> ZsreRecord:
    subject, question = text(value.get("subject"), "subject"), text(value.get("src"), "src")
    if subject not in question:
        raise Problem("src", f"{question!r:.60} does not contain the subject {subject!r:.40}")
    if question.count(subject) > 1:
        raise Problem("src", f"{question!r:.60} contains the subject {subject!r:.40} twice")
    answers = value.get("answers")
    if not isinstance(answers, list) or not answers:
        raise Problem("answers", f"must be a list of one text or more, not {answers!r:.40}")
    answer = text(answers[0], "answers[0]")
    try:
        request = EditRequest(question.replace(subject, "{}"), subject, answer)
    except BadRequest as bad:
        raise Problem("src", str(bad)) from None
    unrelated = text(value.get("loc"), "loc")
    if not unrelated.startswith(_LOC):
        raise Problem("loc", f"{unrelated!r:.60} does not begin with {_LOC!r}")
    return ZsreRecord(
        index,
        request,
        paraphrases=(text(value.get("rephrase"), "rephrase"),),
        neighbourhood=(unrelated + "?",),
        neighbourhood_answers=(text(value.get("loc_ans"), "loc_ans"),),
    )
