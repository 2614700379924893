"""Requests: what they are read from, and the sentence for each that cannot be carried out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from fastmemit.errors import BadRequest, DuplicateRequest
from fastmemit.request import EditRequest, check_batch

TOWER = {"prompt": "{} is in the city of", "subject": "Eiffel Tower", "target_new": "Rome"}


def test_the_parts_of_a_request() -> None:
    request = EditRequest("In {}, they say", "São Paulo", "  Rome ", "Paris")
    assert (request.before, request.after) == ("In ", ", they say")
    assert request.text == "In São Paulo, they say"
    assert request.target == " Rome"
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.subject = "other"  # type: ignore[misc]


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
    ],
)
def test_bad_requests(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message) as caught:
        EditRequest(**{**TOWER, **changed})
    assert isinstance(caught.value, ValueError) and "\n" not in str(caught.value)


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
    with pytest.raises(DuplicateRequest) as caught:
        check_batch(batch)
    message = str(caught.value)
    assert message.startswith(f"Requests 1 and 2 both edit '{subject} is'")
    assert f"(to 'x' and {target!r})" in message and "keep one" in message
