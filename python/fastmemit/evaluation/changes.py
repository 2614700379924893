"""What an edit changes at single prompts: what the model says there before and after, and how sure of it it is.

As lines for a terminal, and as one HTML page that needs nothing else: no network, no script, no file beside it. Its
template escapes all text, and its Content-Security-Policy forbids the browser to load anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcov.files import printable
from fastmemit.answers import judge_answers
from fastmemit.data import Record, load_records
from fastmemit.data.reading import check_file, read_lines
from fastmemit.editor import Editor
from fastmemit.errors import BadData
from fastmemit.evaluation.runner import first_words
from fastmemit.request import joined_answer
from fastmemit.text import lead

SHOWN = 6  # tokens that are shown of what a model says
KINDS = ("fact", "paraphrase", "neighbour", "prompt")


@dataclass(frozen=True)
class Watched:
    """A prompt at which a model is watched."""

    kind: str  # one of `KINDS`
    prompt: str
    new: str | None = None  # the new answer of its fact, as it stands behind the prompt; None for a prompt alone
    front: str = ""  # what the prompt is asked behind; see `fastmemit.text.lead`


@dataclass(frozen=True)
class Change:
    """What an edit made of one prompt."""

    watched: Watched
    before: str  # the unedited model's continuation, of `SHOWN` tokens
    after: str  # the edited model's
    old: str  # the former answer: the first words of `before`, or its first line where there is no fact
    old_probability: tuple[float, float] | None  # of the former answer, before and after; None where it is no text
    new_probability: tuple[float, float] | None  # of the new answer; None where there is none

    @property
    def same(self) -> bool:
        """Whether the former answer is still what the model says."""
        return self.after.strip().startswith(self.old)


class Observer:
    """Watches a model at some prompts: made before an edit, asked after it; a BadRequest for one that cannot run."""

    def __init__(self, editor: Editor, watched: Iterable[Watched]) -> None:
        self._editor = editor
        self._watched = list(dict.fromkeys(watched))
        self._said = self._continued()
        self._old = [
            (first_words(text, each.new) if each.new is not None else "") or _line(text)
            for each, text in zip(self._watched, self._said, strict=True)
        ]
        self._before = self._probabilities()

    def changes(self) -> list[Change]:
        """What has changed since the observer was made, in the order of the prompts."""
        now, after = self._continued(), self._probabilities()
        return [
            Change(
                watched,
                before=said,
                after=says,
                old=old.strip(),
                old_probability=_pair(was[0], is_[0]),
                new_probability=_pair(was[1], is_[1]),
            )
            for watched, said, says, old, was, is_ in zip(
                self._watched, self._said, now, self._old, self._before, after, strict=True
            )
        ]

    def _continued(self) -> list[str]:
        prompts = [each.front + each.prompt for each in self._watched]
        return self._editor.generate(prompts, SHOWN) if prompts else []

    def _probabilities(self) -> list[tuple[float | None, float | None]]:
        """Of the former and of the new answer at each prompt; None of what is no answer."""
        questions: dict[tuple[int, bool], tuple[str, str]] = {}
        for number, (watched, old) in enumerate(zip(self._watched, self._old, strict=True)):
            asked = watched.front + watched.prompt
            answer = old if watched.new is None else joined_answer(watched.prompt, old)
            if answer.strip():
                questions[number, False] = (asked, answer)
            if watched.new is not None:
                questions[number, True] = (asked, watched.new)
        model = self._editor.adapter, self._editor.tokenizer
        judged = judge_answers(*model, list(questions.values())) if questions else []
        found = {place: math.exp(-a.nll * len(a.matches)) for place, a in zip(questions, judged, strict=True)}
        return [(found.get((n, False)), found.get((n, True))) for n in range(len(self._watched))]


def _line(text: str) -> str:
    """A text up to the end of its first line that has anything."""
    start = len(text) - len(text.lstrip())
    return text[:start] + text[start:].partition("\n")[0]


def _pair(before: float | None, after: float | None) -> tuple[float, float] | None:
    return None if before is None or after is None else (before, after)


def watched_facts(tokenizer: Any, records: Iterable[Record], *, facts: bool = True) -> list[Watched]:
    """The prompts of records: each fact (where `facts`), its paraphrases and its neighbours."""
    found = []
    for record in records:
        request = record.request
        if facts:
            found.append(Watched("fact", request.text, request.target, lead(tokenizer, request)))
        for kind, prompts in (("paraphrase", record.paraphrases), ("neighbour", record.neighbourhood)):
            found += [Watched(kind, prompt, request.answer_to(prompt, request.target_new)) for prompt in prompts]
    return found


def read_prompts(tokenizer: Any, path: Path) -> list[Watched]:
    """The prompts in a file: lines of text, or records' paraphrases and neighbours; a BadData if there is none."""
    check_file(path, BadData)
    lines = [line.text.strip() for line in read_lines(path, BadData) if line.text.strip()]
    if lines and lines[0].startswith(("{", "[")):
        found = watched_facts(tokenizer, load_records(path, own=True), facts=False)
    else:
        found = [Watched("prompt", line) for line in lines]
    if not found:
        raise BadData(f"{path} holds no prompt; write one a line, or facts with paraphrases or neighbours.")
    return found


def page(model: str, method: str, changes: Sequence[Change]) -> str:
    """The changes as an HTML page: for each prompt both answers side by side, and their probabilities as bars."""
    groups = {kind: [change for change in changes if change.watched.kind == kind] for kind in KINDS}
    filters = {
        "text": lambda text: printable(" ".join(text.split())) or "(nothing)",
        "percent": lambda share: f"{share:.1%}" if share >= 0.001 else "< 0.1%",
    }
    shown = {kind: found for kind, found in groups.items() if found}
    return render("evaluation/changes.html", filters, model=model, method=method, groups=shown)


def render(template: str, filters: Mapping[str, Callable[[Any], str]], **values: Any) -> str:
    """A page of its own, from a template of the package that extends ``evaluation/page.html``."""
    # torch needs jinja2, so it is there wherever fastmemit is.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fastmemit", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    return environment.get_template(template).render(**values)
