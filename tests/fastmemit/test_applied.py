"""Edits come and go: bit for bit, last first, and never over a change of somebody else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastmemit.applied import Edit, EditStack
from fastmemit.delta import Delta
from fastmemit.editor import Editor
from fastmemit.errors import BadUndo, WrongModel
from fastmemit.models import fingerprint
from tiny_editors import FACTS, QUICK, tiny_editor
from tiny_models import tiny_model, tiny_tokenizer

DOWN = "model.layers.{}.mlp.down_proj.weight"  # (32, 64) in a tiny llama


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Editor:
    return tiny_editor(tmp_path_factory.mktemp("editor"))


@pytest.fixture
def editor(shared: Editor) -> Iterator[Editor]:
    """A shared editor; a test that leaves other weights than it found fails."""
    before = weights(shared.model)
    yield shared
    for edit in reversed(shared.edits):
        edit.undo()
    assert changed(shared.model, before) == []


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> list[str]:
    now = model.state_dict()
    assert now.keys() == before.keys()
    return [name for name in now if not torch.equal(now[name], before[name])]


def random_edit(editor: Editor, *layers: int, seed: int = 0) -> Edit:
    generator = torch.Generator().manual_seed(seed)
    factors = {
        DOWN.format(layer): (
            torch.randn(32, 2, generator=generator),
            torch.randn(64, 2, generator=generator),
        )
        for layer in layers
    }
    return Edit(Delta(factors, {"method": f"by-hand-{seed}"}), editor._stack)


@pytest.mark.parametrize("method", ["memit", "emmet", "rome"])
def test_edit_and_undo_are_exact(editor: Editor, method: str) -> None:
    settings = {"steps": 3, "layers": (0, 1) if method == "memit" else (1,)}
    before = weights(editor.model)
    edit = editor.edit(FACTS[:2], method, **settings)
    assert edit.applied and editor.edits == (edit,)
    edited = [DOWN.format(layer) for layer in settings["layers"]]
    assert changed(editor.model, before) == edited
    for name in edited:
        left, right = edit.delta.factors[name]
        assert torch.equal(editor.model.state_dict()[name], before[name] + left @ right.T)
    edit.undo()
    assert not edit.applied and editor.edits == ()
    assert changed(editor.model, before) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_comes_back_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    # W + delta - delta would not: the sum is rounded.
    editor = Editor(tiny_model("gpt2").to(dtype), tiny_tokenizer(), cache=tmp_path)
    name = "transformer.h.1.mlp.c_proj.weight"
    before = weights(editor.model)
    factors = {name: (torch.randn(64, 3), torch.randn(32, 3))}
    edit = Edit(Delta(factors), editor._stack).apply()
    assert changed(editor.model, before) == [name]
    naive = editor.model.state_dict()[name] - (factors[name][0] @ factors[name][1].T).to(dtype)
    assert not torch.equal(naive, before[name])
    edit.undo()
    assert changed(editor.model, before) == []


def test_edits_of_one_weight_are_undone_last_first(editor: Editor) -> None:
    states = [weights(editor.model)]
    edits = []
    for seed in range(3):
        edits.append(random_edit(editor, 0, 1, seed=seed).apply())
        states.append(weights(editor.model))
    for edit, state in zip(reversed(edits), reversed(states[:-1]), strict=True):
        edit.undo()
        assert changed(editor.model, state) == []


def test_the_wrong_order_is_refused_by_the_later_edits_name(editor: Editor) -> None:
    first, second = random_edit(editor, 0, seed=1).apply(), random_edit(editor, 0, 1, seed=2)
    second.apply()
    before = weights(editor.model)
    with pytest.raises(BadUndo, match=r"by-hand-1.* while the later .*by-hand-2.* undo the later"):
        first.undo()
    assert changed(editor.model, before) == []
    assert first.applied and second.applied
    second.undo()
    first.undo()


def test_edits_of_different_weights_are_undone_in_any_order(editor: Editor) -> None:
    before = weights(editor.model)
    low, high = random_edit(editor, 0).apply(), random_edit(editor, 1).apply()
    low.undo()
    assert changed(editor.model, before) == [DOWN.format(1)]
    assert editor.edits == (high,)
    low.apply()
    assert editor.edits == (high, low)
    high.undo()
    assert changed(editor.model, before) == [DOWN.format(0)]
    low.undo()
    assert changed(editor.model, before) == []


def test_an_edit_cannot_be_applied_or_undone_twice(editor: Editor) -> None:
    edit = random_edit(editor, 0)
    with pytest.raises(BadUndo, match="is not in the weights"):
        edit.undo()
    edit.apply()
    now = weights(editor.model)
    with pytest.raises(BadUndo, match="is in the weights already; undo it before"):
        edit.apply()
    assert changed(editor.model, now) == []
    edit.undo()
    with pytest.raises(BadUndo, match="is not in the weights"):
        edit.undo()


def test_it_can_be_applied_again(editor: Editor) -> None:
    edit = random_edit(editor, 0, 1).apply()
    once = weights(editor.model)
    edit.undo()
    edit.apply()
    assert changed(editor.model, once) == []


@pytest.mark.parametrize("layer", [0, 1])
def test_a_foreign_change_is_not_destroyed(editor: Editor, layer: int) -> None:
    edit = random_edit(editor, 0, 1).apply()
    weight = editor.model.get_parameter(DOWN.format(layer))
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[3, 5] += 1
    now = weights(editor.model)
    with pytest.raises(BadUndo, match=rf"layers\.{layer}\..* changed by something else since"):
        edit.undo()
    assert changed(editor.model, now) == [] and edit.applied  # not even the other weight
    with torch.no_grad():
        weight.copy_(kept)
    edit.undo()


def test_a_failed_apply_changes_nothing(editor: Editor) -> None:
    before = weights(editor.model)
    factors = {
        DOWN.format(0): (torch.ones(32, 1), torch.ones(64, 1)),
        DOWN.format(1): (torch.ones(64, 1), torch.ones(32, 1)),
    }
    edit = Edit(Delta(factors), editor._stack)
    with pytest.raises(WrongModel, match=r"layers\.1\..*\(64, 32\) .* \(32, 64\)"):
        edit.apply()
    assert changed(editor.model, before) == []
    assert not edit.applied and editor.edits == ()


def test_the_fingerprint_is_that_of_the_unedited_model(editor: Editor) -> None:
    unedited = fingerprint(editor.model)
    state = editor._stack.state()
    assert editor.fingerprint == unedited == state
    first, second = random_edit(editor, 0).apply(), random_edit(editor, 1).apply()
    assert editor.fingerprint == unedited != fingerprint(editor.model)
    both = editor._stack.state()
    assert both == f"{unedited}+{first.delta.digest()}+{second.delta.digest()}"


def test_the_fingerprint_is_taken_before_the_first_edit(tmp_path: Path) -> None:
    model = tiny_model("llama")
    unedited = fingerprint(model)
    stack = EditStack(model)
    Edit(Delta({DOWN.format(0): (torch.ones(32, 1), torch.ones(64, 1))}), stack).apply()
    assert stack.fingerprint == unedited


def test_the_applied_block_gives_the_weights_back(editor: Editor) -> None:
    before = weights(editor.model)
    edit = random_edit(editor, 0)
    with editor.applied(edit) as inside:
        assert inside is edit and edit.applied
        assert changed(editor.model, before) == [DOWN.format(0)]
    assert changed(editor.model, before) == [] and not edit.applied
    with pytest.raises(ZeroDivisionError), editor.applied(edit):
        raise ZeroDivisionError
    assert changed(editor.model, before) == [] and not edit.applied
    edit.apply()
    with editor.applied(edit):
        assert editor.edits == (edit,)
    assert changed(editor.model, before) == []
    with editor.applied(edit):
        edit.undo()
    assert changed(editor.model, before) == []


def test_applied_refuses_an_edit_of_another_editor(editor: Editor, tmp_path: Path) -> None:
    other = tiny_editor(tmp_path, layers=None)
    before = weights(other.model), weights(editor.model)
    with (
        pytest.raises(WrongModel, match=r"belongs to another editor; .* load"),
        editor.applied(random_edit(other, 0)),
    ):
        pass
    assert changed(other.model, before[0]) == changed(editor.model, before[1]) == []


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_a_saved_edit_gives_the_same_bits_in_another_editor(
    tmp_path: Path, architecture: str
) -> None:
    one = tiny_editor(tmp_path, architecture)
    edit = one.edit(FACTS, "memit", **QUICK)
    edit.save(tmp_path / "edit.safetensors")
    two = tiny_editor(tmp_path / "fresh", architecture, layers=None)
    before = weights(two.model)
    again = two.load(tmp_path / "edit.safetensors")
    assert not again.applied and changed(two.model, before) == []
    again.apply()
    assert changed(two.model, weights(one.model)) == []
    assert len(changed(two.model, before)) == 2
    assert again.delta.digest() == edit.delta.digest()
    again.undo()
    assert changed(two.model, before) == []


def test_an_edit_of_another_model_needs_force(editor: Editor, tmp_path: Path) -> None:
    edit = editor.plan(FACTS[:1], "rome", layers=(1,), steps=2)
    edit.save(tmp_path / "edit.safetensors")
    other = tiny_editor(
        tmp_path, model=tiny_model("llama", seed=1), layers=None, name="some other model"
    )
    before = weights(other.model)
    with pytest.raises(WrongModel) as caught:
        other.load(tmp_path / "edit.safetensors")
    for part in (editor.fingerprint[:16], other.fingerprint[:16], "force=True", editor.name):
        assert part in str(caught.value)
    forced = other.load(tmp_path / "edit.safetensors", force=True).apply()
    assert changed(other.model, before) == [DOWN.format(1)]
    forced.undo()
    assert changed(other.model, before) == []


def test_force_does_not_bend_shapes(editor: Editor, tmp_path: Path) -> None:
    editor.plan(FACTS[:1], "rome", layers=(1,), steps=2).save(tmp_path / "edit.safetensors")
    other = tiny_editor(tmp_path, "gpt2", layers=None)
    with pytest.raises(WrongModel, match=r"down_proj\.weight .* no such weight"):
        other.load(tmp_path / "edit.safetensors", force=True)
    wide = tiny_model("llama", intermediate_size=96)
    with pytest.raises(WrongModel, match=r"\(32, 64\) but this model has it as \(32, 96\)"):
        tiny_editor(tmp_path, model=wide, layers=None).load(
            tmp_path / "edit.safetensors", force=True
        )


def test_an_edit_says_what_it_is(editor: Editor) -> None:
    edit = Edit(Delta({}, {"method": "memit", "requests": [{}, {}]}), editor._stack)
    assert repr(edit) == "<Edit: 2 facts by memit, not applied>"
    edit.apply()
    assert repr(edit) == "<Edit: 2 facts by memit, applied>"
    for no_list in (3, None, "abc", {"a": 1}):
        forged = Edit(Delta({}, {"method": ["x" * 99], "requests": no_list}), editor._stack)
        assert repr(forged).startswith("<Edit: 0 facts by ['xxx") and len(repr(forged)) < 60
