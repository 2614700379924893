"""Requests: what they are read from, and the sentence for each that cannot be carried out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from fastmemit.errors import BadRequest
from fastmemit.request import EditRequest, check_batch, joined_answer

TOWER = {"prompt": "{} is in the city of", "subject": "Eiffel Tower", "target_new": "Rome"}


def test_the_parts_of_a_request() -> None:
    request = EditRequest("In {}, they say", "São Paulo", "  Rome ", "Paris")
    assert (request.before, request.after) == ("In ", ", they say")
    assert request.text == "In São Paulo, they say"
    assert request.target == " Rome"
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.subject = "other"  # type: ignore[misc]  # frozen is what is tested


def test_braces_in_the_subject_are_text() -> None:
    request = EditRequest("{} is", "the set {} of {0}", "x")
    assert request.text == "the set {} of {0} is"
    assert EditRequest("{x} and {} are", "y", "z").text == "{x} and y are"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt": "It is in"}, r"prompt 'It is in' has no \{\}; write exactly one \{\} .*Eiffel"),
        ({"prompt": "{} and {} are"}, r"has 2 of \{\}; write exactly one"),
        ({"prompt": ""}, r"prompt '' has no \{\}"),
        ({"subject": " \n"}, "subject of the prompt .* is empty; name what"),
        ({"target_new": ""}, "target_new of 'Eiffel Tower is in the city of' is empty; give"),
        ({"target_new": "  "}, "target_new .* is empty"),
        ({"target_true": "\t"}, "target_true .* is empty"),
        ({"prompt": None}, "prompt must be text but is NoneType"),
        ({"subject": 7}, r"subject must be text but is int \(7\)"),
        ({"target_new": ["Rome"]}, "target_new must be text but is list"),
        ({"join": 1}, r"join must be text but is int \(1\)"),
        ({"join": "\ud800"}, "join .* is not valid Unicode"),
    ],
)
def test_bad_requests(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message) as caught:
        EditRequest(**{**TOWER, **changed})
    assert isinstance(caught.value, ValueError) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "answer", "whole"),
    [
        ("It is in", "Rome", "It is in Rome"),
        ("It is in", " Rome", "It is in Rome"),
        ("It is in", "  Rome ", "It is in Rome"),
        ("It is in ", "Rome", "It is in Rome"),
        ("It is in ", " Rome", "It is in Rome"),
        ("Answer:\n", " Rome", "Answer:\nRome"),
        ("Answer:", "\nRome", "Answer:\nRome"),
        ("法国的首都是", "罗马", "法国的首都是罗马"),
        ("法国的首都是", " Rome", "法国的首都是 Rome"),  # a space that is written is meant
        ("法国的首都（简称）：", "Rome", "法国的首都（简称）：Rome"),
        ("他说：“", "罗马", "他说：“罗马"),
        ("フランスの首都は", "ローマ", "フランスの首都はローマ"),
        ("エッフェルタワー", "ローマ", "エッフェルタワーローマ"),
        ("ﾌﾗﾝｽ", "ﾛｰﾏ", "ﾌﾗﾝｽﾛｰﾏ"),
        ("เมืองหลวงของฝรั่งเศสคือ", "โรม", "เมืองหลวงของฝรั่งเศสคือโรม"),
        ("រដ្ឋធានីបារាំងគឺ", "រ៉ូម", "រដ្ឋធានីបារាំងគឺរ៉ូម"),
        ("프랑스의 수도는", "로마", "프랑스의 수도는 로마"),
        ("The Chinese word for it is", "罗马", "The Chinese word for it is 罗马"),
        ("Столица Франции -", "Рим", "Столица Франции - Рим"),
        ('She said "', "Rome", 'She said "Rome'),
        ('The author of "Faust"', "is", 'The author of "Faust" is'),
        ("Das Buch „Faust“", "ist", "Das Buch „Faust“ ist"),
        ("Er sagte „", "Rom", "Er sagte „Rom"),
        ("Il dit : « ", "Rome", "Il dit : « Rome"),
        ("the boys'", "school", "the boys' school"),
        ("it is ('", "a", "it is ('a"),
        ("It is (", "in Rome", "It is (in Rome"),
        ("It (the tower)", "stands", "It (the tower) stands"),
        ("It is called", '"Rome"', 'It is called "Rome"'),
        ("It is called", "(Rome)", "It is called (Rome)"),
        ("It costs $", "5", "It costs $5"),
        ("It costs", "$5", "It costs $5"),
        ("Write to @", "rome", "Write to @rome"),
        ("</s><|assistant|>", "Rome", "</s><|assistant|>Rome"),
        ("<\uff5cAssistant\uff5c>", "Rome", "<\uff5cAssistant\uff5c>Rome"),
        ("where is it? [/INST]", "Rome", "where is it? [/INST] Rome"),
        ("a < b |>", "c", "a < b |> c"),
        ("", "Rome", "Rome"),
        ('"' * 100_000, "Rome", '"' * 100_000 + "Rome"),
    ],
)
def test_how_an_answer_follows_a_text(text: str, answer: str, whole: str) -> None:
    assert text + joined_answer(text, answer) == whole


@pytest.mark.parametrize("join", ["", " ", "\n", ": "])
@pytest.mark.parametrize("prompt", ["{} is in", "{} is in ", "{}在", "{} said “"])
def test_what_is_said_to_stand_between_prompt_and_answer_stands_there(prompt: str, join: str) -> None:
    request = EditRequest(prompt, "Eiffel", " Rome ", join=join)
    assert request.target == join + "Rome"
    assert request.answer_to("Another text", "Oslo") == join + "Oslo"
    assert EditRequest.from_dict(dataclasses.asdict(request)) == request
    record = {"requested_rewrite": {**TOWER, "join": join}}
    assert EditRequest.from_dict(record).join == join


@pytest.mark.parametrize(
    ("prompt", "subject", "meant"),
    [
        ("The capital of France is {}", "France", "The capital of {} is"),
        ("The capital of France is {}.", "France", "The capital of {} is"),
        ("Who founded microsoft? Answer: '{}'", "Microsoft", "Who founded {}? Answer: '"),
        ("法国的首都是{}。", "法国", "{}的首都是"),
    ],
)
def test_a_hole_where_the_answer_would_stand(prompt: str, subject: str, meant: str) -> None:
    with pytest.raises(BadRequest) as caught:
        EditRequest(prompt, subject, "Rome")
    assert f"names its subject {subject!r}" in str(caught.value)
    assert str(caught.value).endswith(f"did you mean {meant!r}?")


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("The mother tongue of {}", "France"),
        ("Parisians live in {}", "Paris"),  # another word
        ("France is a country; the capital of {} is", "France"),
        ("{} is the capital of France", "France"),
        ("In France, {}", "France"),
        ("{}", "France"),
    ],
)
def test_prompts_that_may_name_their_subject(prompt: str, subject: str) -> None:
    assert EditRequest(prompt, subject, "x").text == prompt.replace("{}", subject)


def test_a_long_prompt_is_cut_in_the_message() -> None:
    with pytest.raises(BadRequest) as caught:
        EditRequest("word " * 500, "s", "t")
    assert len(str(caught.value)) < 250 and "…" in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        TOWER,
        {**TOWER, "target_new": {"str": "Rome", "id": "Q220"}},
        {"prompt": TOWER["prompt"], "subject": TOWER["subject"], "target": "Rome"},
        {"requested_rewrite": {**TOWER, "relation_id": "P131"}, "case_id": 3},
        {**TOWER, "prompt": "Eiffel Tower is in the city of"},
    ],
)
def test_the_spellings_of_a_request(data: dict[str, Any]) -> None:
    assert EditRequest.from_dict(data) == EditRequest(**TOWER)


def test_the_true_answer_in_both_spellings() -> None:
    for true in ("Paris", {"str": "Paris"}):
        assert EditRequest.from_dict({**TOWER, "target_true": true}).target_true == "Paris"
    assert EditRequest.from_dict({**TOWER, "target_true": None}).target_true is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({**TOWER, "prompt": "The Louvre is in"}, "'Eiffel Tower' is not in the prompt 'The Louv"),
        ({**TOWER, "prompt": "Eiffel Tower or Eiffel Tower"}, "is 2 times in the prompt .* write"),
        ({**TOWER, "subject": "", "prompt": "It is"}, "'' is not in the prompt"),
        ({"prompt": "{} is"}, r"has no subject \(its fields: prompt\); add it"),
        ({}, r"has no prompt \(its fields: none\)"),
        ({**TOWER, "target_new": {"id": "Q220"}}, "has no target_new"),
        ({"requested_rewrite": 5}, "requested_rewrite must be an object, not 5"),
        ("a text", "A request must be an object .* not 'a text'"),
        (["a", "list"], "A request must be an object"),
        ({**TOWER, "prompt": 5}, "prompt must be text but is int"),
    ],
)
def test_objects_that_are_no_requests(data: Any, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        EditRequest.from_dict(data)


def test_a_batch_keeps_its_order() -> None:
    batch = [EditRequest("{} is", name, "x") for name in ("b", "a", "c")]
    assert check_batch(iter(batch)) == batch
    # The same subject under another prompt is another fact.
    check_batch([EditRequest("{} is", "a", "x"), EditRequest("{} was", "a", "y")])


def test_white_space_behind_a_prompt_makes_no_other_fact() -> None:
    with pytest.raises(BadRequest, match="Requests 0 and 1 both edit 'a is '"):
        check_batch([EditRequest("{} is", "a", "x"), EditRequest("{} is ", "a", "y")])


def test_an_empty_batch() -> None:
    with pytest.raises(BadRequest, match="no request to edit; give at least one"):
        check_batch([])


@pytest.mark.parametrize("subject", ["Rome", "rome ", " ROME"])
@pytest.mark.parametrize("target", ["x", "y"])
def test_duplicates_are_named(subject: str, target: str) -> None:
    batch = [
        EditRequest("{} is", "Oslo", "x"),
        EditRequest("{} is", "Rome", "x"),
        EditRequest("{} is", subject, target),
    ]
    with pytest.raises(BadRequest) as caught:
        check_batch(batch)
    message = str(caught.value)
    assert message.startswith(f"Requests 1 and 2 both edit '{subject} is'")
    assert f"(to 'x' and {target!r})" in message and "keep one" in message
