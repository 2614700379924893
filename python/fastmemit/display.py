"""What people see: bars on terminals and in notebooks, lines in logs, tables and data frames of results."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from tqdm import tqdm

from fastcov.files import printable

#: Seconds between two lines about progress where nothing can be drawn over.
EVERY = 30.0


class Bar:
    """A bar to count on: called with how many were done since the last call."""

    def __init__(self, shape: tqdm) -> None:
        self._shape = shape

    def __call__(self, done: int) -> None:
        """Move on."""
        self._shape.update(done)

    def note(self, text: str) -> None:
        """Show some words behind the numbers, from the next time the bar is drawn."""
        self._shape.set_postfix_str(text, refresh=False)


_drawn: list[str] = []  # the bars that are drawn now


class _Lines(Bar):
    """The same where stderr is a file or a pipe: now and then one line of how far all open bars are."""

    _open: ClassVar[list[_Lines]] = []  # the outermost first
    _next: ClassVar[float] = 0.0  # when the next line is due

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done, self._note = what, total, 0, ""
        self._begun = time.monotonic()
        if _Lines._next < self._begun:  # nothing was said for long because nothing ran
            _Lines._next = self._begun + EVERY

    def __call__(self, done: int) -> None:
        self._done += done
        now = time.monotonic()
        if now >= _Lines._next:
            _Lines._next = now + EVERY
            print("; ".join(each._said(now) for each in _Lines._open), file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        self._note = f" ({text})"

    def _said(self, now: float) -> str:
        said = f"{self._what}{self._note}: {self._done:,} of {self._total:,}"
        if not 0 < self._done < self._total:
            return said
        left = (now - self._begun) / self._done * (self._total - self._done)
        return f"{said} ({self._done / self._total:.0%}), about {duration(left)} left"


@contextmanager
def bar(what: str, total: int, shown: bool) -> Iterator[Bar]:
    """A progress bar to count on, on a terminal or in a notebook; elsewhere a line on stderr every `EVERY` seconds."""
    kernel = _in_notebook()
    if shown and not kernel and not (sys.stderr is not None and sys.stderr.isatty()):
        lines = _Lines(what, total)
        _Lines._open.append(lines)
        try:
            yield lines
        finally:
            _Lines._open.remove(lines)
        return
    drawn = _widget() if kernel and shown else tqdm
    # Bars of text below one another need a cursor that moves up, which not every notebook has.
    hidden = not shown or (kernel and drawn is tqdm and bool(_drawn))
    with drawn(total=total, desc=what, leave=False, dynamic_ncols=True, disable=hidden) as shape:
        _drawn.extend([what] * (not hidden))
        try:
            yield Bar(shape)
        finally:
            if not hidden:
                _drawn.remove(what)


def _in_notebook() -> bool:
    """Whether this runs in a kernel of Jupyter, whose stderr is no terminal and can be drawn over."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in shell.config


def _widget() -> Any:
    """Tqdm's bar for notebooks; its bar of text where ipywidgets is not installed."""
    # Not tqdm.auto, which decides the same with a warning that tells people to install something.
    from tqdm import notebook

    return tqdm if notebook.IProgress is None else notebook.tqdm


def duration(seconds: float) -> str:
    """Some time as a person says it: ``35 s``, ``4 min``, ``1 h 20 min``, ``3.5 days``."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes / 60 / 24:.1f} days"


class Described:
    """Shown by a line, and in a notebook by that line and a table."""

    def describe(self) -> str:
        """One line for people."""
        raise NotImplementedError

    def rows(self) -> Iterable[Mapping[str, Any]]:
        """The lines of its table, column -> value; none has no table."""
        return ()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {printable(self.describe())}>"

    def _repr_html_(self) -> str:
        rows = list(self.rows())
        line = f"<p><b>{type(self).__name__}</b>: {_escaped(self.describe())}</p>"
        return line + (html_table(rows) if rows else "")


class Rows(list[Any]):
    """A list of results with a line for each in a notebook, and as a data frame; `columns` makes a line of one."""

    def __init__(self, rows: Iterable[Any], columns: Callable[[Any], Mapping[str, Any]]) -> None:
        super().__init__(rows)
        self._columns = columns

    def to_pandas(self) -> Any:
        """A pandas data frame with a row for each."""
        return data_frame(map(self._columns, self))

    def __repr__(self) -> str:
        names = ", ".join(self._columns(self[0])) if self else "nothing"
        return f"<{len(self)} rows of {names}; to_pandas() has them as a data frame>"

    def _repr_html_(self) -> str:
        return html_table(map(self._columns, self))


def data_frame(rows: Iterable[Mapping[str, Any]]) -> Any:
    """Rows as a pandas data frame."""
    import pandas  # not at the top: it takes longer to load than all else here

    return pandas.DataFrame(list(rows))


def html_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as a table of HTML, all text in it escaped; the first row has the columns."""
    lines = list(rows)
    heads = "".join(f"<th>{_escaped(name)}</th>" for name in (lines[0] if lines else ()))
    cells = ["".join(f"<td>{_escaped(value)}</td>" for value in row.values()) for row in lines]
    body = "".join(f"<tr>{line}</tr>" for line in cells)
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


def _escaped(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return html.escape(printable(str(value)))
