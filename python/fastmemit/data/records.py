"""Records to edit and evaluate: those of CounterFact, zsRE (MEND's), MQuAKE and RippleEdits; read, checked, dealt."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, TypeVar

from fastcov.files import StrPath, printable_logger
from fastmemit.data.corpora import is_clean_text
from fastmemit.data.reading import PREFIX, Value, downloaded, load_splits, read_values
from fastmemit.errors import BadData, BadRequest, counted
from fastmemit.request import EditRequest

logger = printable_logger(__name__)

COUNTERFACT_HUB = "hub:azhx/counterfact"  # All 21,919 cases with the full ROME schema, in the splits train and test
ZSRE_PREFIX = "zsre:"  # how a zsRE file is named where another file could stand too
#: Where data that are on no hub lie, by name: MEMIT's zsRE, MQuAKE-CF-3k, and the popular part of RippleEdits.
ADDRESSES = {
    "zsre": "https://rome.baulab.info/data/dsets/zsre_mend_eval.json",
    "mquake": "https://raw.githubusercontent.com/princeton-nlp/MQuAKE/main/datasets/MQuAKE-CF-3k.json",
    "rippleedits": "https://media.githubusercontent.com/media/edenbiran/RippleEdits/main/data/benchmark/popular.json",
}
#: RippleEdits' lists of tests, and what their questions are called here.
RIPPLES = {
    "Logical_Generalization": "logical",
    "Subject_Aliasing": "alias",
    "Compositionality_I": "composition I",
    "Compositionality_II": "composition II",
    "Relation_Specificity": "specificity",
    "Forgetfulness": "forgetfulness",
}
# A fact of RippleEdits as a sentence: "The name of the mother of Ada Lovelace is Anne Isabella." Its relation is in
# small letters, and so is what may stand behind the subject.
_TAIL = "has|won|plays in|is (?:associated with|a member of|part of|the capital of|followed by)"
_SENTENCE = rf"(The (?:[a-z]+ )+)(.+?)((?: (?:{_TAIL}))? (?:is|are))"
_FOLLOWS = r"()(.+?)( (?:is followed by|follows))"

_OFFLINE = "check the name and the network, or give a file in CounterFact's JSON format."
_ZSRE_UNRELATED = "nq question: "
_SHOWN = 10  # problems listed in one error


Asked = tuple[str, tuple[str, ...]]  # a prompt, and the answers that are right, the usual one first


@dataclass(frozen=True)
class Probe:
    """A question about what follows from an edit, or must not."""

    kind: str  # what it asks, such as ``"alias"``
    asked: tuple[Asked, ...]  # its forms, each with all answers that count
    every: bool = False  # whether all forms must be answered, or one
    conditions: tuple[Asked, ...] = ()  # what the unedited model must answer for the question to count


@dataclass(frozen=True)
class Record:
    """One fact to edit, with the prompts that say how well the edit went."""

    case_id: int  # unique in its file
    request: EditRequest  # the edit; its ``target_true`` is there in all but own facts, whose is yet to be measured
    paraphrases: tuple[str, ...] = ()  # the same question in other words; they should give the new answer
    neighbourhood: tuple[str, ...] = ()  # the same relation of others whose answer is ``target_true`` too, and stays so
    attributes: tuple[str, ...] = ()  # prompts about subjects whose answer is ``target_new``
    generations: tuple[str, ...] = ()  # openings of free text about the subject
    relation_id: str | None = None  # Wikidata's number of the relation, such as ``"P19"``
    #: Each neighbour's own answer, where they do not share ``target_true``; None for one that is yet to be measured.
    neighbourhood_answers: tuple[str | None, ...] = ()
    more: tuple[EditRequest, ...] = ()  # facts that are edited with it
    probes: tuple[Probe, ...] = ()  # questions about what follows from them

    @property
    def requests(self) -> tuple[EditRequest, ...]:
        """All facts that are edited: `request`, and `more`."""
        return (self.request, *self.more)


class _Problem(Exception):
    """A field of one record that cannot be read."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")


_Some = TypeVar("_Some", bound=Record)


