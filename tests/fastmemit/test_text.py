"""Tokens and the characters they cover, for every kind of tokenizer."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastmemit.errors import BadConfig, BadRequest
from fastmemit.models.running import length_batches, pad_batch
from fastmemit.request import EditRequest
from fastmemit.text import (
    NOWHERE,
    Encoded,
    chat_request,
    chat_text,
    continue_rows,
    encode,
    encode_with_target,
    subject_end,
    subject_row,
    text_tokenizer,
)
from tiny_models import tiny_model
from tiny_tokenizers import BOS, EOS, FAST, PAD, UNK, tiny_tokenizer

KINDS = (*FAST, "slow_bytes", "slow_words")
WITH_BOS = ("bpe_bos", "metaspace", "adds_eos", "slow_bytes", "slow_words")
LOSSLESS = (*FAST, "slow_bytes")  # every character of a text is in some token

FAMILY = "👨‍👩‍👧"  # five code points, two of them zero-width joiners
TEXTS = [
    "The Eiffel Tower is located in the city of",
    "the",
    " leading, trailing ",
    "two  spaces,\ttab\nand\r\nlines",
    "braces {} {x} {{}}",
    f"emoji 🙂🙂 and {FAMILY} é é",
    "עברית و العربية mixed",
    "zero\u200bwidth\ufeff and \u2060joiners",
    "日本語のテキスト",
    "real \ufffd and fake �",
]
texts = st.text(
    st.one_of(st.sampled_from("The city of Paris.,  \n🙂é日א\u200b{}"), st.characters(exclude_categories=["Cs", "Cc"])),
    max_size=25,
).filter(lambda text: not any(special in text for special in (PAD, BOS, EOS, UNK)))


def covered(encoded: Encoded) -> list[tuple[int, int]]:
    return [span for span in encoded.spans if span != NOWHERE]


def literal_end(encoded: Encoded, place: int) -> int:
    """The last token whose span holds the character at `place`, by looking at each."""
    return [i for i, (left, right) in enumerate(encoded.spans) if left <= place < right][-1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_the_tokenizers_own_without_what_it_puts_behind(kind: str, text: str) -> None:
    tokenizer = tiny_tokenizer(kind)
    own = tokenizer(text)["input_ids"]
    if own[-1] == tokenizer.eos_token_id:
        own = own[:-1]
    encoded = encode(tokenizer, text)
    assert list(encoded.ids) == own
    assert len(encoded) == len(encoded.spans)
    assert (encoded.spans[0] == NOWHERE) == (kind in WITH_BOS)
    assert NOWHERE not in encoded.spans[1:]


@pytest.mark.parametrize("kind", LOSSLESS)
@settings(max_examples=80, deadline=None)
@given(text=texts)
@example("\ufffd\ufffda")
@example("  ")
@example(f"{FAMILY}{FAMILY}")
@example("or")
@example(" ")
def test_spans_tile_the_text(kind: str, text: str) -> None:
    spans = covered(encode(tiny_tokenizer(kind), text))
    reached = 0
    for left, right in spans:
        # Nothing is left out, not even white space, and spans move on.  Neighbours share a
        # character that is in pieces; and the "▁" put before a text claims the first one.
        assert reached - 1 <= left <= reached <= right
        reached = right
    assert reached == len(text)


@pytest.mark.parametrize("kind", LOSSLESS)
@settings(max_examples=80, deadline=None)
@given(before=texts, subject=texts, after=texts)
@example("", "🙂", "🙂")
@example("a {} b ", "Eiffel", " is")
@example("Paris, ", "Paris", " Paris")
def test_the_subject_ends_in_the_token_of_its_last_character(kind: str, before: str, subject: str, after: str) -> None:
    encoded = encode(tiny_tokenizer(kind), before + subject + after)
    start, end = len(before), len(before) + len(subject)
    if not subject:
        with pytest.raises(BadRequest, match=f"characters {start} to {end}"):
            subject_end(encoded, start, end)
        return
    assert subject_end(encoded, start, end) == literal_end(encoded, end - 1)


@pytest.mark.parametrize(
    ("prompt", "subject", "last"),
    [
        ("{} is in the city", "The Eiffel Tower", " Tower"),
        ("The mother tongue of {} is", "Paris", " Paris"),
        ("Paris, Paris and {} of Paris", "Paris", " Paris"),
        ("The city of {}", "Paris", " Paris"),
        ("the {{}} and {{}} of {} is".replace("{{}}", "{x}"), "Rome", " Rome"),
    ],
)
def test_the_subjects_last_token_by_hand(prompt: str, subject: str, last: str) -> None:
    request = EditRequest(prompt, subject, "x")
    start = len(request.before)
    for kind in ("byte_bpe", "bpe_bos", "adds_eos"):
        tokenizer = tiny_tokenizer(kind)
        encoded = encode(tokenizer, request.text)
        index = subject_end(encoded, start, start + len(subject))
        assert tokenizer.decode([encoded.ids[index]]) == last
        # The one that is meant, not the first of its kind.
        assert encoded.spans[index][1] == start + len(subject)


@pytest.mark.parametrize("kind", LOSSLESS)
def test_an_emoji_of_several_tokens_ends_with_its_last_one(kind: str) -> None:
    encoded = encode(tiny_tokenizer(kind), "a🙂b")
    index = subject_end(encoded, 1, 2)
    assert encoded.spans[index] == (1, 2)
    assert encoded.spans[index + 1] == (2, 3)
    assert sum(span == (1, 2) for span in encoded.spans) >= 3  # four bytes, one pair at most


def test_a_slow_token_that_cuts_through_two_characters_covers_both() -> None:
    # f09f 99 82f0 9f 99 82: the third token ends the first smiley and begins the second.
    tokenizer = tiny_tokenizer("slow_bytes")
    encoded = encode(tokenizer, "🙂🙂")
    assert tokenizer.convert_ids_to_tokens(list(encoded.ids[1:4])) == ["f09f", "99", "82f0"]
    assert encoded.spans == (NOWHERE, (0, 1), (0, 1), (0, 2), (1, 2), (1, 2), (1, 2))


def test_slow_words_are_aligned_with_the_text_they_were_made_from() -> None:
    text = "The  Eiffel 🙂🙂 Tower, is"
    encoded = encode(tiny_tokenizer("slow_words"), text)
    pieces = [text[left:right] for left, right in covered(encoded)]
    assert pieces == ["The", "  Eiffel", " 🙂🙂", " Tower", ",", " is"]
    assert encoded.spans[0] == NOWHERE


def test_a_slow_and_a_fast_tokenizer_agree_on_the_last_character() -> None:
    for text in TEXTS:
        for kind in LOSSLESS:
            encoded = encode(tiny_tokenizer(kind), text)
            for place in range(len(text)):
                index = subject_end(encoded, place, place + 1)
                left, right = encoded.spans[index]
                assert left <= place < right


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_text_keeps_only_what_leads(kind: str) -> None:
    encoded = encode(tiny_tokenizer(kind), "")
    assert encoded.ids == ((1,) if kind in WITH_BOS else ())
    assert set(encoded.spans) <= {NOWHERE}


def test_special_tokens_written_in_the_text_are_text() -> None:
    for kind in ("bpe_bos", "adds_eos"):
        encoded = encode(tiny_tokenizer(kind), "The</s>")
        assert encoded.ids[0] == 1 and encoded.ids[-1] == 2
        assert encoded.spans[0] == NOWHERE and encoded.spans[-1] == (3, 7)


@pytest.mark.parametrize("kind", ["bpe_bos", "metaspace", "adds_eos", "slow_bytes"])
def test_a_text_that_brings_its_bos_does_not_get_another(kind: str) -> None:
    tokenizer = tiny_tokenizer(kind)
    plain, rendered = encode(tokenizer, "Paris is"), encode(tokenizer, "<s>Paris is")
    if kind == "metaspace":  # it puts no space before what follows a special token
        assert rendered.ids[:1] == (1,) and 1 not in rendered.ids[1:]
    else:
        assert rendered.ids == plain.ids
    assert rendered.spans[0] == (0, 3)
    assert subject_end(rendered, 3, 8) == subject_end(plain, 0, 5)
    assert encode(tokenizer, "<s>").ids == (1,)
    assert encode(tokenizer, "<s><s>Paris").ids.count(1) == 2  # two are written, two are meant


def test_settings_left_on_the_tokenizer_do_not_matter() -> None:
    tokenizer = tiny_tokenizer("bpe_bos")
    before = encode(tokenizer, TEXTS[0])
    tokenizer(TEXTS[:2], padding="max_length", truncation=True, max_length=4)
    side = tokenizer.padding_side
    tokenizer.padding_side = "left"
    assert encode(tokenizer, TEXTS[0]) == before
    tokenizer.padding_side = side


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_is_the_tail_of_the_joint_text(kind: str) -> None:
    tokenizer = tiny_tokenizer(kind)
    text, target = "The Eiffel Tower is located in the city of", " Rome"
    encoded, n_target = encode_with_target(tokenizer, text, target)
    assert encoded == encode(tokenizer, text + target)
    assert encoded.ids[:-n_target] == encode(tokenizer, text).ids
    assert encoded.spans[-n_target][0] == len(text)
    assert encoded.spans[-1][1] == len(text + target)


@pytest.mark.parametrize("kind", LOSSLESS)
@settings(max_examples=50, deadline=None)
@given(text=texts, target=texts.filter(lambda text: bool(text.strip())))
def test_the_targets_tokens_hold_all_of_its_characters(kind: str, text: str, target: str) -> None:
    encoded, n_target = encode_with_target(tiny_tokenizer(kind), text, target)
    ahead, tail = encoded.spans[:-n_target], encoded.spans[-n_target:]
    assert all(right <= len(text) for _, right in ahead)
    assert all(right > len(text) for _, right in tail)
    assert tail[0][0] <= len(text)


def test_a_token_across_the_border_belongs_to_the_target() -> None:
    tokenizer = tiny_tokenizer("byte_bpe")
    assert tokenizer.tokenize("The Tower") == ["The", "ĠTower"]
    encoded, n_target = encode_with_target(tokenizer, "The To", "wer")
    assert n_target == 1
    assert encoded.spans[-1] == (3, 9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_without_tokens_is_refused(kind: str) -> None:
    with pytest.raises(BadRequest, match="target '' yields no token after 'The city'"):
        encode_with_target(tiny_tokenizer(kind), "The city", "")


def test_a_slow_tokenizer_that_cannot_be_placed_is_refused() -> None:
    class Odd:
        def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict:
            return {"input_ids": [1, 5, 6] if add_special_tokens else [7, 8]}

    with pytest.raises(BadRequest, match=r"Odd tokenises 'text' differently.*fast tokenizer"):
        encode(Odd(), "text")


def test_a_decoder_that_takes_back_what_it_showed_still_moves_on() -> None:
    shown = {0: "", 1: "ab", 2: "x", 3: "abcd"}

    class Rewrites:
        def __call__(self, text: str, **_: Any) -> dict:
            return {"input_ids": [5, 6, 7]}

        def decode(self, ids: list[int], **_: Any) -> str:
            return shown[len(ids)]

    assert encode(Rewrites(), "abcd").spans == ((0, 2), (2, 3), (2, 4))


def test_padding_on_either_side_by_hand() -> None:
    right = pad_batch([[5, 6, 7], [8]])
    assert right["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert right["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert right["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
    left = pad_batch([[5, 6, 7], (8,)], side="left")
    assert left["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert left["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
    assert {tensor.dtype for tensor in (*left.values(), *right.values())} == {torch.int64}


def test_batches_of_nothing_and_of_empty_rows() -> None:
    assert pad_batch([])["input_ids"].shape == (0, 0)
    empty = pad_batch([[], [3]])
    assert empty["attention_mask"].tolist() == [[0], [1]]
    assert empty["position_ids"].tolist() == [[0], [0]]


def test_an_unknown_padding_side_is_refused() -> None:
    with pytest.raises(ValueError, match="'right' or 'left', not 'top'"):
        pad_batch([[1]], side="top")


def test_length_batches_put_like_lengths_together_within_the_bound():
    rows = [(1,) * n for n in (5, 1, 9, 2, 2, 30, 4)]
    found = length_batches(rows, 10)
    assert [[len(row) for row in batch] for batch in found] == [[1, 2, 2], [4, 5], [9], [30]]
    assert length_batches([], 10) == []


def test_a_processor_stands_for_its_tokenizer_and_nothing_else_does() -> None:
    tokenizer = tiny_tokenizer()
    assert text_tokenizer(tokenizer) is tokenizer
    processor = SimpleNamespace(tokenizer=tokenizer, image_processor=None)
    assert text_tokenizer(processor) is tokenizer
    for other in (None, "gpt2", SimpleNamespace(tokenizer=None)):
        with pytest.raises(BadConfig, match="is no tokenizer of transformers"):
            text_tokenizer(other)


TEMPLATE = "{% for turn in messages %}<s>{{ turn.role }}: {{ turn.content }}</s>{% endfor %}<s>assistant: "


def chat_tokenizer(kind: str) -> Any:
    tokenizer = copy.deepcopy(tiny_tokenizer(kind))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize("kind", ["byte_bpe", "bpe_bos"])
def test_a_fact_in_chat_is_a_users_turn_with_contexts_inside(kind: str) -> None:
    tokenizer, fact = chat_tokenizer(kind), EditRequest("{} is in the city of", "The Tower", " Rome", "Paris")
    asked = chat_request(tokenizer, fact)
    assert asked.text == "<s>user: The Tower is in the city of</s><s>assistant: " and asked.target == "Rome"
    bare, behind = (subject_row(tokenizer, prefix, asked) for prefix in ("", "I play. "))
    begun = encode(tokenizer, "<s>user: I play. The Tower").ids
    assert behind.ids == begun and behind.subject == len(begun) - 1
    assert bare.ids == encode(tokenizer, "<s>user: The Tower").ids
    # A prompt that only ends in "" and is no turn has contexts in front, as ever.
    plain = EditRequest("See {} in", "The Tower", "Rome", join="")
    assert subject_row(tokenizer, "I play. ", plain).ids == encode(tokenizer, "I play. See The Tower").ids


def test_what_cannot_be_asked_in_chat_is_told() -> None:
    with pytest.raises(BadConfig, match="no chat template"):
        chat_text(tiny_tokenizer(), "x")
    tokenizer = chat_tokenizer("byte_bpe")
    tokenizer.chat_template = "{{ messages[0].content | upper }}"
    with pytest.raises(BadConfig, match="does not show 'abc' once"):
        chat_text(tokenizer, "abc")


def test_an_answer_in_chat_ends_with_the_end_token() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    ids = encode(tokenizer, "I play").ids
    (plain,) = continue_rows(model, tokenizer, [ids], 8)
    model.generation_config.eos_token_id = plain[3]
    (stopped,) = continue_rows(model, tokenizer, [ids], 8, stop=True)
    assert stopped == plain[: plain.index(plain[3])]
    (whole,) = continue_rows(model, tokenizer, [ids], 8)
    assert len(whole) == 8 and plain[3] not in whole
