from __future__ import annotations

import json

import pytest

from fastcov.files import parse_json


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("NaN", "NaN is no number"),
        ('{"a": [1, Infinity]}', "Infinity is no number"),
        ("[-Infinity]", "-Infinity is no number"),
        ("[1e999]", "1e999 is too large"),
        ("[-1.5e400]", "-1.5e400 is too large"),
        ('{"a": 1, "a": 1}', "'a' is there twice"),
        ('[{"x": {"b": 1, "c": 2, "\\u0062": 3}}]', "'b' is there twice"),
    ],
)
def test_what_has_no_one_meaning_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=r"twice|number") as found:
        parse_json(text)
    assert said in str(found.value)
    assert not isinstance(found.value, json.JSONDecodeError)
    with pytest.raises(ValueError, match=r"twice|number"):
        parse_json(text.encode())


def test_what_is_json_is_read() -> None:
    text = '{"a": {"a": 1e308, "b": -0.0}, "b": [{"a": 1}, {"a": 2}], "c": "NaN", "d": 1e-400}'
    found = parse_json(text)
    assert found == {"a": {"a": 1e308, "b": 0}, "b": [{"a": 1}, {"a": 2}], "c": "NaN", "d": 0.0}
    assert str(found["a"]["b"]) == "-0.0"