def load_records(source: StrPath, *, skip_malformed: bool = False, own: bool = False) -> list[Record]:
    """Read CounterFact records, or own facts, from a file or the hub.

    Two schemas are told apart record by record: ROME's, with ``requested_rewrite`` and lists of prompts, and the flat
    one, with ``subject``, ``prompt``, ``target_new`` and ``target_true`` side by side. A flat record has no
    paraphrases: what it calls ``rephrase_prompt`` is mostly an opening for free text, and is read as one; its
    ``locality_prompt`` is its one neighbourhood prompt.

    An own fact has no ``case_id``: it is what `load_requests` reads, with ``paraphrases`` and ``neighbours`` beside
    it if there are any. Its number is its line (from 1), or its place in a list (from 0). A paraphrase is a prompt in
    other words, with ``{}`` or the subject itself; a neighbour a prompt, or an object with ``prompt`` and ``answer``.
    Answers that it does not name are None: `fastmemit.evaluation.measure_answers` asks the unedited model.

    Records of MQuAKE, with a list of rewrites that are edited together, and of RippleEdits are told by their fields;
    their questions are `Record.probes`. RippleEdits names subject and answer by their numbers in Wikidata alone, so
    both are read off the sentence of the edit.

    Args:
        source: A JSON list or JSONL file; ``"builtin"`` for the facts that the package ships; ``"counterfact"`` for
            CounterFact from the hub; ``"mquake"`` or ``"rippleedits"``, see `ADDRESSES`; or
            ``"hub:NAME[:CONFIG][@SPLIT]"``.
        skip_malformed: Log records that cannot be read and go on without them.
        own: Take own facts too; else they are malformed records.
    """
    spec = os.fspath(source)
    if spec == "builtin":
        return builtin_facts()
    if spec == "counterfact":
        spec = COUNTERFACT_HUB
    if spec.startswith(PREFIX):
        splits = load_splits(spec, BadData, _OFFLINE).items()
        rows = (Value(f"{split} row {i}", row) for split, rows in splits for i, row in enumerate(rows))
        return _read_all(spec, rows, _record, skip_malformed)
    path = downloaded(spec, ADDRESSES[spec], BadData) if spec in ADDRESSES else Path(spec)
    values = list(read_values(path, BadData))
    _refuse_wrapped(spec, values)
    return _read_all(spec, values, _record_or_fact if own else _record, skip_malformed)


def builtin_facts() -> list[Record]:
    """The facts that the package ships for its demonstration, in the full schema."""
    with as_file(files("fastmemit.data") / "facts.jsonl") as path:
        return _read_all("builtin", read_values(path, BadData), _record, skip_malformed=False)


def load_requests(path: StrPath) -> list[EditRequest]:
    """Read edit requests from a JSON list or a JSONL file, in any spelling `EditRequest` knows.

    Raises:
        BadData: The file is not readable, or requests in it are malformed: the message lists the first ten with their
            index, and says how many there are.
    """
    path = Path(path)
    values = list(read_values(path, BadData))
    _refuse_wrapped(str(path), values)
    requests, problems = [], []
    for index, (place, value) in enumerate(values):
        try:
            requests.append(EditRequest.from_dict(value))
        except BadRequest as bad:
            problems.append(f"request {index} ({place}): {bad}")
    if problems:
        raise BadData(_listed(str(path), problems, len(values), "request"))
    if not requests:
        raise BadData(f"{path} holds no request; write at least one.")
    return requests


def listed_records(records: Sequence[_Some], path: StrPath) -> list[_Some]:
    """The records that a file lists by ``case_id``, in its order, as a JSON list or one a line; else a BadData."""
    path = Path(path)
    by_case = {record.case_id: record for record in records}
    found: dict[int, _Some] = {}
    for value in read_values(path, BadData):
        case = value.value
        if type(case) is not int or case not in by_case:
            raise BadData(f"{str(path)!r}, {value.place}: {case!r} is not the case_id of a record of the facts.")
        if case in found:
            raise BadData(f"{str(path)!r}, {value.place}: the case {case} is there twice; list each once.")
        found[case] = by_case[case]
    if not found:
        raise BadData(f"{str(path)!r} lists no case; write a case_id a line.")
    return list(found.values())


