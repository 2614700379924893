"""Whatever a text holds, it is text in the card: read by a real Markdown parser."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml

from fastmemit.delta import Delta
from fastmemit.sharing.hub import edit_card, plain, table

NASTY = [
    "a | b",
    "a \\| b",
    "two\nlines\r\nand\ttab",
    "<script>alert(1)</script>",
    "<!-- gone -->",
    "[a](https://evil.example) ![i](x)",
    "https://evil.example www.evil.example me@evil.example",
    "`code` ``` *bold* __bold__ ~~gone~~ $x^2$ ==mark==",
    "&amp; &#124; &lt;b&gt;",
    "# heading",
    "| --- | --- |",
    "ends with \\",
    "日本 🙂 naïve Łódź",
]


def tokens(text: str) -> list[Any]:
    markdown_it = pytest.importorskip("markdown_it")
    return list(markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text))


@pytest.mark.parametrize("text", NASTY)
def test_a_cell_says_what_was_given_and_nothing_else(text: str) -> None:
    parsed = tokens(table(("what", "value"), [(text, "x"), ("y", text)]))
    kinds = [t.type for t in parsed]
    assert kinds.count("tr_open") == 3 and kinds.count("td_open") == 4
    assert {"html_block", "fence", "heading_open"}.isdisjoint(kinds)
    cells = [t for t in parsed if t.type == "inline"]
    for cell in cells:
        assert {child.type for child in cell.children} <= {"text", "text_special"}
    shown = "".join(child.content for child in cells[2].children)
    assert shown == " ".join(text.split())


def test_marks_of_direction_and_control_characters_go_and_joiners_stay() -> None:
    assert plain("a\u202eb\u2066c\x00d\x1be") == "abcde"
    assert plain("👩\u200d🚀") == "👩\u200d🚀"


def test_links_that_a_renderer_would_find_by_itself_are_broken() -> None:
    shown = plain("see https://x.example, WWW.x.example, me@x.example")
    assert "://" not in shown and "WWW." not in shown and "@" not in shown


def test_what_is_long_is_cut() -> None:
    assert plain("x" * 500) == "x" * 199 + "…"
    assert plain("&" * 200) == "&amp;" * 200


def test_the_header_is_yaml() -> None:
    delta = Delta({"w": (torch.ones(2, 1), torch.ones(3, 1))}, {"method": "rome"})
    card = edit_card(delta, "me/x", base_model="no", license="1.0", scores={"efficacy": 0.5})
    start, head, _ = card.split("---\n", 2)
    found = yaml.safe_load(head)
    results = found.pop("model-index")
    tags = ["knowledge-editing", "model-editing", "rome"]
    assert start == "" and found == {"library_name": "fastmemit", "base_model": "no", "license": "1.0", "tags": tags}
    assert results[0]["results"][0]["metrics"] == [{"type": "efficacy", "value": 0.5}]
    assert "| efficacy | 0.5 |" in card
