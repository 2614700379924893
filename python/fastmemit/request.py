"""One fact to change: a prompt with a hole for its subject, and the answer it should get."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastmemit.errors import BadRequest, DuplicateRequest


def _shown(text: str, limit: int = 80) -> str:
    """`text` quoted for an error message, cut so that one sentence stays one line."""
    return repr(text if len(text) <= limit else text[: limit - 1] + "…")


@dataclass(frozen=True)
class EditRequest:
    """A fact to write into a model.

    Args:
        prompt: The sentence up to the answer, with exactly one ``{}`` where the subject stands.
        subject: What the fact is about; it replaces the ``{}`` as it is written.
        target_new: The answer that the edited model shall give, with or without a leading space.
        target_true: The answer that the unedited model gives; needed for scores, not for edits.

    Raises:
        BadRequest: The prompt has no ``{}`` or several, the subject or a target is empty, or a text
            holds half of a surrogate pair, which no tokenizer can read.
    """

    prompt: str
    subject: str
    target_new: str
    target_true: str | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "subject", "target_new", "target_true"):
            value = getattr(self, name)
            if not isinstance(value, str) and not (name == "target_true" and value is None):
                raise BadRequest(
                    f"{name} must be text but is {type(value).__name__} ({value!r:.80}); "
                    "write it as a string."
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
            raise BadRequest(
                f"The subject of the prompt {_shown(self.prompt)} is empty; "
                "name what the fact is about."
            )
        for name in ("target_new", "target_true"):
            value = getattr(self, name)
            if value is not None and not value.strip():
                raise BadRequest(
                    f"The {name} of {_shown(self.text)} is empty; give at least one word."
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

    @property
    def target(self) -> str:
        """The new answer as it follows the prompt: one space, then the words."""
        return " " + self.target_new.strip()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EditRequest:
        """Read one request in any of the spellings that editing codebases use.

        ``target_new`` and ``target_true`` may be text or ``{"str": text}`` (MEMIT); ``target``
        stands for ``target_new`` (FastEdit); a CounterFact record's ``requested_rewrite`` is
        unpacked; a prompt without ``{}`` in which the subject occurs exactly once is taken as
        already filled (EasyEdit).

        Raises:
            BadRequest: A field is missing, of the wrong kind or empty; the subject is not in a
                filled prompt, or is there several times.
        """
        if not isinstance(data, Mapping):
            raise BadRequest(
                "A request must be an object with prompt, subject and target_new, "
                f"not {data!r:.80}."
            )
        data = data.get("requested_rewrite", data)
        if not isinstance(data, Mapping):
            raise BadRequest(f"requested_rewrite must be an object, not {data!r:.80}.")
        fields: dict[str, Any] = {name: data.get(name) for name in ("prompt", "subject")}
        fields["target_new"] = _answer(data, "target_new" if "target_new" in data else "target")
        fields["target_true"] = _answer(data, "target_true")
        for name in ("prompt", "subject", "target_new"):
            if fields[name] is None:
                raise BadRequest(
                    f"The request has no {name} (its fields: "
                    f"{', '.join(map(str, data))[:120] or 'none'}); add it."
                )
        prompt, subject = fields["prompt"], fields["subject"]
        if isinstance(prompt, str) and isinstance(subject, str) and "{}" not in prompt:
            fields["prompt"] = _template(prompt, subject)
        return cls(**fields)


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


def check_batch(requests: Iterable[EditRequest]) -> list[EditRequest]:
    """The requests as a list, if they can be written together.

    Raises:
        BadRequest: There are none.
        DuplicateRequest: Two have the same subject and prompt; one batch cannot hold both answers,
            and writing the same one twice makes the exact solve singular.
    """
    batch = list(requests)
    if not batch:
        raise BadRequest("There is no request to edit; give at least one.")
    seen: dict[tuple[str, str], int] = {}
    for index, request in enumerate(batch):
        first = seen.setdefault((request.prompt, request.subject.strip().lower()), index)
        if first != index:
            raise DuplicateRequest(
                f"Requests {first} and {index} both edit {_shown(request.text)} (to "
                f"{_shown(batch[first].target_new)} and {_shown(request.target_new)}); "
                "keep one of them in the batch."
            )
    return batch