def batches(
    records: Sequence[Record], batch_size: int, n_batches: int | None = None, seed: int | None = 0
) -> list[list[Record]]:
    """Deal records into batches: shuffled, and one record per subject over the whole selection; or as they stand.

    Args:
        records: Where to choose from.
        batch_size: Records in a batch.
        n_batches: How many batches; by default all that there are, the last one maybe shorter.
        seed: Seed for the shuffle; the same seed and records give the same batches everywhere. None deals all of them
            as they stand, such as those of a fixed list (`listed_records`).

    Raises:
        BadData: There are too few records with different subjects, or a number is below 1.
    """
    for name, number in (("batch_size", batch_size), ("n_batches", n_batches)):
        if number is not None and number < 1:
            raise BadData(f"{name} is {number}; it must be 1 or more.")
    chosen, which = list(records), ""
    if seed is not None:
        random.Random(seed).shuffle(chosen)
        by_subject: dict[str, Record] = {}
        for record in chosen:
            by_subject.setdefault(record.request.subject.strip().lower(), record)
        chosen, which = list(by_subject.values()), f" with different subjects (of {len(records)})"
    wanted = len(chosen) if n_batches is None else batch_size * n_batches
    if len(chosen) < wanted or not chosen:
        asked = f"{counted(n_batches, 'batch', 'batches') if n_batches else 'some batches'} of {batch_size}"
        enough = [f"{len(chosen) // batch_size} of {batch_size}"] if len(chosen) >= batch_size else []
        enough += [f"{n_batches} of {len(chosen) // n_batches}"] if n_batches and len(chosen) >= n_batches else []
        raise BadData(
            f"The facts have {counted(len(chosen), 'record')}{which}, too few for {asked}; "
            f"{'ask for ' + ' or '.join(enough) + ', or ' if enough else ''}give more records."
        )
    return [chosen[start : start + batch_size] for start in range(0, wanted, batch_size)]


def _refuse_wrapped(source: str, values: Sequence[Value]) -> None:
    """A file with one object around the list, such as {"data": [...]}, is not a record."""
    # What the one record of a list lacks is said where it is read.
    alone = values[0] if len(values) == 1 and not values[0].place.startswith("item") else None
    fields = alone and alone.value
    if isinstance(fields, Mapping) and not {"requested_rewrite", "prompt", "subject"} & set(fields):
        raise BadData(
            f"{source} holds one JSON object at {values[0].place} (fields: {_fields(fields)}), "
            "not records; write a list, [ ... ], or one record a line."
        )


def _read_all(
    source: str, values: Iterable[Value], parse: Callable[[int, Value], _Some], skip_malformed: bool
) -> list[_Some]:
    """The records in values, each parsed by its place in the source; see `load_records` for what is malformed."""
    records: list[_Some] = []
    problems: list[str] = []
    first_with: dict[int, int] = {}
    total = 0
    for index, each in enumerate(values):
        total += 1
        try:
            if not isinstance(each.value, Mapping):
                raise _Problem("(all)", f"a record must be an object, not {type(each.value).__name__}")
            record = parse(index, each)
            first = first_with.setdefault(record.case_id, index)
            if first != index:
                raise _Problem("case_id", f"{record.case_id} is also that of record {first}")
            records.append(record)
        except _Problem as bad:
            problems.append(f"record {index} ({each.place}), field {bad}")
    if problems and not skip_malformed:
        listed = _listed(source, problems, total, "record")
        raise BadData(f"{listed} Correct them, or skip them with skip_malformed=True.")
    for problem in problems:
        logger.warning("%s: skipped %s", source, problem)
    if not records:
        raise BadData(f"{source} holds no readable record ({total} looked at); give another file.")
    return records


def _listed(source: str, problems: list[str], total: int, what: str) -> str:
    shown = "; ".join(problem.rstrip(".") for problem in problems[:_SHOWN])
    rest = len(problems) - _SHOWN
    more = f"; and {rest} more" if rest > 0 else ""
    return f"{source} has {counted(len(problems), f'malformed {what}')} of {total}: {shown}{more}."


def is_open(record: Record) -> bool:
    """Whether an answer of a record is yet to be measured."""
    return record.request.target_true is None or None in record.neighbourhood_answers


