"""``multiplier="auto"``: collected until the rule of every layer is content, and found again."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

import fastcov
from fastcov.sizing import StoppingRule, checkpoints
from fastmemit import statistics as auto
from fastmemit.data import corpus_from_texts
from fastmemit.editor import Editor
from fastmemit.errors import BadConfig
from tiny_editors import texts, tiny_corpus, tiny_editor
from tiny_models import D_K

LAYERS = (0, 2)


@pytest.fixture
def editor(tmp_path: Path) -> Editor:
    return tiny_editor(tmp_path, layers=None)


def test_it_ends_where_every_layer_is_content(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = iter((2 * D_K, 3 * D_K))  # the second layer needs more than the first
    asked: list[tuple[int, int]] = []

    class Rule(StoppingRule):
        def __init__(self, **settings):
            super().__init__(**settings)
            self.needs = next(needed)

        def update(self, moment):
            asked.append((self.needs, moment.count))
            return super().update(moment) or moment.count >= self.needs

    monkeypatch.setattr(auto, "StoppingRule", Rule)
    found = editor.precompute(tiny_corpus(), multiplier="auto", layers=LAYERS)
    assert found.keys == 3 * D_K
    looks = [keys for keys in checkpoints(D_K) if keys <= 3 * D_K]
    assert asked == [(needs, keys) for keys in looks for needs in (2 * D_K, 3 * D_K)]


def test_its_statistics_serve_edits_and_are_those_of_a_pass_to_that_multiplier(
    editor: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = editor.precompute(tiny_corpus(200), multiplier="auto", layers=LAYERS)
    assert 1 < found.provenance["multiplier"] <= 10
    kept = editor.store.find(LAYERS)
    assert kept is not None and kept.keys == found.keys
    alone = editor.precompute(tiny_corpus(200), multiplier=found.provenance["multiplier"], layers=LAYERS)
    name = editor.adapter.projection_name(2)
    one, other = found.moment(name), alone.moment(name)
    assert one.count == other.count
    assert (one.sum - other.sum).norm() < 1e-5 * other.sum.norm()

    def never(*_args, **_more):
        raise AssertionError("collected again")

    monkeypatch.setattr(fastcov, "collect_moments", never)
    again = editor.precompute(tiny_corpus(200), multiplier="auto", layers=LAYERS)
    assert again.keys == found.keys


def test_at_the_bound_it_says_what_is_left(
    editor: Editor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(StoppingRule, "converged", property(lambda rule: False))
    with caplog.at_level(logging.WARNING):
        found = editor.precompute(tiny_corpus(200), multiplier="auto", layers=(1,))
    assert found.keys == 10 * D_K
    assert "more than it must" in caplog.text and "down_proj" in caplog.text


def test_a_corpus_that_ends_before_is_refused_or_taken(editor: Editor) -> None:
    short = corpus_from_texts("short", texts(3))
    with pytest.raises(fastcov.BudgetNotMet):
        editor.precompute(short, multiplier="auto", layers=(1,))
    found = editor.precompute(short, multiplier="auto", layers=(1,), allow_fewer=True)
    assert found.exhausted


def test_another_word_is_refused(editor: Editor) -> None:
    with pytest.raises(BadConfig, match="'many' is no number; give one, or 'auto'"):
        editor.precompute(tiny_corpus(), multiplier="many")  # type: ignore[arg-type]  # a wrong kind is what is refused
