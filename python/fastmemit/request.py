"""One fact to change: a prompt with a hole for its subject, and the answer it should get."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from fastmemit.errors import BadRequest


def _shown(text: str) -> str:
    """`text` quoted for an error message, cut so that one sentence stays one line."""
    return repr(text if len(text) <= 80 else text[:79] + "…")


@dataclass(frozen=True)
class EditRequest:
    """A fact to write into a model.

    Args:
        prompt: The sentence up to the answer, with exactly one ``{}`` where the subject stands.
        subject: What the fact is about; it replaces the ``{}`` as it is written.
        target_new: The answer that the edited model shall give, with or without a leading space.
        target_true: The answer that the unedited model gives; needed for scores, not for edits.
        join: What stands between prompt and answer, ``""`` for nothing; None leaves it to the rule of `joined_answer`.

    Raises:
        BadRequest: The prompt has no ``{}`` or several, or has it where the answer would stand; the subject or a target
            is empty; or a text holds half of a surrogate pair, which no tokenizer can read.
    """

    prompt: str
    subject: str
    target_new: str
    target_true: str | None = None
    join: str | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "subject", "target_new", "target_true", "join"):
            value = getattr(self, name)
            optional = name in ("target_true", "join")
            if not isinstance(value, str) and not (optional and value is None):
                raise BadRequest(
                    f"{name} must be text but is {type(value).__name__} ({value!r:.80}); write it as a string."
                )
            if value is not None:
                _check_unicode(name, value)
        holes = self.prompt.count("{}")
        if holes != 1:
            found = "has no {}" if holes == 0 else f"has {holes} of {{}}"
            raise BadRequest(
                f"The prompt {_shown(self.prompt)} {found}; write exactly one {{}} "
                f"where the subject {_shown(self.subject)} stands."
            )
        if not self.subject.strip():
            raise BadRequest(f"The subject of the prompt {_shown(self.prompt)} is empty; name what the fact is about.")
        for name in ("target_new", "target_true"):
            value = getattr(self, name)
            if value is not None and not value.strip():
                raise BadRequest(f"The {name} of {_shown(self.text)} is empty; give at least one word.")
        self._check_place()

    def _check_place(self) -> None:
        """Refuse a prompt that names the subject itself and has ``{}`` for the answer."""
        named = _as_a_word(self.subject.strip()).search(self.before)
        if named is None or any(map(str.isalnum, self.after)):
            return
        if not any(map(str.isalnum, self.before[named.end() :])):
            return  # nothing is said about it before the hole
        meant = self.before[: named.start()] + "{}" + self.before[named.end() :].rstrip()
        raise BadRequest(
            f"The prompt {_shown(self.prompt)} names its subject {_shown(self.subject)} and has "
            "{} where the answer would stand, but {} stands for the subject and the answer follows "
            f"the prompt; did you mean {_shown(meant)}?"
        )

    @property
    def before(self) -> str:
        """The template's text before the subject."""
        return self.prompt.partition("{}")[0]

    @property
    def after(self) -> str:
        """The template's text after the subject."""
        return self.prompt.partition("{}")[2]

    @property
    def text(self) -> str:
        """The prompt with the subject in place."""
        return self.before + self.subject + self.after

    @cached_property
    def target(self) -> str:
        """The new answer with what joins it to the prompt, as a rule a space."""
        return joined_answer(self.text, self.target_new, self.join)

    def answer_to(self, text: str, answer: str) -> str:
        """An answer as it stands behind the prompt, or behind another text about the fact."""
        return joined_answer(text, answer, self.join)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EditRequest:
        """Read one request in any of the spellings that editing codebases use.

        ``target_new`` and ``target_true`` may be text or ``{"str": text}`` (MEMIT); ``target`` stands for
        ``target_new`` (FastEdit); a CounterFact record's ``requested_rewrite`` is unpacked; a prompt without ``{}`` in
        which the subject occurs exactly once is taken as already filled (EasyEdit).

        Raises:
            BadRequest: A field is missing, of the wrong kind or empty; the subject is not in a filled prompt, or is
                there several times.
        """
        if not isinstance(data, Mapping):
            raise BadRequest(f"A request must be an object with prompt, subject and target_new, not {data!r:.80}.")
        data = data.get("requested_rewrite", data)
        if not isinstance(data, Mapping):
            raise BadRequest(f"requested_rewrite must be an object, not {data!r:.80}.")
        fields: dict[str, Any] = {name: data.get(name) for name in ("prompt", "subject")}
        fields["target_new"] = _answer(data, "target_new" if "target_new" in data else "target")
        fields["target_true"] = _answer(data, "target_true")
        fields["join"] = data.get("join")
        for name in ("prompt", "subject", "target_new"):
            if fields[name] is None:
                raise BadRequest(
                    f"The request has no {name} (its fields: {', '.join(map(str, data))[:120] or 'none'}); add it."
                )
        prompt, subject = fields["prompt"], fields["subject"]
        if isinstance(prompt, str) and isinstance(subject, str) and "{}" not in prompt:
            fields["prompt"] = _template(prompt, subject)
        return cls(**fields)


