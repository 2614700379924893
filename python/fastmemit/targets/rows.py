"""The token rows behind one request's loss: where the change enters and where the loss reads.

A subject that is the very first token of its row is a case of its own.  Where the tokenizer puts no
BOS in front, the first token takes the attention of all others and is nearly the same activation whichever word it is
(cosine 0.95 and more, at a fraction of the usual norm): a change keyed on it
is not a change of this subject.  The bare prompt of such a request gets a line break in front,
`lead`, in the key, in the target vector and when the fact is asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastmemit.errors import BadRequest
from fastmemit.request import EditRequest
from fastmemit.tokens import encode, encode_with_target, subject_end

KL_PROMPT_ENDING = " is a"
#: What may stand before a subject that would be the first token; the first that the tokenizer does
#: not swallow is taken.
LEADS = ("\n", ". ", "The ")


@dataclass(frozen=True)
class Row:
    """One sequence that runs through the model.

    Attributes:
        ids: Token ids up to the last position that the loss reads.
        subject: Index of the subject's last token, where the change enters.
        reads: ``(index in ids, token id)`` pairs: the token that this position should predict.
    """

    ids: tuple[int, ...]
    subject: int
    reads: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class RequestRows:
    """All rows of one request; ``rows[0]`` is the bare prompt, behind its `lead` if it has one.

    Attributes:
        rows: One row per context, then the row of the KL prompt unless another row serves for it.
        kl: Which row carries the KL term, read at its subject token.
    """

    rows: tuple[Row, ...]
    kl: int

    @property
    def prefix(self) -> int:
        """The most tokens that stand before the subject's last token in any row."""
        return max(row.subject for row in self.rows)

    @property
    def suffix(self) -> int:
        """The most tokens from the subject's last token on in any row."""
        return max(len(row.ids) - row.subject for row in self.rows)


def lead(tokenizer: Any, request: EditRequest) -> str:
    """What a request's bare prompt is read, learned and asked behind.

    Returns:
        ``""``; or one of `LEADS` if the subject's last token is otherwise the first of the row.
    """
    for front in ("", *LEADS):
        text, start = _placed(tokenizer, front, request)
        encoded = encode(tokenizer, text)
        if subject_end(encoded, start, start + len(request.subject)) > 0:
            return front
    return ""  # a tokenizer that makes one token of everything; nothing helps


def subject_row(tokenizer: Any, prefix: str, request: EditRequest) -> Row:
    """The tokens of ``prefix + prompt`` up to the subject's last token.

    An empty prefix stands for the bare prompt, which is read behind its `lead`.
    """
    return _subject_row(tokenizer, prefix or lead(tokenizer, request), request)


def _placed(tokenizer: Any, prefix: str, request: EditRequest) -> tuple[str, int]:
    """A prefix with the prompt behind it, and where the subject begins.

    A prompt that brings its own BOS has the prefix behind that, as every text has.
    """
    text, start = request.text, len(prefix) + len(request.before)
    bos = getattr(tokenizer, "bos_token", None)
    if prefix and bos and request.before.startswith(bos) and encode(tokenizer, "").ids:
        return bos + prefix + text[len(bos) :], start
    return prefix + text, start


def request_rows(tokenizer: Any, request: EditRequest, contexts: Sequence[str]) -> RequestRows:
    """Build the rows of the target loss (ROME, section 3.1; method of MEMIT, section 4.2).

    Args:
        tokenizer: The model's tokenizer.
        request: The fact.
        contexts: Texts put before the prompt; the first must be ``""``, the bare prompt.

    Raises:
        BadRequest: The subject's last token and the target share a token.
    """
    if not contexts or contexts[0] != "":
        raise ValueError(f"contexts must begin with '' (the bare prompt), not {contexts[:1]!r}.")
    front = lead(tokenizer, request)
    rows = [_target_row(tokenizer, request, prefix or front) for prefix in contexts]
    # Bare, as published, where the prompt is; a lead is the whole request's.
    essence = EditRequest("{}" + KL_PROMPT_ENDING, request.subject, request.target_new)
    kl = _subject_row(tokenizer, front, essence)
    # A causal model gives the KL prompt's distribution at the subject in any row that has the same
    # tokens up to there, as every prompt has that begins with its subject: no row of its own then.
    for index, row in enumerate(rows):
        if row.ids[: row.subject + 1] == kl.ids:
            return RequestRows(tuple(rows), index)
    return RequestRows((*rows, kl), len(rows))


def like_lengths(rows: Sequence[RequestRows], batch_tokens: int) -> Iterator[list[int]]:
    """Requests of like lengths, as many as fit: padding to the longest then costs little."""
    group: list[int] = []
    prefix = suffix = count = 0
    for index in sorted(range(len(rows)), key=lambda i: (rows[i].suffix, rows[i].prefix)):
        wide = max(prefix, rows[index].prefix) + max(suffix, rows[index].suffix)
        if group and (count + len(rows[index].rows)) * wide > batch_tokens:
            yield group
            group, prefix, suffix, count = [], 0, 0, 0
        group.append(index)
        prefix, suffix = max(prefix, rows[index].prefix), max(suffix, rows[index].suffix)
        count += len(rows[index].rows)
    if group:
        yield group


def _subject_row(tokenizer: Any, prefix: str, request: EditRequest) -> Row:
    text, start = _placed(tokenizer, prefix, request)
    encoded = encode(tokenizer, text)
    index = subject_end(encoded, start, start + len(request.subject))
    return Row(encoded.ids[: index + 1], index)


def _target_row(tokenizer: Any, request: EditRequest, prefix: str) -> Row:
    text, start = _placed(tokenizer, prefix, request)
    encoded, n_target = encode_with_target(tokenizer, text, request.target)
    subject = subject_end(encoded, start, start + len(request.subject))
    first = len(encoded.ids) - n_target
    if subject >= first:
        raise BadRequest(
            f"The tokenizer merges the end of the subject {request.subject!r} with the target "
            f"{request.target!r}; put a word between them in the prompt {request.prompt!r}."
        )
    # The last target token is predicted, never read: it needs no column.
    reads = tuple((index - 1, encoded.ids[index]) for index in range(first, len(encoded.ids)))
    return Row(encoded.ids[:-1], subject, reads)
