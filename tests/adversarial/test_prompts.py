"""Edits of awkward prompts: done and undone bit for bit, or refused and nothing changed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from adversarial.awkward import PROMPTS, SUBJECTS, TARGETS, requests
from fastcov import FastcovError
from fastmemit import Edit, Editor
from fastmemit.data import Record
from fastmemit.errors import BadRequest, FastmemitError
from fastmemit.evaluation import score_records
from fastmemit.request import EditRequest, check_batch
from fastmemit.text import encode, request_rows
from tiny_editors import tiny_editor
from tiny_models import CONTEXT, tiny_tokenizer

KINDS = ("adds_eos", "metaspace")  # bytes with BOS and EOS, and pieces with BOS
SETTINGS: dict[str, Any] = {"layers": (0, 1), "steps": 2}
ONE: dict[str, Any] = {"layers": (1,), "steps": 2}


@pytest.fixture(scope="module", params=KINDS)
def editor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Editor:
    return tiny_editor(tmp_path_factory.mktemp(request.param), tokenizer=request.param)


@pytest.fixture(autouse=True)
def _unchanged(request: pytest.FixtureRequest) -> Iterator[None]:
    """Behind every test the weights have the bits that they had before it."""
    if "editor" not in request.fixturenames:
        yield
        return
    editor: Editor = request.getfixturevalue("editor")
    before = bits(editor)
    yield
    assert editor.edits == () and same(bits(editor), before)


def bits(editor: Editor) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in editor.model.state_dict().items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


def written(editor: Editor, batch: list[EditRequest], **overrides: Any) -> Edit | None:
    """An edit, applied and checked; None if it was refused in one sentence of fair length."""
    before = bits(editor)
    try:
        edit = editor.edit(batch, **{"method": "memit", **SETTINGS, **overrides})
    except (FastcovError, FastmemitError) as error:
        assert same(bits(editor), before), f"weights changed on the way to {error}"
        assert len(str(error)) < 1500
        return None
    assert not same(bits(editor), before)
    for left, right in edit.delta.factors.values():
        assert left.isfinite().all() and right.isfinite().all()
    return edit


def undone(editor: Editor, edit: Edit | None, before: dict[str, torch.Tensor]) -> bool:
    if edit is not None:
        edit.undo()
    assert same(bits(editor), before)
    return edit is not None


def refused_to(editor: Editor, request: EditRequest) -> str:
    with pytest.raises(BadRequest) as caught:
        editor.edit([request], "memit", **SETTINGS)
    return str(caught.value)


def test_all_awkward_subjects_in_one_batch(editor: Editor) -> None:
    """One edit with every subject and prompt; what cannot be written is left out first."""
    pairs = zip(itertools.cycle(PROMPTS), SUBJECTS, itertools.cycle(TARGETS), strict=False)
    batch = []
    for prompt, subject, target in pairs:
        request = EditRequest(prompt, subject, target)
        try:
            request_rows(editor.tokenizer, request, editor.contexts("memit"))
        except BadRequest as error:
            assert "merges" in str(error) or "yields no token" in str(error)
            continue
        batch.append(request)
    assert len(batch) > 0.8 * len(SUBJECTS)
    before = bits(editor)
    assert undone(editor, written(editor, check_batch(batch)), before)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(request=requests())
def test_any_request_is_written_and_undone_or_refused(editor: Editor, request: EditRequest) -> None:
    before = bits(editor)
    undone(editor, written(editor, [request]), before)


@pytest.mark.parametrize("method", ["emmet", "rome"])
def test_the_other_methods_too(editor: Editor, method: str) -> None:
    before = bits(editor)
    batch = [EditRequest("{} is in", subject, "Rome") for subject in SUBJECTS[1:3]]
    assert undone(editor, written(editor, batch, method=method, **ONE), before)


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("{}", "Paris"),  # the subject is the whole prompt
        ("{} is", "Paris"),
        ("In the city of {}", "Paris"),
        ("Paris, Paris, {} and Paris", "Paris"),  # repeated before and behind
        ("the {}", "the"),
        ("{} {", "{"),
        ("The capital of {} is", "the capital of the capital of"),
    ],
)
def test_where_the_subject_stands(editor: Editor, prompt: str, subject: str) -> None:
    before = bits(editor)
    assert undone(editor, written(editor, [EditRequest(prompt, subject, "Rome")]), before)


def test_a_subject_of_20000_characters_is_refused_with_both_numbers(editor: Editor) -> None:
    for subject in ("Eiffel Tower " * 1538 + "London", "\u05d0" * 20_000, "🙂" * 20_000):
        message = refused_to(editor, EditRequest("{} is in", subject, "Rome"))
        assert f"takes {CONTEXT} at once" in message and len(message) < 300


@pytest.mark.parametrize("kind", ["slow_bytes", "slow_words"])
def test_a_subject_of_20000_characters_for_a_tokenizer_without_offsets(kind: str) -> None:
    request = EditRequest("{} is in", "Paris " * 3334, "Rome")
    with pytest.raises(BadRequest, match=r"has 200\d\d characters, and Slow.* use the fast tokenizer"):
        encode(tiny_tokenizer(kind), request.text)


def test_a_subject_as_long_as_fits_and_one_token_more(editor: Editor) -> None:
    """The longest row is prompt and target behind the longest context that the model wrote."""
    longest = 0
    for count in range(60, CONTEXT):
        request = EditRequest("{} is in", "Paris" + " Paris" * count, "Rome")
        rows = [encode(editor.tokenizer, c + request.text + " Rome").ids[:-1]
                for c in editor.contexts("memit")]  # fmt: skip
        if max(map(len, rows)) > CONTEXT:
            break
        longest = count
    before = bits(editor)
    fits, more = (EditRequest("{} is in", "Paris" + " Paris" * n, "Rome")
                  for n in (longest, longest + 1))  # fmt: skip
    assert undone(editor, written(editor, [fits]), before)
    assert f"takes {CONTEXT} at once" in refused_to(editor, more)


def test_a_target_beyond_the_context_and_one_within(editor: Editor) -> None:
    before = bits(editor)
    long = EditRequest("{} is in", "Paris", "a b " * 40)
    assert undone(editor, written(editor, [long]), before)
    refused_to(editor, EditRequest("{} is in", "Paris", "a b " * 2000))


def test_a_target_that_is_the_subject(editor: Editor) -> None:
    before = bits(editor)
    batch = [EditRequest("{} is in", "Paris", "Paris"), EditRequest("{} in", " Rome", "Rome")]
    assert undone(editor, written(editor, batch), before)


def test_scores_of_an_awkward_record_are_numbers(editor: Editor) -> None:
    subjects = SUBJECTS[:12]
    records = [
        Record(n, EditRequest("{} is in", s, TARGETS[n], "Paris"), (f"{s}.",), PROMPTS[1:3])
        for n, s in enumerate(subjects)
    ]
    scores = score_records(editor.adapter, editor.tokenizer, records)
    assert all(0 <= score.es <= 1 and 0 <= score.ns <= 1 for score in scores)


# -- what is no request at all --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["prompt", "subject", "target_new", "target_true"])
def test_half_a_surrogate_pair_is_refused_where_it_is_written(name: str) -> None:
    fields = {"prompt": "{} is", "subject": "Paris", "target_new": "Rome", "target_true": "Lyon"}
    fields[name] += "\ud83d"
    for make in (lambda: EditRequest(**fields), lambda: EditRequest.from_dict(fields)):
        with pytest.raises(BadRequest, match=f"{name} .* is not valid Unicode"):
            make()


@pytest.mark.parametrize("empty", ["", " ", "\n\t", "\u3000", "\x1c", "\u2028"])
def test_empty_texts(empty: str) -> None:
    with pytest.raises(BadRequest, match=r"has no \{\}"):
        EditRequest(empty, "Paris", "Rome")
    with pytest.raises(BadRequest, match="is empty"):
        EditRequest("{} is", empty, "Rome")
    with pytest.raises(BadRequest, match=r"target_new .* is empty"):
        EditRequest("{} is", "Paris", empty)


@pytest.mark.parametrize(
    ("prompt", "subject", "template"),
    [
        ("Paris is in {", "Paris", "{} is in {"),
        ("f{0} Paris {1}", "Paris", "f{0} {} {1}"),
        ("{Paris}", "Paris", "{{}}"),
        ("a { b", "{", "a {} b"),
        (f"x {SUBJECTS[1]} y", SUBJECTS[1], "x {} y"),
    ],
)
def test_filled_prompts_with_braces(prompt: str, subject: str, template: str) -> None:
    request = EditRequest.from_dict({"prompt": prompt, "subject": subject, "target_new": "x"})
    assert request.prompt == template and request.text == prompt


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("{} {}", "has 2 of {}"), ("{{}} {}", "has 2"), ("{ }", "not in the prompt"), ("{x}", "not in")],
)
def test_prompts_with_other_holes(prompt: str, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        EditRequest.from_dict({"prompt": prompt, "subject": "Paris", "target_new": "Rome"})


def test_a_subject_that_is_twice_in_a_filled_prompt() -> None:
    with pytest.raises(BadRequest, match=r"is 2 times in the prompt .*write \{\} at the place"):
        EditRequest.from_dict({"prompt": "Paris is Paris", "subject": "Paris", "target": "x"})


def test_the_same_fact_twice_in_a_batch() -> None:
    one = EditRequest("{} is", "Paris", "Rome")
    for other in ("Paris", " PARIS "):
        with pytest.raises(BadRequest, match="Requests 0 and 1 both edit"):
            check_batch([one, EditRequest("{} is", other, "Lyon")])