#: Behind these, and behind brackets that open and signs of currency, the answer follows at once.
_ATTACHING = frozenset("<¿¡/@#_")
#: First and last code points of scripts that put no space between words, and of their punctuation.
_WITHOUT_SPACES = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x0F00, 0x0FFF),  # Tibetan
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19DF),  # Tai Le, New Tai Lue
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x2E80, 0x312F),  # Han radicals, CJK punctuation, kana, bopomofo
    (0x3190, 0x9FFF),  # kanbun, phonetic kana, Han (Hangul, which has spaces, lies elsewhere)
    (0xA980, 0xA9DF),  # Javanese
    (0xAA60, 0xAADF),  # Myanmar extended, Tai Viet
    (0xF900, 0xFAFF),  # Han for compatibility
    (0xFF00, 0xFF9F),  # full-width forms and half-width kana
    (0x1B000, 0x1B16F),  # historic kana
    (0x20000, 0x323AF),  # Han extensions
)
_UNSPACED = re.compile("[" + "".join(f"{chr(first)}-{chr(last)}" for first, last in _WITHOUT_SPACES) + "]")


def joined_answer(text: str, answer: str, join: str | None = None) -> str:
    """What follows a text: an answer behind what stands between the two, as a user would write both.

    White space behind the answer is removed. In front of it stands, by the first rule that fits:

    1. `join`, if it is given.
    2. Nothing, if the text ends in white space.
    3. The white space that the answer brings itself.
    4. Nothing, if the text ends in a script without spaces between words (Chinese, Japanese, Thai
       and others) or its punctuation, with a bracket or quotation mark that opens, with a sign of
       currency, with one of ``/ @ # _ < ¿ ¡``, or with a special token that is written ``<|...|>``.
    5. One space.
    """
    bare = answer.strip()
    if join is not None:
        return join + bare
    if text[-1:].isspace():
        return bare
    own = answer[: len(answer) - len(answer.lstrip())]
    if own.strip(" "):  # a line break, say; spaces are one space
        return own + bare
    return ("" if not own and _attaches(text) else " ") + bare


def _attaches(text: str) -> bool:
    """Whether an answer follows the text without a space."""
    end = len(text)
    # Most marks of quotation both open and close: one opens where a word could begin.
    while end and (text[end - 1] in "\"'`" or unicodedata.category(text[end - 1]) == "Pi"):
        end -= 1
    if not end or (end < len(text) and text[end - 1].isspace()):
        return True
    last = text[end - 1]
    if last in _ATTACHING or _UNSPACED.match(last) or unicodedata.category(last) in ("Ps", "Sc"):
        return True
    return re.search(r"<[|\uff5c][^<>\s]*[|\uff5c]>\Z", text) is not None


def _as_a_word(text: str) -> re.Pattern[str]:
    """Finds a text that is not part of a longer word, where words are told apart by spaces."""
    start = "" if _UNSPACED.match(text[0]) else r"(?<!\w)"
    end = "" if _UNSPACED.match(text[-1]) else r"(?!\w)"
    return re.compile(start + re.escape(text) + end, re.IGNORECASE)


def _check_unicode(name: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRequest(f"The {name} {_shown(text)} is not valid Unicode; correct it.") from None


def _answer(data: Mapping[str, Any], name: str) -> Any:
    value = data.get(name)
    return value.get("str") if isinstance(value, Mapping) else value


def _template(prompt: str, subject: str) -> str:
    """The template of an already filled prompt."""
    count = prompt.count(subject) if subject else 0
    if count == 0:
        raise BadRequest(
            f"The subject {_shown(subject)} is not in the prompt {_shown(prompt)}; "
            "write {} where the subject stands, or correct one of the two."
        )
    if count > 1:
        raise BadRequest(
            f"The subject {_shown(subject)} is {count} times in the prompt {_shown(prompt)}; "
            "write {} at the place that is meant."
        )
    return prompt.replace(subject, "{}")


#: One fact: a request, a mapping as `EditRequest.from_dict` reads it, or a triple (prompt, subject, target).
Fact = EditRequest | Mapping[str, Any] | tuple[str, str, str]


def as_requests(facts: Fact | Iterable[Fact]) -> list[EditRequest]:
    """Facts as requests, one or many; a BadRequest for what cannot be read as a fact."""
    triple = isinstance(facts, tuple) and len(facts) == 3 and all(isinstance(part, str) for part in facts)
    one = triple or isinstance(facts, EditRequest | Mapping | str) or not isinstance(facts, Iterable)
    listed = [facts] if one else facts
    return [_as_request(fact) for fact in cast("Iterable[Fact]", listed)]


def _as_request(fact: Fact) -> EditRequest:
    if isinstance(fact, EditRequest):
        return fact
    if isinstance(fact, Mapping):
        return EditRequest.from_dict(fact)
    if isinstance(fact, str) or not isinstance(fact, Iterable) or len(parts := tuple(fact)) != 3:
        raise BadRequest(
            f"{fact!r:.80} is no fact; give an EditRequest, a dictionary, or a triple of prompt, subject and target."
        )
    return EditRequest.from_dict(dict(zip(("prompt", "subject", "target"), parts, strict=True)))


def check_batch(facts: Fact | Iterable[Fact]) -> list[EditRequest]:
    """The facts as requests, at least one, if they can be written together: no two of one prompt; else a BadRequest."""
    batch = as_requests(facts)
    if not batch:
        raise BadRequest("There is no request to edit; give at least one.")
    seen: dict[tuple[str, str], int] = {}
    for index, request in enumerate(batch):
        # White space behind a prompt is the answer's: with it or without, the text is the same.
        asked = (request.prompt.rstrip(), request.subject.strip().lower())
        first = seen.setdefault(asked, index)
        if first != index:
            raise BadRequest(
                f"Requests {first} and {index} both edit {_shown(request.text)} (to {_shown(batch[first].target_new)} "
                f"and {_shown(request.target_new)}); keep one of them in the batch."
            )
    return batch
