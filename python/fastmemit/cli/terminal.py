"""What the command line writes: tables, and text that commands no terminal in whatever encoding it has."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from fastmemit.experiments.intervals import Estimate

#: S beside what it is made of, and beside what a broken model cannot have.
SCORES = ("es", "ps", "ns", "s", "ea", "pa", "na")
MEANING = """\
ES, PS, NS: the wanted answer is more probable than one other, at the fact's own prompt, in other
words, and for its neighbours. S: their harmonic mean; a coin has 50. EA, PA, NA: the wanted
answer is what the model says. In percent; in brackets the 95 % interval over records, that of
"change" paired."""

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
            from fastcov.files import printable

            rest = printable(rest, lines=True)
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        with self._read():
            self._stream.write(head + rest.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with self._read():
            self._stream.flush()

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    @contextmanager
    def _read(self) -> Iterator[None]:
        """Where who reads has gone, as ``| head -1`` does, the verb finishes its work and the rest is not said."""
        try:
            yield
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def printable_output() -> Callable[[], None]:
    """Make all that goes to stdout and stderr printable: print, logs, warnings. Returns what takes it back."""
    outputs = sys.stdout, sys.stderr
    sys.stdout = cast(TextIO, _Printable(sys.stdout or _nowhere(), bars=False))
    sys.stderr = cast(TextIO, _Printable(sys.stderr or _nowhere(), bars=True))

    def back() -> None:
        sys.stdout, sys.stderr = outputs

    return back


def _nowhere() -> TextIO:
    """In place of an output that was closed when the process began; the next file opened would take its number."""
    return open(os.devnull, "w", encoding="utf-8")


def show_traceback(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """An excepthook that writes in one go, so that no part of a message is taken for a bar's."""
    sys.stderr.write("".join(traceback.format_exception(kind, error, trace)))


def show_table(rows: Sequence[Sequence[str]], *, right: bool = True) -> None:
    """Print a table, ruled where stdout is a terminal.

    The heads come first; a row begins with its label and may end early. The other cells are set to the right, or left.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from fastcov.files import printable

    ruled = sys.stdout.isatty()
    table = Table(box=box.SIMPLE_HEAD if ruled else None, padding=(0, 1) if ruled else (0, 2, 0, 0))
    for index in range(max(map(len, rows))):
        table.add_column(justify="right" if right and index else "left")
    for index, head in enumerate(rows[0]):
        table.columns[index].header = Text(printable(head))
    for row in rows[1:]:
        table.add_row(*(Text(printable(cell)) for cell in row))
    # Without colours nothing that rich writes commands the terminal, and so all of it may pass `_Printable`.
    console = Console(file=sys.stdout, color_system=None, width=None if ruled else 10_000)
    with console.capture() as said:
        console.print(table)
    print("\n".join(line.rstrip() for line in said.get().splitlines()))


def show_scores(rows: Mapping[str, Mapping[str, Any]], names: Sequence[str] = SCORES) -> None:
    """A table with a line for each row and the scores that are named; a dash where a score does not exist."""
    heads = ["", *map(_title, names)]
    show_table([heads, *([label, *(_number(found.get(name)) for name in names)] for label, found in rows.items())])


def show_changes(columns: Mapping[str, Mapping[str, Estimate | float | None]]) -> None:
    """A table with a line for each score of the first column, its interval in brackets where it has one.

    The columns, one for each time and one for the change, are title -> score -> value.
    """
    names = next(iter(columns.values()))
    rows = [[_title(name), *(_cell(values.get(name), title) for title, values in columns.items())] for name in names]
    show_table([["", *columns], *rows], right=False)


def _cell(found: Estimate | float | None, title: str) -> str:
    sign = "+" if title == "change" else ""
    if found is None or isinstance(found, (int, float)):
        return f"{_number(found, sign):>7}"
    # One decimal is too coarse for a narrow interval, such as that of an entropy in bits.
    digits = 1 if found.high - found.low >= 0.5 or found.high == found.low else 2
    low, high = (f"{round(end, digits) + 0.0:.{digits}f}" for end in (found.low, found.high))
    return f"{_number(found.value, sign):>7} [{low}, {high}]"


def _number(value: float | None, sign: str = "") -> str:
    if value is None:
        return "-"
    return f"{round(value, 2) + 0.0:{sign}.2f}" if abs(value) < 1e5 else f"{value:{sign}.3g}"


def _title(name: str) -> str:
    return name.upper() if len(name) <= 2 else name


def byte_size(number: float) -> str:
    """A number of bytes as a person reads it."""
    for unit in ("kB", "MB", "GB"):
        number /= 1000
        if number < 1000:
            return f"{number:.2f} {unit}"
    return f"{number / 1000:.2f} TB"
