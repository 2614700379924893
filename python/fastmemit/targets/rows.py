"""The token rows behind one request's loss: where the change enters and where the loss reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastmemit.errors import BadRequest
from fastmemit.request import EditRequest
from fastmemit.tokens import encode, encode_with_target, subject_end

KL_PROMPT_ENDING = " is a"


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
    """All rows of one request; ``rows[0]`` is the bare prompt.

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


def subject_row(tokenizer: Any, prefix: str, request: EditRequest) -> Row:
    """The tokens of ``prefix + prompt`` up to the subject's last token."""
    start = len(prefix) + len(request.before)
    encoded = encode(tokenizer, prefix + request.text)
    index = subject_end(encoded, start, start + len(request.subject))
    return Row(encoded.ids[: index + 1], index)


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
    rows = [_target_row(tokenizer, request, prefix) for prefix in contexts]
    kl = subject_row(
        tokenizer, "", EditRequest("{}" + KL_PROMPT_ENDING, request.subject, request.target_new)
    )
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


def _target_row(tokenizer: Any, request: EditRequest, prefix: str) -> Row:
    encoded, n_target = encode_with_target(tokenizer, prefix + request.text, request.target)
    start = len(prefix) + len(request.before)
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
