"""What a plan reads: once where it can, the same bits with and without what was kept."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from fastmemit.delta import Delta
from fastmemit.editor import Editor
from fastmemit.methods import Draft, ReadCache, base
from fastmemit.methods.base import Reading, averaged_keys
from fastmemit.partial_forward import read_at_subject
from fastmemit.text import subject_row
from tiny_editors import FACTS, tiny_corpus, tiny_editor

LAYERS = (0, 1, 2)
SETTINGS: dict[str, Any] = {"steps": 2, "layers": LAYERS}


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory) -> Editor:
    return tiny_editor(tmp_path_factory.mktemp("editor"), layers=LAYERS)


def equal(one: Delta, other: Delta) -> bool:
    return one.digest() == other.digest()


def calls_of_blocks(editor: Editor, counts: Counter[int]) -> list[Any]:
    """Hooks that count how often each block's attention runs."""
    return [
        editor.adapter.block(layer).self_attn.register_forward_hook(lambda *_, layer=layer: counts.update([layer]))
        for layer in LAYERS
    ]


def reading(size: int) -> Reading:
    part = torch.zeros(size, dtype=torch.float64)
    return Reading(part, part, part, ())


def test_a_reading_is_what_stateless_reads_give(editor: Editor) -> None:
    work = Draft(editor.workspace, editor.config("memit", **SETTINGS))
    subjects, adapter = work.subjects(FACTS), editor.adapter
    bare = [subject_row(editor.tokenizer, "", fact) for fact in FACTS]
    before = {layer: adapter.weight(layer).clone() for layer in LAYERS}
    for layer in LAYERS:
        read = work.read(subjects, layer)
        keys = averaged_keys(work.context_outputs(layer, FACTS).keys).T
        _, (out, block) = read_at_subject(adapter, bare, outputs=[adapter.projection(layer), adapter.block(2)])
        for found, wanted in ((read.keys, keys), (read.outputs, out), (read.block, block)):
            assert (found - wanted).norm() <= 1e-6 * wanted.norm()
        assert read.keys.shape == (3, 64)
        with torch.no_grad():
            adapter.weight(layer).mul_(1.5)  # as if it were written: the next layer must see it
    with torch.no_grad():
        for layer, weight in before.items():
            adapter.weight(layer).copy_(weight)


def test_without_contexts_the_bare_key_is_the_key(editor: Editor) -> None:
    work = Draft(editor.workspace, editor.config("memit", **SETTINGS))
    work.contexts = ("",)
    read = work.read(work.subjects(FACTS), 1)
    assert read.keys.shape == (3, 64) and len(read.passes) == 1
    wanted = averaged_keys(work.context_outputs(1, FACTS).keys).T
    assert (read.keys - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("together", [1, 2, 3])
def test_keys_are_averaged_part_by_part(editor: Editor, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "TOGETHER", together)
    work = Draft(editor.workspace, editor.config("memit", **SETTINGS))
    subjects = work.subjects(FACTS)
    for layer in LAYERS:
        read = work.read(subjects, layer)
        wanted = averaged_keys(work.context_outputs(layer, FACTS).keys).T
        assert (read.keys - wanted).norm() <= 1e-6 * wanted.norm()
    assert len(read.passes) == 1 + -(-3 // together)


@pytest.mark.parametrize("method", ["memit", "emmet", "rome"])
def test_plans_of_a_sweep_are_the_same_with_what_was_kept(tmp_path: Any, method: str) -> None:
    editor = tiny_editor(tmp_path, layers=None)
    layers = LAYERS if method == "memit" else (1,)
    reads, settings = ReadCache(), {"steps": 2, "layers": layers}
    found = [editor.precompute(tiny_corpus(), multiplier=m, layers=layers) for m in (2, 4)]
    plain, kept = [], []
    for statistics in found:
        editor.store.use(statistics)
        plain.append(editor.plan(FACTS, method, **settings).delta)
        kept.append(editor.plan(FACTS, method, reads=reads, **settings).delta)
    assert all(equal(one, other) for one, other in zip(plain, kept, strict=True))
    assert not equal(*plain)  # the statistics differ, so that the edits do
    assert len(reads) == 1


def test_a_second_plan_runs_only_what_depends_on_its_writes(editor: Editor) -> None:
    counts: Counter[int] = Counter()
    reads = ReadCache()
    editor.plan(FACTS, "memit", **SETTINGS)  # targets are stored now
    hooks = calls_of_blocks(editor, counts)
    editor.plan(FACTS, "memit", **SETTINGS)  # and what a model with hooks is was measured
    counts.clear()
    editor.plan(FACTS, "memit", reads=reads, **SETTINGS)
    # Bare prompts run up to the last block, contexts up to the layer. Layers 0 and 1 begin at the
    # first block, layer 2 at block 1, where the reading of layer 1 was kept.
    assert counts == {0: 4, 1: 5, 2: 4}
    counts.clear()
    editor.plan(FACTS, "memit", reads=reads, **SETTINGS)
    assert counts == {0: 2, 1: 4, 2: 3}
    counts.clear()
    editor.plan(FACTS, "emmet", steps=2, layers=(1,), reads=reads)
    counts.clear()
    editor.plan(FACTS, "emmet", steps=2, layers=(1,), reads=reads, weight=9.0)
    assert counts == {}
    for hook in hooks:
        hook.remove()


def test_other_facts_and_layers_are_other_readings(editor: Editor) -> None:
    reads = ReadCache()
    for facts, layer in ((FACTS, 1), (FACTS[:2], 1), (FACTS, 2), (FACTS, 1)):
        made = editor.plan(facts, "emmet", steps=2, layers=(layer,), reads=reads).delta
        assert equal(made, editor.plan(facts, "emmet", steps=2, layers=(layer,)).delta)
    assert len(reads) == 3


def test_nothing_of_an_edited_model_is_kept_or_served(editor: Editor) -> None:
    reads = ReadCache()
    unedited = editor.plan(FACTS[:1], "emmet", steps=2, layers=(1,), reads=reads).delta
    held = reads.nbytes
    with editor.edit(FACTS[1:], "emmet", steps=2, layers=(0,)):
        inside = editor.plan(FACTS[:1], "emmet", steps=2, layers=(1,), reads=reads).delta
        assert equal(inside, editor.plan(FACTS[:1], "emmet", steps=2, layers=(1,)).delta)
    assert not equal(inside, unedited)
    assert reads.nbytes == held and len(reads) == 1


def test_two_models_may_share_a_cache(editor: Editor, tmp_path: Any) -> None:
    from tiny_models import tiny_model

    reads = ReadCache()
    other = tiny_editor(tmp_path, model=tiny_model("llama", seed=1), layers=(1,))
    for each in (editor, other):
        made = each.plan(FACTS, "emmet", steps=2, layers=(1,), reads=reads).delta
        assert equal(made, each.plan(FACTS, "emmet", steps=2, layers=(1,)).delta)
    assert len(reads) == 2


def test_the_least_recently_used_go_first() -> None:
    reads = ReadCache(capacity=2 * reading(10).nbytes)
    made: list[str] = []

    def make(name: str, size: int = 10) -> Reading:
        made.append(name)
        return reading(size)

    for name in ("a", "b", "a", "c", "a", "b"):
        reads.get(name, lambda name=name: make(name))  # type: ignore[misc]  # binds the name of this round
    assert made == ["a", "b", "c", "b"] and len(reads) == 2
    reads.get("large", lambda: make("large", 21))
    assert len(reads) == 2 and reads.nbytes == 2 * reading(10).nbytes
