"""JSON from files of strangers: one meaning, finite numbers, and no deeper than anything here."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

#: Lists and objects inside one another at most. Python's own limit is met in different places by
#: what reads a value, shows it and compares it; this one is met first, and where it is read.
MAX_DEPTH = 100


def parse_json(text: str | bytes) -> Any:
    """The value in a JSON text.

    Args:
        text: The text, or its bytes in UTF-8.

    Raises:
        ValueError: It is not UTF-8 or not JSON (`json.JSONDecodeError` says where), has NaN or an infinity (which are
            no JSON) or a number beyond float64, an object has a key twice (of which readers take the first or the
            last), a whole number has thousands of digits, or lists and objects are more than `MAX_DEPTH` deep.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_float=_number, parse_constant=_no_number)
    except RecursionError:
        raise _too_deep() from None
    # What has few brackets is not deep, and most texts have few.
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r:.80} is there twice in one object")
            seen.add(key)
    return found


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text:.40} is too large")
    return value


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inner.extend(x for x in one.values() if isinstance(x, (dict, list)))
            elif isinstance(one, list):
                inner.extend(x for x in one if isinstance(x, (dict, list)))
        if not inner:
            return
        level = inner
    raise _too_deep()


def _too_deep() -> ValueError:
    return ValueError(f"lists and objects are more than {MAX_DEPTH} deep")
