"""What mkdocs does not do by itself: links into the repository, and the verbs of the command line."""

from __future__ import annotations

import re
from typing import Any

# A page may lead to a file of the repository that is not one of the site: [text](../../benchmarks/x.json).
_OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+((?:benchmarks|examples|python|fastcov|tests|csrc)[^)]*)\)")
_VERBS = "<!-- verbs -->"


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Name files outside docs/ instead of linking to them, and put every verb's --help where a page asks for it."""
    markdown = _OUTSIDE.sub(r"\1 (`\2`)", markdown)
    return markdown.replace(_VERBS, _verbs()) if _VERBS in markdown else markdown


def _verbs() -> str:
    """Each verb's --help, as it is at this moment."""
    import os

    os.environ["COLUMNS"] = "84"  # argparse wraps two before; what a page shows without scrolling
    from fastmemit.cli import parser

    top, found = parser(), []
    for name, verb in _parsers(top):
        found.append(f"## {name}\n\n```text\n{verb.format_help().rstrip()}\n```\n")
    return "\n".join(found)


def _parsers(parser: Any, name: str = "fastmemit") -> list[tuple[str, Any]]:
    """A parser and those below it, by what is typed."""
    subparsers = [action.choices for action in parser._actions if hasattr(action, "_name_parser_map")]
    below = [
        each for choices in subparsers for word, one in choices.items() for each in _parsers(one, f"{name} {word}")
    ]
    return below or [(name, parser)]