def _record_or_fact(index: int, found: Value) -> Record:
    value = found.value
    if {"case_id", "requested_rewrite", "example_type"} & set(value):
        return _record(index, found)
    try:
        request = EditRequest.from_dict(value)
    except BadRequest as bad:
        raise _Problem("(all)", str(bad)) from None
    neighbours = value.get("neighbours") or []
    if not isinstance(neighbours, list):
        neighbours = [neighbours]
    pairs = [(n.get("prompt"), n.get("answer")) if isinstance(n, Mapping) else (n, None) for n in neighbours]
    return Record(
        int(found.place.rpartition(" ")[2]),
        request,
        paraphrases=tuple(text.replace("{}", request.subject) for text in _prompts(value, "paraphrases")),
        neighbourhood=tuple(_text(prompt, f"neighbours[{i}]", missing=False) for i, (prompt, _) in enumerate(pairs)),
        neighbourhood_answers=tuple(
            None if answer is None else _text(answer, f"neighbours[{i}].answer") for i, (_, answer) in enumerate(pairs)
        ),
    )


def _record(index: int, found: Value) -> Record:
    value = found.value
    if {"edit", "example_type"} <= set(value):
        return _ripple_record(index, value)
    case_id = value.get("case_id")
    if isinstance(case_id, bool) or not isinstance(case_id, int):
        raise _Problem("case_id", f"must be a whole number, not {case_id!r:.40}")
    if "requested_rewrite" in value:
        rewrite = value["requested_rewrite"]
        if isinstance(rewrite, list):
            return _mquake_record(case_id, value, rewrite)
        return Record(
            case_id,
            _request(_object(rewrite, "requested_rewrite"), "requested_rewrite."),
            paraphrases=_prompts(value, "paraphrase_prompts"),
            neighbourhood=_prompts(value, "neighborhood_prompts"),
            attributes=_prompts(value, "attribute_prompts"),
            generations=_prompts(value, "generation_prompts"),
            relation_id=_relation(rewrite, "requested_rewrite."),
        )
    if not {"prompt", "subject"} & set(value):
        raise _Problem("requested_rewrite", f"is missing (fields: {_fields(value)})")
    if "target_true" not in value and "ground_truth" in value:
        value = {**value, "target_true": value["ground_truth"]}
    request = _request(value, "")
    truth = value.get("locality_ground_truth")
    if isinstance(truth, str) and truth.strip() != str(request.target_true).strip():
        # Neighbourhood success compares target_true with target_new, so another answer would lie.
        raise _Problem("locality_ground_truth", f"is {truth!r:.40}, not {request.target_true!r:.40}")
    return Record(
        case_id,
        request,
        neighbourhood=_prompts(value, "locality_prompt"),
        generations=_prompts(value, "rephrase_prompt"),
        relation_id=_relation(value, ""),
    )


def _mquake_record(case_id: int, value: Mapping[str, Any], rewrites: list[Any]) -> Record:
    """A chain of facts of which some are edited; its questions ask for the end, its hops one fact each."""
    if not rewrites or not all(isinstance(each, Mapping) for each in rewrites):
        raise _Problem("requested_rewrite", "must be a list of objects, one or more")
    requests = [_request(each, f"requested_rewrite[{i}].") for i, each in enumerate(rewrites)]
    answers = _answers(value.get("new_answer"), value.get("new_answer_alias"), "new_answer")
    probes = [Probe("multi-hop", tuple((question, answers) for question in _prompts(value, "questions")))]
    hops = value.get("new_single_hops") or []
    for i, hop in enumerate(hops if isinstance(hops, list) else [hops]):
        place = f"new_single_hops[{i}]"
        right = _answers(_object(hop, place).get("answer"), hop.get("answer_alias"), f"{place}.answer")
        probes.append(Probe("one hop", ((_text(hop.get("cloze"), f"{place}.cloze"), right),)))
    return Record(
        case_id,
        requests[0],
        relation_id=_relation(rewrites[0], "requested_rewrite[0]."),
        more=tuple(requests[1:]),
        probes=tuple(probe for probe in probes if probe.asked),
    )


