from __future__ import annotations

import pickle
import unicodedata

import pytest

from fastcov import StoreDamaged, StoreMismatch
from fastcov.files import printable, printable_logger
from fastmemit.errors import BadData


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;title\x07\x1b[2J", r"\x1b]0;title\x07\x1b[2J"),
        ("a\rb\x00\x7f\x9b31m\x85", r"a\x0db\x00\x7f\x9b31m\x85"),
        ("one\ntwo\tthree", r"one\x0atwo\x09three"),
        ("safe\u202egnp.exe\u2066\u200f\u061c", r"safe\u202egnp.exe\u2066\u200f\u061c"),
        ("line\u2028paragraph\u2029", r"line\u2028paragraph\u2029"),
        ("half \ud800 of a pair", r"half \ud800 of a pair"),
        ("Caf\u00e9 \u65e5\u672c \U0001f469\u200d\U0001f52c \u05d0\u05d1 \u00a0\u3000\\x1b",
         "Caf\u00e9 \u65e5\u672c \U0001f469\u200d\U0001f52c \u05d0\u05d1 \u00a0\u3000\\x1b"),
        ("", ""),
    ],
)  # fmt: skip
def test_controls_are_spelled_out_and_nothing_else(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(shown) == shown


def test_of_all_of_unicode_no_control_is_left() -> None:
    every = "".join(map(chr, range(0x110000)))
    left = printable(every)
    left.encode("utf-8")
    assert not [c for c in left if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")]
    bidi = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    assert not [c for c in left if unicodedata.bidirectional(c) in bidi]
    kept = printable(every, lines=True)
    assert [c for c in kept if unicodedata.category(c) == "Cc"] == ["\t", "\n"]


def test_lines_of_ours_stay_lines() -> None:
    assert printable("a\n\tb\r\n", lines=True) == "a\n\tb\\x0d\n"


@pytest.mark.parametrize("kind", [StoreDamaged, BadData, StoreMismatch])
def test_a_message_that_quotes_a_file_is_printable_and_pickles(kind: type[Exception]) -> None:
    error = kind("The file a\x1b[2J\nb is damaged.")
    assert str(error) == r"The file a\x1b[2J\x0ab is damaged."
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(kind()) == ""


def test_records_of_a_log_are_printable_for_every_handler(caplog) -> None:
    log = printable_logger("fastcov.test_printable")
    assert printable_logger("fastcov.test_printable") is log and len(log.filters) == 1
    log.warning("%s is %s of %%", "a\x1b[0m", "\u202eb")
    assert caplog.messages == [r"a\x1b[0m is \u202eb of %"]
