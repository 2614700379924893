"""Bars count on a terminal, carry a note, and are silent elsewhere."""

from __future__ import annotations

import io

import pytest
from tqdm.auto import tqdm

from fastmemit import files
from fastmemit.files import bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("shown", "terminal"), [(True, True), (True, False), (False, True)])
def test_a_note_is_drawn_behind_the_numbers_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, shown: bool, terminal: bool
) -> None:
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(files, "tqdm", lambda **settings: tqdm(file=stream, mininterval=0, **settings))
    with bar("keys", 10, shown) as advance:
        advance.note("12 tokens/s")
        advance(4)
    drawn = stream.getvalue()
    if shown and terminal:
        assert "keys" in drawn and "4/10" in drawn and "12 tokens/s" in drawn
    else:
        assert drawn == ""