def _ripple_record(index: int, value: Mapping[str, Any]) -> Record:
    """An edit as a sentence, and tests of what follows from it; its number is its place."""
    edit = _object(value["edit"], "edit")
    said = _text(edit.get("prompt"), "edit.prompt")
    probes = [
        _ripple_probe(kind, test, f"{name}[{i}]")
        for name, kind in RIPPLES.items()
        for i, test in enumerate(_list(value.get(name), name))
    ]
    # An alias of the subject has the new answer, which tells where the sentence is to be cut.
    known = {answer for probe in probes if probe.kind == "alias" for _, right in probe.asked for answer in right}
    before, subject, after, answer = _cut(said, known, "edit.prompt")
    former = edit.get("original_fact", edit.get("previous_fact"))
    true = None
    if isinstance(former, Mapping):
        beginning = f"{before}{subject}{after} "
        old = _text(former.get("prompt"), "edit.original_fact.prompt")
        if not old.startswith(beginning):
            raise _Problem("edit.original_fact.prompt", f"{old!r:.80} does not begin with {beginning!r:.80}")
        true = old[len(beginning) :].removesuffix(".")
    try:
        request = EditRequest(f"{before}{{}}{after}", subject, answer, true)
    except BadRequest as bad:
        raise _Problem("edit.prompt", str(bad)) from None
    return Record(index, request, probes=tuple(probe for probe in probes if probe.asked))


def _cut(said: str, known: set[str], field: str) -> tuple[str, str, str, str]:
    """A sentence as what stands before its subject, the subject, what stands behind it, and the answer."""
    shape, whole = _SENTENCE if said.startswith("The ") else _FOLLOWS, said.removesuffix(".")
    for answer in sorted(known, key=len, reverse=True):
        if whole.endswith(f" {answer}") and (found := re.fullmatch(shape, whole.removesuffix(f" {answer}"))):
            return found[1], found[2], found[3], answer
    found = re.fullmatch(f"{shape} (.+)", whole)
    if found is None or re.search(r" (?:is|are|follows) ", found[4]):
        raise _Problem(field, f"{said!r:.80} does not show where its subject ends and its answer begins")
    return found[1], found[2], found[3], found[4]


def _ripple_probe(kind: str, test: Any, place: str) -> Probe:
    def asked(name: str) -> tuple[Asked, ...]:
        found = []
        for i, query in enumerate(_list(_object(test, place).get(name), f"{place}.{name}")):
            here = f"{place}.{name}[{i}]"
            right: list[str] = []
            for j, answer in enumerate(_list(_object(query, here).get("answers"), f"{here}.answers")):
                known = _object(answer, f"{here}.answers[{j}]")
                right += _answers(known.get("value"), known.get("aliases"), f"{here}.answers[{j}].value")
            if right:  # some queries have no answer in Wikidata
                found.append((_text(query.get("prompt"), f"{here}.prompt"), tuple(dict.fromkeys(right))))
        return tuple(found)

    return Probe(kind, asked("test_queries"), test.get("test_condition") == "AND", asked("condition_queries"))


def _answers(answer: Any, aliases: Any, field: str) -> tuple[str, ...]:
    """An answer and its other names, each once; a name that is empty is none."""
    others = [name for name in _list(aliases, f"{field}'s aliases") if is_clean_text(name) and name.strip()]
    return tuple(dict.fromkeys([_text(answer, field), *others]))


def _object(found: Any, field: str) -> Mapping[str, Any]:
    if not isinstance(found, Mapping):
        raise _Problem(field, f"must be an object, not {found!r:.40}")
    return found


def _list(found: Any, field: str) -> list[Any]:
    if found is not None and not isinstance(found, list):
        raise _Problem(field, f"must be a list, not {found!r:.40}")
    return found or []


def _request(fields: Mapping[str, Any], prefix: str) -> EditRequest:
    for name in ("prompt", "subject", "target_new", "target_true"):
        found = fields.get(name)
        if isinstance(found, Mapping):
            _text(found.get("str"), f"{prefix}{name}.str")
        else:
            _text(found, prefix + name)
    try:
        return EditRequest.from_dict(fields)
    except BadRequest as bad:
        raise _Problem(f"{prefix}prompt", str(bad)) from None


