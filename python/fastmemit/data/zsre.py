"""zsRE in MEND's format: questions that are rewritten to their answers, and unrelated questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcov.printable import printable_logger
from fastmemit.data.counterfact import Record
from fastmemit.data.reading import is_clean_text, read_values
from fastmemit.errors import BadData, BadRequest
from fastmemit.request import EditRequest

logger = printable_logger(__name__)

#: How a zsRE file is named where another file could stand too.
PREFIX = "zsre:"

_LOC = "nq question: "
_SHOWN = 10  # problems listed in one error


@dataclass(frozen=True)
class ZsreRecord(Record):
    """One question to answer anew, a rephrased one, and an unrelated one with an answer of its own.

    Args:
        neighbourhood_answers: The answers of `neighbourhood`, in its order; there is no ``target_true`` that they would
            share.
    """

    neighbourhood_answers: tuple[str, ...] = ()


class _Problem(Exception):
    """A field of one record that cannot be read."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"field {field}: {reason}")


def load_zsre(source: str | Path, *, skip_malformed: bool = False) -> list[ZsreRecord]:
    """Read zsRE records in MEND's format, as MEMIT's evaluation reads them.

    The question `src` with ``{}`` for its subject is the prompt and the first of `answers` the new answer (`alt` is not
    read); `rephrase` is the one paraphrase. `loc` is the unrelated question: it keeps its beginning "nq question: " and
    gets a "?", and `loc_ans` is its answer. A record's number is its place in the file, from 0.

    Args:
        source: A JSON list or JSONL file, with or without ``zsre:`` before its path.
        skip_malformed: Log records that cannot be read and go on without them.

    Raises:
        BadData: The file is not readable, or records in it are malformed: the message lists the first ten with index
            and field, and says how many there are.
    """
    path = Path(str(source).removeprefix(PREFIX))
    values = list(read_values(path, BadData))
    records, problems = [], []
    for index, (place, value) in enumerate(values):
        try:
            records.append(_record(index, value))
        except _Problem as bad:
            problems.append(f"record {index} ({place}), {bad}")
    if problems and not skip_malformed:
        shown = "; ".join(problem.rstrip(".") for problem in problems[:_SHOWN])
        rest = len(problems) - _SHOWN
        more = f"; and {rest} more" if rest > 0 else ""
        raise BadData(
            f"{path} has {len(problems)} malformed records of {len(values)}: {shown}{more}. "
            "Correct them, or skip them with skip_malformed=True."
        )
    for problem in problems:
        logger.warning("%s: skipped %s", path, problem)
    if not records:
        raise BadData(f"{path} holds no readable record ({len(values)} looked at); give another file.")
    return records


def is_zsre(source: str | Path) -> bool:
    """Whether records are asked for as zsRE, or their file's first one has zsRE's fields.

    Raises:
        BadData: It is a file that is not UTF-8 or not JSON.
    """
    if str(source).startswith(PREFIX):
        return True
    path = Path(source)
    if not path.is_file() or path.stat().st_size == 0:
        return False  # a name, or a file that is refused elsewhere
    first = next(read_values(path, BadData), None)
    return first is not None and isinstance(first.value, Mapping) and {"src", "loc"} <= set(first.value)


def _record(index: int, value: Any) -> ZsreRecord:
    if not isinstance(value, Mapping):
        raise _Problem("(all)", f"a record must be an object, not {type(value).__name__}")
    subject, question = _text(value, "subject"), _text(value, "src")
    if subject not in question:
        raise _Problem("src", f"{question!r:.60} does not contain the subject {subject!r:.40}")
    if question.count(subject) > 1:
        raise _Problem("src", f"{question!r:.60} contains the subject {subject!r:.40} twice")
    answer = _answers(value)[0]
    try:
        request = EditRequest(question.replace(subject, "{}"), subject, answer)
    except BadRequest as bad:
        raise _Problem("src", str(bad)) from None
    unrelated = _text(value, "loc")
    if not unrelated.startswith(_LOC):
        raise _Problem("loc", f"{unrelated!r:.60} does not begin with {_LOC!r}")
    return ZsreRecord(
        index,
        request,
        paraphrases=(_text(value, "rephrase"),),
        neighbourhood=(unrelated + "?",),
        neighbourhood_answers=(_text(value, "loc_ans"),),
    )


def _answers(record: Mapping[str, Any]) -> Sequence[str]:
    found = record.get("answers")
    if not isinstance(found, list) or not found:
        raise _Problem("answers", f"must be a list of one text or more, not {found!r:.40}")
    return [_text({"answers[0]": found[0]}, "answers[0]")]


def _text(record: Mapping[str, Any], name: str) -> str:
    found = record.get(name)
    if found is None:
        raise _Problem(name, "is missing")
    if not is_clean_text(found) or not found.strip():
        raise _Problem(name, f"must be text that is not empty, not {found!r:.40}")
    return found
