"""One pass for all multipliers: each has the keys of the smaller ones, and nothing runs twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fastcov
from fastmemit.data import Corpus, corpus_from_texts
from fastmemit.editor import Editor
from fastmemit.errors import BadConfig
from fastmemit.experiments.results import Inputs
from fastmemit.experiments.sweep import precompute_multipliers
from fastmemit.statistics import Collection
from tiny_editors import texts, tiny_corpus, tiny_editor
from tiny_models import D_K

LAYERS = (0, 2)
MULTIPLIERS = (0.3, 1.0, 2.5, 4.0)


@pytest.fixture
def editor(tmp_path: Path) -> Editor:
    return tiny_editor(tmp_path, layers=None)


def of(corpus: Corpus, **more: Any) -> Inputs:
    return Inputs(corpus, Path(), {}, **more)


def moments(editor: Editor, *multipliers: float | None, **settings):
    found = precompute_multipliers(editor, of(tiny_corpus()), multipliers, LAYERS, **settings)
    name = editor.adapter.projection_name(LAYERS[1])
    return {multiplier: statistics.moment(name) for multiplier, statistics in found.items()}


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("bos", [True, False])
def test_each_is_the_one_that_a_pass_of_its_own_gives(editor: Editor, bos: bool) -> None:
    together = moments(editor, *MULTIPLIERS, bos=bos)
    for multiplier in MULTIPLIERS:
        (alone,) = moments(editor, multiplier, bos=bos).values()
        assert together[multiplier].count == alone.count == fastcov.budget(multiplier, D_K)
        assert apart(together[multiplier].sum, alone.sum) < 1e-5
    assert torch.equal(together[0.3].sum, moments(editor, 0.3, bos=bos)[0.3].sum)


def test_the_first_position_is_left_out_where_asked(editor: Editor) -> None:
    rows: list[torch.Tensor] = []
    hook = editor.adapter.projection(2).register_forward_pre_hook(lambda _, args: rows.append(args[0][0, 1:].double()))
    with torch.no_grad():
        for text in tiny_corpus().documents(0):
            ids = editor.tokenizer(text)["input_ids"][: editor.adapter.max_context]
            editor.model(input_ids=torch.tensor([ids]))
    hook.remove()
    keys = torch.cat(rows)[: 2 * D_K]
    found = moments(editor, 2.0, bos=False)[2.0]
    assert found.count == len(keys) == 2 * D_K
    assert apart(found.sum.double(), keys.T @ keys) < 1e-5


def test_an_interrupted_pass_goes_on_at_the_last_budget_to_the_same_bits(
    editor: Editor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = moments(tiny_editor(tmp_path / "other", layers=None), *MULTIPLIERS)
    moments(editor, *MULTIPLIERS[:2])
    budgets = []
    real = fastcov.collect_moments

    def counted(model, modules, batches, budget, **settings):
        budgets.append(max(budget.values()))
        return real(model, modules, batches, budget, **settings)

    monkeypatch.setattr(fastcov, "collect_moments", counted)
    resumed = moments(editor, *MULTIPLIERS)
    keys = [fastcov.budget(multiplier, D_K) for multiplier in MULTIPLIERS]
    assert budgets == [keys[2] - keys[1], keys[3] - keys[2]]
    for multiplier in MULTIPLIERS:
        assert torch.equal(resumed[multiplier].sum, unbroken[multiplier].sum)


def test_the_full_precompute_takes_what_the_corpus_has(editor: Editor) -> None:
    corpus = tiny_corpus()
    tokens = sum(
        min(len(editor.tokenizer(text)["input_ids"]), editor.adapter.max_context) for text in corpus.documents(0)
    )
    found = precompute_multipliers(editor, of(corpus), (2.0, None), LAYERS)
    assert found[None].keys == tokens and found[None].exhausted
    assert found[2.0].keys == 2 * D_K
    found = precompute_multipliers(editor, of(corpus, full_keys=5 * D_K), (2.0, None), LAYERS)
    assert found[None].keys == 5 * D_K and not found[None].exhausted


def test_a_corpus_that_ends_is_refused_but_for_the_full_one(editor: Editor) -> None:
    short = corpus_from_texts("short", texts(2))
    tokens = sum(len(editor.tokenizer(text)["input_ids"]) for text in short.documents(0))
    for last in (50.0, (tokens + 1) / D_K):
        for before in (0.3, tokens / D_K):
            with pytest.raises(fastcov.BudgetNotMet, match=f"has {tokens} keys") as caught:
                precompute_multipliers(editor, of(short), (before, last), LAYERS)
            assert caught.value.found == tokens
    found = precompute_multipliers(editor, of(short), (tokens / D_K, None), LAYERS)
    assert found[None].keys == tokens and found[None].exhausted


def test_edits_do_not_find_what_a_sweep_has_collected(editor: Editor) -> None:
    moments(editor, 0.3)
    assert editor.store.find(LAYERS) is None


def test_only_a_larger_multiplier_goes_on_from_statistics(editor: Editor) -> None:
    found = precompute_multipliers(editor, of(tiny_corpus()), (2.0,), LAYERS)[2.0]
    with pytest.raises(BadConfig, match="cannot be continued to 2; give a larger"):
        editor.store.collect(Collection(tiny_corpus(), LAYERS, 2.0), after=found)
