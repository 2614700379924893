"""Text from anywhere inside Markdown, as text: nothing in it becomes a table, a link or HTML."""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

_LONGEST = 200
# Characters that Markdown, or a renderer's extension of it, gives a meaning; an entity has none.
_ACTIVE = re.compile(r"[\\`*_\[\]|~$:@!^=+]|(?<=www)\.|^[-#]", re.IGNORECASE)
_UNSEEN = ("Cc", "Cs", "Co", "Cn")
# Marks that turn the direction of everything after them.
_TURNS = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def plain(text: object, longest: int = _LONGEST) -> str:
    """Text for one line or one table cell.

    White space becomes single spaces, other control characters and marks of direction go, what has a meaning in
    Markdown or HTML becomes an entity, and what is longer than `longest` is cut.
    """
    words = " ".join(str(text).split())
    kept = "".join(c for c in words if c not in _TURNS and unicodedata.category(c) not in _UNSEEN)
    if len(kept) > longest:
        kept = kept[: longest - 1] + "…"
    # Ampersand first, so that an entity in the text stays what it was written as.
    escaped = html.escape(kept, quote=False)
    return re.sub(_ACTIVE, lambda match: f"&#{ord(match[0])};", escaped)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; every cell is escaped."""
    lines = ["| " + " | ".join(map(plain, head)) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(map(plain, row)) + " |" for row in rows]
    return "\n".join(lines)


def yaml_header(fields: Mapping[str, str | Sequence[str] | None]) -> str:
    """The header of a card; a string of JSON is one of YAML, too."""
    lines = ["---"]
    for name, value in fields.items():
        if isinstance(value, str):
            lines.append(f"{name}: {json.dumps(value)}")
        elif value:
            lines += [f"{name}:", *(f"  - {json.dumps(item)}" for item in value)]
    return "\n".join([*lines, "---"])
