"""What an edit changes at single prompts, and the page of it: escaped, self-contained, opened in a browser."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fastmemit.editor import Editor
from fastmemit.errors import BadData
from fastmemit.evaluation import judge_answers
from fastmemit.evaluation.changes import Change, Observer, Watched, page, read_prompts, watched_facts
from headless_browser import open_page
from tiny_editors import FACTS, QUICK, record, tiny_editor

HOSTILE = "<script>throw 1</script>\"'><img src=x onerror='throw 2'>{{ 7 * 7 }}&amp;\x1b[2J"


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory) -> Editor:
    return tiny_editor(tmp_path_factory.mktemp("editor"), name="tiny")


def test_probabilities_before_and_after_are_those_of_whole_answers(editor: Editor) -> None:
    # One that a random model continues by something that can be read.
    prompt = next(
        text for text in ("I play", "The piano is", "Italy", "The poet") if editor.generate(text, 6)[0].strip()
    )
    watched = [*watched_facts(editor.tokenizer, [record(0, FACTS[1])]), Watched("prompt", prompt)]
    assert [each.kind for each in watched] == ["fact", *["paraphrase"] * 2, *["neighbour"] * 3, "prompt"]

    def probability(prompt: str, answer: str) -> float:
        (found,) = judge_answers(editor.adapter, editor.tokenizer, [(prompt, answer)])
        return math.exp(-found.nll * len(found.matches))

    observer = Observer(editor, watched)
    (continued,) = editor.generate(prompt, 6)
    line = next(line for line in continued.splitlines() if line.strip())  # the former answer ends with its line
    former = continued[: continued.index(line) + len(line)]
    asked = [("The capital of France is", " Berlin"), (prompt, former)]
    before = [probability(*each) for each in asked]
    with editor.edit(FACTS[1], "memit", **QUICK):
        changes = observer.changes()
        after = [probability(*each) for each in asked]
    assert [change.watched for change in changes] == watched
    assert changes[0].new_probability == pytest.approx((before[0], after[0]), rel=1e-3)
    assert changes[-1].old_probability == pytest.approx((before[1], after[1]), rel=1e-3)
    assert changes[-1].old == former.strip() and changes[-1].before == continued and changes[-1].new_probability is None
    assert all(change.same and change.before == change.after for change in observer.changes())
    assert Observer(editor, []).changes() == []


def test_prompts_come_from_lines_or_from_facts(editor: Editor, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("The piano is in\n\n  I play\n")
    assert read_prompts(editor.tokenizer, path) == [Watched("prompt", "The piano is in"), Watched("prompt", "I play")]
    fact = {"prompt": "{} is in", "subject": "Paris", "target_new": "Rome", "neighbours": ["Italy is in"]}
    path.write_text(json.dumps(fact) + "\n")
    assert read_prompts(editor.tokenizer, path) == [Watched("neighbour", "Italy is in", " Rome")]
    del fact["neighbours"]
    for content in (json.dumps(fact), " \n"):
        path.write_text(content)
        with pytest.raises(BadData, match="holds no prompt"):
            read_prompts(editor.tokenizer, path)


def changes(text: str) -> list[Change]:
    found = [
        Change(Watched(kind, text, text), text, text, text, (0.75, 0.0001), (0.25, 1.0))
        for kind in ("fact", "paraphrase", "neighbour")
    ]
    return [*found, Change(Watched("prompt", text), text, text, text, (0.75, 0.0001), None)]


class Parsed(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.styles: list[str] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        attributes = dict(attrs)
        self.styles += [str(attributes["style"])] if "style" in attributes else []
        assert not attributes.keys() & {"src", "href", "srcset", "action"} and not any(
            n.startswith("on") for n in attributes
        )

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_has_bars_and_escapes_everything() -> None:
    parsed = Parsed(page(HOSTILE, HOSTILE, changes(HOSTILE)))
    assert "script" not in parsed.tags and "img" not in parsed.tags and "\x1b" not in parsed.text
    assert "{{ 7 * 7 }}&amp;\\x1b[2J" in parsed.text and parsed.tags.count("article") == 4
    for width, count in (("75.00", 4), ("0.01", 4), ("25.00", 3), ("100.00", 3)):
        assert parsed.styles.count(f"width: {width}%") == count
    assert "75.0%" in parsed.text and "< 0.1%" in parsed.text
    only = Parsed(page("m", "memit", [changes("x")[0]]))
    assert "Facts" in only.text and "Neighbours" not in only.text


def test_chromium_runs_nothing_and_shows_both_sides(tmp_path: Path) -> None:
    for name, text in (("plain", "The capital of France is"), ("hostile", HOSTILE)):
        path = tmp_path / f"{name}.html"
        path.write_text(page(text, "memit", changes(text)), encoding="utf-8")
        seen = open_page(path, tmp_path)
        assert seen.console == []
        assert seen.document.count('class="when"') == 8