def _prompts(record: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """A list of prompts, or one prompt on its own; a field that is not there is no prompt."""
    found = record.get(name)
    if found is None:
        return ()
    prompts = [found] if isinstance(found, str) else found
    if not isinstance(prompts, list):
        raise _Problem(name, f"must be a list of texts, not {type(found).__name__}")
    for index, prompt in enumerate(prompts):
        _text(prompt, name if isinstance(found, str) else f"{name}[{index}]", missing=False)
    return tuple(prompts)


def _text(found: Any, field: str, missing: bool = True) -> str:
    """What a field holds, if it is text that is not empty."""
    if found is None and missing:
        raise _Problem(field, "is missing")
    if not is_clean_text(found) or not found.strip():
        raise _Problem(field, f"must be text that is not empty, not {found!r:.40}")
    return str(found)


def _relation(fields: Mapping[str, Any], prefix: str) -> str | None:
    found = fields.get("relation_id")
    if found is not None and not isinstance(found, str):
        raise _Problem(f"{prefix}relation_id", f"must be text or null, not {found!r:.40}")
    return found


def _fields(value: Mapping[str, Any]) -> str:
    return ", ".join(map(str, value))[:120] or "none"


@dataclass(frozen=True)
class ZsreRecord(Record):
    """One question to answer anew, a rephrased one, and an unrelated one with an answer of its own."""


def load_zsre(source: StrPath, *, skip_malformed: bool = False) -> list[ZsreRecord]:
    """Read zsRE records in MEND's format, as MEMIT's evaluation reads them.

    The question `src` with ``{}`` for its subject is the prompt and the first of `answers` the new answer (`alt` is not
    read); `rephrase` is the one paraphrase. `loc` is the unrelated question: it keeps its beginning "nq question: " and
    gets a "?", and `loc_ans` is its answer. A record's number is its place in the file, from 0.

    Args:
        source: A JSON list or JSONL file, with or without ``zsre:`` before its path; or ``"zsre"``, see `ADDRESSES`.
        skip_malformed: Log records that cannot be read and go on without them.
    """
    spec = os.fspath(source)
    path = Path(spec.removeprefix(ZSRE_PREFIX))
    if spec == "zsre":
        path = downloaded(spec, ADDRESSES[spec], BadData)
    return _read_all(str(path), list(read_values(path, BadData)), _zsre_record, skip_malformed)


def is_zsre(source: StrPath) -> bool:
    """Whether records are asked for as zsRE, or their file's first one has zsRE's fields."""
    spec = os.fspath(source)
    if spec == "zsre" or spec.startswith(ZSRE_PREFIX):
        return True
    path = Path(spec)
    if not path.is_file() or path.stat().st_size == 0:
        return False  # a name, or a file that is refused elsewhere
    first = next(read_values(path, BadData), None)
    return first is not None and isinstance(first.value, Mapping) and {"src", "loc"} <= set(first.value)


def _zsre_record(index: int, found: Value) -> ZsreRecord:
    value = found.value
    subject, question = _text(value.get("subject"), "subject"), _text(value.get("src"), "src")
    if subject not in question:
        raise _Problem("src", f"{question!r:.60} does not contain the subject {subject!r:.40}")
    if question.count(subject) > 1:
        raise _Problem("src", f"{question!r:.60} contains the subject {subject!r:.40} twice")
    answers = value.get("answers")
    if not isinstance(answers, list) or not answers:
        raise _Problem("answers", f"must be a list of one text or more, not {answers!r:.40}")
    answer = _text(answers[0], "answers[0]")
    try:
        request = EditRequest(question.replace(subject, "{}"), subject, answer)
    except BadRequest as bad:
        raise _Problem("src", str(bad)) from None
    unrelated = _text(value.get("loc"), "loc")
    if not unrelated.startswith(_ZSRE_UNRELATED):
        raise _Problem("loc", f"{unrelated!r:.60} does not begin with {_ZSRE_UNRELATED!r}")
    return ZsreRecord(
        index,
        request,
        paraphrases=(_text(value.get("rephrase"), "rephrase"),),
        neighbourhood=(unrelated + "?",),
        neighbourhood_answers=(_text(value.get("loc_ans"), "loc_ans"),),
    )
