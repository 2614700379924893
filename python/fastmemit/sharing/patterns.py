r"""Patterns of an adapter's configuration, matched without backtracking.

PEFT takes a key of ``alpha_pattern`` for a module where ``(.*\.)?(KEY)$`` fits its name.  A
stranger's regular expression may be searched for ever, so those read here are few: text, ``.``, ``\d``, ``\w``, ``\.``
and its like, sets such as ``[0-9]``, each with ``*``, ``+`` or ``?``; groups
of alternatives, which may be missing (``?``) but not repeated; ``^`` and ``$``.  All places of a
name that can be reached are followed at once, as the bits of a number, so the time is that of the pattern's length
times the name's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

_MAX_TEXT = 100_000  # characters of all patterns of an adapter together
_MAX_DEPTH = 20
_SET = re.compile(r"\[\^?\]?(?:[^\]\[\\]|\\.)*\]")
_Test = Callable[[str], bool]


class BadPattern(ValueError):
    """A pattern that is no expression, or more than is matched here."""


class _Char(NamedTuple):
    """One character that passes a test, perhaps several times or not at all."""

    test: _Test
    many: bool
    absent: bool


class _Group(NamedTuple):
    """Alternatives of which one follows, or none."""

    alternatives: list[list[_Item]]
    absent: bool


_Item = _Char | _Group | str  # the text is "^" or "$"


class Patterns:
    """Patterns in the order in which PEFT tries them.

    Args:
        patterns: As they stand in the configuration.

    Raises:
        BadPattern: One is more than is matched here, and is in the message; or all are too long.
    """

    def __init__(self, patterns: list[str]) -> None:
        if sum(map(len, patterns)) > _MAX_TEXT:
            raise BadPattern(f"patterns of more than {_MAX_TEXT} characters")
        self._read = [_Reader(pattern).whole() for pattern in patterns]

    def first(self, name: str) -> int | None:
        """The number of the first pattern that fits a module's name, None where none does."""
        places: dict[str, int] = {}
        for index, character in enumerate(name):
            places[character] = places.get(character, 0) | 1 << index
        starts = 1 | places.get(".", 0) << 1
        last = 1 << len(name)
        for number, alternatives in enumerate(self._read):
            if _either(alternatives, starts, places, last) & last:
                return number
        return None


def _either(alternatives: list[list[_Item]], at: int, places: dict[str, int], last: int) -> int:
    """The places that are reached from those in `at`; bit i stands before character i."""
    ends = 0
    for sequence in alternatives:
        reached = at
        for item in sequence:
            if not reached:
                break
            reached = _after(item, reached, places, last)
        ends |= reached
    return ends


def _after(item: _Item, at: int, places: dict[str, int], last: int) -> int:
    if isinstance(item, str):
        return at & (1 if item == "^" else last)
    if isinstance(item, _Group):
        ends = _either(item.alternatives, at, places, last)
        return ends | at if item.absent else ends
    fitting = 0
    for character, where in places.items():
        if item.test(character):
            fitting |= where
    ends = (at & fitting) << 1
    new = ends
    while item.many and new:
        new = (new & fitting) << 1 & ~ends
        ends |= new
    return ends | at if item.absent else ends


class _Reader:
    def __init__(self, pattern: str) -> None:
        self._text = pattern
        self._at = 0
        self._depth = 0

    def whole(self) -> list[list[_Item]]:
        found = self._alternatives()
        if self._at < len(self._text):
            raise self._bad()
        return found

    def _alternatives(self) -> list[list[_Item]]:
        found = [self._sequence()]
        while self._take("|"):
            found.append(self._sequence())
        return found

    def _sequence(self) -> list[_Item]:
        items = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            items.append(self._item())
        return items

    def _item(self) -> _Item:
        character = self._text[self._at]
        if character in "^$":
            self._at += 1
            return character
        if character == "(":
            return self._group()
        test = self._test(character)
        absent, many = self._take("?"), False
        if not absent:
            absent = many = self._take("*")
            many = many or self._take("+")
        if absent or many:
            self._take("?")  # a lazy one fits the same names
        if self._text[self._at : self._at + 1] in ("*", "+", "?", "{"):
            raise self._bad()
        return _Char(test, many, absent)

    def _group(self) -> _Group:
        self._at += 1
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise self._bad()
        if self._take("?") and not self._take(":"):
            raise self._bad()
        found = self._alternatives()
        if not self._take(")"):
            raise self._bad()
        self._depth -= 1
        absent = self._take("?")
        if self._text[self._at : self._at + 1] in ("*", "+", "?", "{"):
            raise self._bad()
        return _Group(found, absent)

    def _test(self, character: str) -> _Test:
        self._at += 1
        if character == ".":
            return lambda c: c != "\n"
        if character == "\\":
            escaped = self._text[self._at : self._at + 1]
            self._at += 1
            if escaped == "d":
                return str.isdecimal
            if escaped == "w":
                return lambda c: c.isalnum() or c == "_"
            if not escaped or escaped.isalnum():
                raise self._bad()
            return escaped.__eq__
        if character == "[":
            found = _SET.match(self._text, self._at - 1)
            try:
                one = re.compile(found[0] if found else "[")  # of one character: searched at once
            except re.error:
                raise self._bad() from None
            self._at = found.end() if found else self._at
            return lambda c: one.fullmatch(c) is not None
        if character in "*+?{})":
            raise self._bad()
        return character.__eq__

    def _take(self, character: str) -> bool:
        taken = self._text.startswith(character, self._at)
        self._at += taken
        return taken

    def _bad(self) -> BadPattern:
        return BadPattern(f"the pattern {self._text!r:.60}")
