"""What the command line writes: it commands no terminal, and its encoding always does."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable
from typing import Any, TextIO, cast

# What a progress bar writes in one go to move the cursor: to the start of its line, or up.
_BAR = re.compile(r"\r|(?:\n|\x1b\[A)+\Z")


class _Printable:
    """A stream that spells out control characters, and what its encoding has no character for.

    Bars of tqdm may move the cursor where `bars` is set: a write that begins with a carriage return, or is nothing but
    moves upwards, keeps those.
    """

    def __init__(self, stream: TextIO, *, bars: bool) -> None:
        self._stream = stream
        self._bars = bars

    def write(self, text: str) -> int:
        moves = _BAR.match(text) if self._bars else None
        head = moves[0] if moves else ""
        rest = text[len(head) :]
        # --help and most lines have nothing but line ends, and do not wait for torch to be loaded.
        if not rest.replace("\n", "").isprintable():
            from fastcov.printable import printable

            rest = printable(rest, lines=True)
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(head + rest.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def printable_output() -> Callable[[], None]:
    """From here on all that goes to stdout and stderr is printable: print, logs, warnings.

    Returns:
        What takes it back.
    """
    outputs = sys.stdout, sys.stderr
    sys.stdout = cast(TextIO, _Printable(sys.stdout, bars=False))
    sys.stderr = cast(TextIO, _Printable(sys.stderr, bars=True))

    def back() -> None:
        sys.stdout, sys.stderr = outputs

    return back


def show_traceback(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """An excepthook that writes in one go, so that no part of a message is taken for a bar's."""
    sys.stderr.write("".join(traceback.format_exception(kind, error, trace)))
