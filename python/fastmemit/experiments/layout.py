"""A table apart from its notation, and the notations: Markdown, LaTeX; HTML is in the template."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

#: A table of more columns does not fit the width of a page.
_NARROW = 9


class Column(NamedTuple):
    """The head of a column.

    Attributes:
        name: What stands directly above the values.
        over: What stands above that, over all neighbours that share it ("ES" over full and fast).
        text: Whether the column holds words, which are set to the left; numbers are to the right.
    """

    name: str
    over: str = ""
    text: bool = False

    @property
    def flat(self) -> str:
        """Both heads in one."""
        return f"{self.over} {self.name}".strip()


@dataclass(frozen=True)
class Table:
    """A table with values that are already text.

    Attributes:
        name: Of lower-case letters, digits and hyphens, unique in a report.
        title: The caption.
        columns: Their heads. The first column names the row.
        rows: As many values a row as columns; a value that does not exist is "-".
        note: A sentence under the table.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    @property
    def spans(self) -> list[tuple[str, int]]:
        """The upper heads and how many columns each covers; empty where there are none."""
        found = [(over, len(list(part))) for over, part in groupby(c.over for c in self.columns)]
        return found if any(over for over, _ in found) else []


def method_title(method: str) -> str:
    """A method's name as it is written in titles."""
    return "AlphaEdit" if method == "alphaedit" else method.upper()


def slug(text: str) -> str:
    """`text` as a name for files and anchors: ``MEMIT, ridge=0.1`` becomes ``memit-ridge-0.1``."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "unnamed"


def unique(names: Iterable[str]) -> list[str]:
    """`names` with a number behind each that was there before."""
    taken: set[str] = set()
    found = []
    for name in names:
        candidate, number = name, 1
        while candidate in taken:
            number += 1
            candidate = f"{name}-{number}"
        taken.add(candidate)
        found.append(candidate)
    return found


def markdown(tables: Sequence[Table]) -> str:
    """The tables, each under a heading of its own."""
    return "\n".join(_markdown(table) for table in tables)


def latex(tables: Sequence[Table]) -> str:
    r"""The tables as floats that need ``booktabs``, and ``graphicx`` where they are wide."""
    needed = r"% Needs \usepackage{booktabs}"
    if any(len(table.columns) > _NARROW for table in tables):
        needed += r" and \usepackage{graphicx}"
    return f"{needed}.\n\n" + "\n".join(_latex(table) for table in tables)


def _markdown(table: Table) -> str:
    lines = [f"## {markdown_text(table.title)}", ""]
    lines.append(_markdown_row([column.flat for column in table.columns]))
    lines.append("| " + " | ".join("---" if c.text else "---:" for c in table.columns) + " |")
    lines += [_markdown_row(row) for row in table.rows]
    lines += ["", markdown_text(table.note), ""] if table.note else [""]
    return "\n".join(lines)


def _markdown_row(values: Iterable[str]) -> str:
    return "| " + " | ".join(markdown_text(value) for value in values) + " |"


def markdown_text(text: str) -> str:
    """Text for a heading, a cell or a paragraph: it stays text, on one line."""
    # What would end a cell, begin a tag or a link, or set text in another way. The underscores of
    # names are left: inside a word Markdown takes them as they are. So are brackets that no link
    # follows.
    return re.sub(r"([\\|<>*`]|(?<=\])\()", r"\\\1", " ".join(text.split()))


def _latex(table: Table) -> str:
    heads = " & ".join(_latex_text(column.name) for column in table.columns)
    upper = []
    if table.spans:
        parts, rules, at = [], [], 1
        for over, width in table.spans:
            if over:
                parts.append(rf"\multicolumn{{{width}}}{{c}}{{{_latex_text(over)}}}")
                rules.append(rf"\cmidrule(lr){{{at}-{at + width - 1}}}")
            else:
                parts += [""] * width
            at += width
        upper = [" & ".join(parts) + r" \\", "".join(rules)]
    body = [" & ".join(_latex_text(value) for value in row) + r" \\" for row in table.rows]
    note = [rf"\par\smallskip {{\footnotesize {_latex_text(table.note)}}}"] if table.note else []
    # A table that is wider than a page is made as narrow as the text.
    shrunk = (r"\resizebox{\textwidth}{!}{%", "}") if len(table.columns) > _NARROW else None
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_latex_text(table.title)}}}",
            rf"\label{{tab:{table.name}}}",
            *([shrunk[0]] if shrunk else []),
            rf"\begin{{tabular}}{{{''.join('l' if c.text else 'r' for c in table.columns)}}}",
            r"\toprule",
            *upper,
            heads + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}" + (shrunk[1] if shrunk else ""),
            *note,
            r"\end{table}",
            "",
        ]
    )


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    # A line that begins with a bracket would be read as an option of the \\ before it.
    "[": "{[}",
    "]": "{]}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def _latex_text(text: str) -> str:
    if text == "-":
        return "--"
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))
