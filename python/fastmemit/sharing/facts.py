"""The facts that a saved edit writes, read from its provenance, and whether two edits agree."""

from __future__ import annotations

from collections.abc import Sequence

from fastmemit.delta import Delta
from fastmemit.errors import BadData, BadRequest, ConflictingEdits
from fastmemit.request import EditRequest


def facts_of(delta: Delta) -> list[EditRequest]:
    """The requests on record; none where there are none.

    Raises:
        BadData: They are no requests.
    """
    found = delta.provenance.get("requests", [])
    if not isinstance(found, list):
        raise BadData(f"The edit's requests are no list but {found!r:.80}; make the edit again.")
    facts = []
    for index, item in enumerate(found):
        try:
            facts.append(EditRequest.from_dict(item))
        except BadRequest as error:
            raise BadData(f"Request {index} of the edit cannot be read: {error}") from error
    return facts


def listed_texts(delta: Delta, field: str) -> list[str]:
    """The texts in a list of the provenance; what is no text or no list is left out."""
    found = delta.provenance.get(field)
    return [item for item in found if isinstance(item, str)] if isinstance(found, list) else []


def check_facts(deltas: Sequence[Delta]) -> None:
    """Refuse edits of which two write the same fact.

    The same subject in the same prompt with two answers is a contradiction.  With the same answer
    the change would be made twice, except where the later edit was computed on top of the earlier.

    Raises:
        ConflictingEdits: Two edits do so; the message names the fact, both edits and both answers.
    """
    seen: dict[tuple[str, str], tuple[int, EditRequest]] = {}
    for place, delta in enumerate(deltas):
        for fact in facts_of(delta):
            key = (fact.prompt.rstrip(), fact.subject.strip().lower())
            first, other = seen.setdefault(key, (place, fact))
            if first == place:
                continue
            if other.target.strip() != fact.target.strip():
                raise ConflictingEdits(
                    f"Edit {first + 1} makes {fact.text!r:.80} go on with {other.target!r:.40} and "
                    f"edit {place + 1} with {fact.target!r:.40}; leave one of them out, or pass "
                    "allow_conflicts=True to add both."
                )
            if deltas[first].digest() not in listed_texts(delta, "on_top_of"):
                raise ConflictingEdits(
                    f"Edits {first + 1} and {place + 1} both write {fact.text + fact.target!r:.80} "
                    "and would together change twice what is needed; leave one of them out, or "
                    "pass allow_conflicts=True to add both."
                )
