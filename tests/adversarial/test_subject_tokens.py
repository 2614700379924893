"""The token that carries a subject, against the bytes that each token stands for.

The tokenizers' own offsets are not asked: tokens are turned back into bytes, and the bytes counted.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from adversarial.awkward import PROMPTS, SCIENTIST, SUBJECTS, requests
from fastmemit.errors import BadRequest
from fastmemit.request import EditRequest
from fastmemit.text import NOWHERE, encode, encode_with_target, subject_end
from tiny_tokenizers import SPECIAL, tiny_tokenizer

KINDS = ("byte_bpe", "bpe_bos", "adds_eos", "metaspace", "slow_bytes")


def byte_of() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for, as GPT-2 has it."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(moved)}


BYTES = byte_of()


def raw(kind: str, piece: str) -> bytes:
    """What a token stands for."""
    if piece in SPECIAL:
        return piece.encode()
    if kind == "slow_bytes":
        return bytes.fromhex(piece)
    if kind == "metaspace":
        if found := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
            return bytes.fromhex(found[1])
        return piece.replace("▁", " ").encode()
    return bytes(BYTES[character] for character in piece)


def last_token_by_bytes(tokenizer: Any, kind: str, text: str, place: int) -> int | None:
    """The token with the last byte of the character before `place`; None if bytes were lost."""
    encoded = encode(tokenizer, text)
    pieces = tokenizer.convert_ids_to_tokens(list(encoded.ids))
    skip = sum(span == NOWHERE for span in encoded.spans)  # BOS
    parts = [b"" if i < skip else raw(kind, piece) for i, piece in enumerate(pieces)]
    shift = 1 if kind == "metaspace" else 0  # the space that it puts in front
    if b"".join(parts)[shift:] != text.encode():
        return None
    wanted = len(text[:place].encode()) + shift
    ends = list(itertools.accumulate(map(len, parts)))
    return next(i for i, end in enumerate(ends) if end >= wanted)


def check(kind: str, request: EditRequest, prefix: str = "") -> None:
    tokenizer = tiny_tokenizer(kind)
    text = prefix + request.text
    start = len(prefix) + len(request.before)
    end = start + len(request.subject)
    expected = last_token_by_bytes(tokenizer, kind, text, end)
    assert expected is not None or kind == "metaspace" or set(SPECIAL) & set(_words(text))
    if expected is not None:
        assert subject_end(encode(tokenizer, text), start, end) == expected


def _words(text: str) -> list[str]:
    return [special for special in SPECIAL if special in text]


def test_the_bytes_are_those_of_the_tokenizers() -> None:
    assert sorted(BYTES) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(BYTES.values()) == list(range(256))


@pytest.mark.parametrize("kind", KINDS)
def test_every_awkward_subject_in_every_awkward_prompt(kind: str) -> None:
    for prompt, subject in itertools.product(PROMPTS, SUBJECTS):
        check(kind, EditRequest(prompt, subject, "Rome"))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(request=requests(), prefix=st.sampled_from(("", "The poet. ", f"{SCIENTIST}. ", " ")))
@example(EditRequest("{}s", "the capital", "x"), "")  # merged with what follows
@example(EditRequest("The {}y", "cit", "x"), "")
@example(EditRequest("{}{", SCIENTIST[:2], "x"), "")
def test_the_last_token_of_any_subject(kind: str, request: EditRequest, prefix: str) -> None:
    check(kind, request, prefix)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(request=requests())
def test_a_target_is_the_tokens_that_hold_its_characters(kind: str, request: EditRequest) -> None:
    tokenizer = tiny_tokenizer(kind)
    try:
        encoded, count = encode_with_target(tokenizer, request.text, request.target)
    except BadRequest:
        assert kind == "metaspace" or not request.target.strip()
        return
    assert list(encoded.ids) == list(encode(tokenizer, request.text + request.target).ids)
    border = last_token_by_bytes(tokenizer, kind, request.text + request.target, len(request.text))
    if border is not None and count < len(encoded):
        # The first token of the target is the one behind the text's last byte, or it holds both.
        first = len(encoded) - count
        assert first in (border, border + 1)
        assert (first == border) == (encoded.spans[border][1] > len(request.text))
