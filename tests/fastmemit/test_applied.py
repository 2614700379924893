"""Edits come and go: bit for bit, last first, and never over a change of somebody else."""

from __future__ import annotations

import gc
import hashlib
import inspect
import linecache
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastmemit.delta import Delta
from fastmemit.editor import Editor
from fastmemit.edits import Edit, EditStack
from fastmemit.errors import BadUndo, FastmemitError, WrongModel
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
        DOWN.format(layer): (torch.randn(32, 2, generator=generator), torch.randn(64, 2, generator=generator))
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
    editor = Editor(tiny_model("gpt2").to(dtype), tiny_tokenizer(), cache_dir=tmp_path)
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
    one = hashlib.sha256(f"+{first.delta.digest()}".encode()).hexdigest()
    two = hashlib.sha256(f"{one}+{second.delta.digest()}".encode()).hexdigest()
    assert both == f"{unedited}+{two}"
    assert editor._stack.digests() == [first.delta.digest(), second.delta.digest()]
    first.undo()  # the state is that of the edits that are left
    alone = hashlib.sha256(f"+{second.delta.digest()}".encode()).hexdigest()
    assert editor._stack.state() == f"{unedited}+{alone}"


def test_the_fingerprint_is_taken_before_the_first_edit(tmp_path: Path) -> None:
    model = tiny_model("llama")
    unedited = fingerprint(model)
    stack = EditStack(model)
    Edit(Delta({DOWN.format(0): (torch.ones(32, 1), torch.ones(64, 1))}), stack).apply()
    assert stack.fingerprint == unedited


def test_the_applied_block_gives_the_weights_back(editor: Editor) -> None:
    before = weights(editor.model)
    edit = random_edit(editor, 0)
    with edit as inside:
        assert inside is edit and edit.applied
        assert changed(editor.model, before) == [DOWN.format(0)]
    assert changed(editor.model, before) == [] and not edit.applied
    with pytest.raises(ZeroDivisionError), edit:
        raise ZeroDivisionError
    assert changed(editor.model, before) == [] and not edit.applied
    edit.apply()
    with edit:
        assert editor.edits == (edit,)
    assert changed(editor.model, before) == []
    with edit:
        edit.undo()
    assert changed(editor.model, before) == []


def test_an_edit_that_is_undone_and_applied_again_inside_its_block_is_undone_behind(editor: Editor) -> None:
    before = weights(editor.model)
    edit, later = random_edit(editor, 0, seed=1), random_edit(editor, 0, seed=2)
    with edit:
        edit.undo()
        assert changed(editor.model, before) == []
        edit.apply()
    assert changed(editor.model, before) == [] and editor.edits == ()
    with pytest.raises(ZeroDivisionError), edit:
        edit.undo()
        edit.apply()
        later.apply()
        raise ZeroDivisionError
    assert changed(editor.model, before) == [] and editor.edits == ()
    assert not editor._stack.lock._is_owned()


def test_a_block_is_of_the_edits_own_editor(editor: Editor, tmp_path: Path) -> None:
    other = tiny_editor(tmp_path, layers=None)
    before = weights(other.model), weights(editor.model)
    edit = random_edit(other, 0)
    with edit:
        assert changed(other.model, before[0]) == [DOWN.format(0)] and changed(editor.model, before[1]) == []
    with pytest.raises(WrongModel, match=r"belongs to another editor; .* load"):
        editor._stack.check(edit)
    assert changed(other.model, before[0]) == changed(editor.model, before[1]) == []


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_a_saved_edit_gives_the_same_bits_in_another_editor(tmp_path: Path, architecture: str) -> None:
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
    other = tiny_editor(tmp_path, model=tiny_model("llama", seed=1), layers=None, name="some other model")
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
        tiny_editor(tmp_path, model=wide, layers=None).load(tmp_path / "edit.safetensors", force=True)


def test_an_edit_says_what_it_is(editor: Editor) -> None:
    edit = Edit(Delta({}, {"method": "memit", "requests": [{}, {}]}), editor._stack)
    assert repr(edit) == "<Edit: 2 facts by memit, not applied>"
    edit.apply()
    assert repr(edit) == "<Edit: 2 facts by memit, applied>"
    for no_list in (3, None, "abc", {"a": 1}):
        forged = Edit(Delta({}, {"method": ["x" * 99], "requests": no_list}), editor._stack)
        assert repr(forged).startswith("<Edit: 0 facts by ['xxx") and len(repr(forged)) < 60


def test_a_block_entered_twice_with_one_edit_ends_with_the_outer_one(editor: Editor) -> None:
    before = weights(editor.model)
    edit = random_edit(editor, 0)
    with edit:
        inside = weights(editor.model)
        with edit:
            assert changed(editor.model, inside) == []
        assert changed(editor.model, inside) == [] and edit.applied
    assert changed(editor.model, before) == [] and not edit.applied


def test_an_undo_ends_blocks_whose_end_an_interrupt_has_stopped(editor: Editor) -> None:
    before, edit = weights(editor.model), random_edit(editor, 0)

    def stopped(frame, event, _):
        if frame.f_code is Edit.__exit__.__code__:
            sys.settrace(None)
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), edit:
            sys.settrace(stopped)
        assert edit.applied  # on record, and the thread still has the lock
        assert editor._stack.lock._is_owned()
        edit.undo()
        assert not changed(editor.model, before) and not editor._stack.lock._is_owned()
    with edit, edit:
        edit.undo()
        assert not changed(editor.model, before)
    assert not edit.applied and not editor._stack.lock._is_owned()


def test_what_is_raised_in_a_block_comes_out_and_later_edits_go_too(editor: Editor) -> None:
    before = weights(editor.model)
    outside = random_edit(editor, 2, seed=5).apply()
    edit, later, last = (random_edit(editor, *at) for at in ((0,), (0, 1), (1,)))
    apart = random_edit(editor, 2, seed=6)
    with pytest.raises(ZeroDivisionError), edit:
        for each in (later, last, apart):
            each.apply()
        raise ZeroDivisionError
    assert editor.edits == (outside, apart)
    apart.undo()
    outside.undo()
    assert changed(editor.model, before) == []


def test_a_block_that_ends_under_a_later_edit_says_so(editor: Editor) -> None:
    before = weights(editor.model)
    edit, later = random_edit(editor, 0, seed=1), random_edit(editor, 0, seed=2)
    with pytest.raises(BadUndo, match=r"later .*by-hand-2"), edit:
        later.apply()
    assert editor.edits == (edit, later)
    later.undo()
    edit.undo()
    assert changed(editor.model, before) == []


def test_a_change_by_others_in_a_block_does_not_hide_what_was_raised(editor: Editor) -> None:
    before = weights(editor.model)
    edit = random_edit(editor, 0)
    weight = editor.model.get_parameter(DOWN.format(0))
    with pytest.raises(ZeroDivisionError), edit, torch.no_grad():
        kept = weight[0, 0].clone()
        weight[0, 0] += 1
        raise ZeroDivisionError
    assert edit.applied
    with torch.no_grad():
        weight[0, 0] = kept
    edit.undo()
    assert changed(editor.model, before) == []


def step(model: torch.nn.Module) -> None:
    ids = torch.arange(3, 23)[None]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def by_hand(model: torch.nn.Module) -> None:
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 4] *= -1


def there_and_back(model: torch.nn.Module) -> None:
    model.bfloat16().float()


def another_parameter(model: torch.nn.Module) -> None:
    module = model.model.layers[1].self_attn.q_proj
    module.weight = torch.nn.Parameter(module.weight.detach() * 2)


def other_weights(model: torch.nn.Module) -> None:
    model.load_state_dict(tiny_model("llama", seed=1).state_dict())


def one_more(model: torch.nn.Module) -> None:
    model.model.register_buffer("more", torch.ones(2))


def a_setting(model: torch.nn.Module) -> None:
    model.config.rms_norm_eps = 0.5


def another_order(model: torch.nn.Module) -> None:
    first, second, third = model.model.layers
    model.model.layers = torch.nn.ModuleList([second, first, third])


CHANGES = [
    step, by_hand, there_and_back, another_parameter, other_weights, one_more, torch.nn.Module.bfloat16, a_setting,
    another_order,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_model_that_something_else_has_changed_is_refused(tmp_path: Path, change) -> None:
    editor = tiny_editor(tmp_path)
    edit = editor.edit(FACTS[:1], "memit", **QUICK)
    edit.save(tmp_path / "edit.safetensors")
    edit.undo()
    former = editor.fingerprint
    change(editor.model)
    now = weights(editor.model)
    again = Edit(edit.delta, editor._stack)
    for use in (
        lambda: editor.edit(FACTS[:1], "memit", **QUICK),
        lambda: editor.plan(FACTS[:1], "memit", **QUICK),
        lambda: editor.precompute("builtin", multiplier=1, layers=(0,)),
        lambda: editor.targets(FACTS[:1], editor.config("memit", **QUICK)),
        lambda: editor.contexts("memit"),
        lambda: editor.save_pretrained(tmp_path / "model"),
        lambda: editor.load(tmp_path / "edit.safetensors"),
        again.apply,
    ):
        with pytest.raises(WrongModel):
            use()
    assert editor.fingerprint == fingerprint(editor.model) != former
    assert changed(editor.model, now) == [] and not (tmp_path / "model").exists()
    # An editor that is made now is of the model as it is.
    assert tiny_editor(tmp_path / "new", model=editor.model, layers=None).fingerprint != former
    with pytest.raises(WrongModel, match="make a new Editor"):
        editor.contexts("memit")


def test_the_same_weights_elsewhere_are_the_same_model(tmp_path: Path) -> None:
    editor = tiny_editor(tmp_path)
    former = editor.fingerprint
    state = weights(editor.model)
    editor.model.load_state_dict(state)  # other versions, the same content
    for parameter in editor.model.parameters():
        parameter.data = parameter.data.clone()  # other memory
    edit = editor.edit(FACTS[:1], "memit", **QUICK)
    assert edit.delta.model == editor.fingerprint == former
    editor.model.load_state_dict(weights(editor.model))
    edit.undo()
    assert changed(editor.model, state) == []


def test_another_change_under_an_edit_is_refused_for_the_next(editor: Editor) -> None:
    edit = random_edit(editor, 0).apply()
    other = editor.model.model.layers[2].mlp.up_proj.weight
    with torch.no_grad():
        other[0, 0] *= -1
    with pytest.raises(WrongModel, match=r"layers\.2\.mlp\.up_proj\.weight was changed by"):
        random_edit(editor, 1).apply()
    with pytest.raises(WrongModel):
        _ = editor.fingerprint
    edit.undo()  # of another weight
    with torch.no_grad():
        other[0, 0] *= -1
    random_edit(editor, 1).apply().undo()


def test_editors_of_one_model_share_its_edits(tmp_path: Path) -> None:
    first = tiny_editor(tmp_path)
    before = weights(first.model)
    edit = random_edit(first, 0).apply()
    second = Editor(first.model, first.tokenizer, cache_dir=tmp_path)
    assert second.edits == (edit,) and second.fingerprint == first.fingerprint
    with pytest.raises(WrongModel, match="undo them first"):
        second.precompute("builtin", multiplier=1, layers=(0,))
    top = random_edit(second, 0, seed=1).apply()
    assert first.edits == (edit, top)
    with pytest.raises(BadUndo):
        edit.undo()
    top.undo()
    edit.undo()
    assert changed(first.model, before) == []


def test_an_edited_model_that_was_changed_is_a_new_one_to_a_new_editor(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = tiny_editor(tmp_path)
    edit = random_edit(first, 0).apply()
    by_hand(first.model)
    second = Editor(first.model, first.tokenizer, cache_dir=tmp_path)
    assert "were in the weights; they count as part of the model now" in caplog.text
    assert second.edits == () and second.fingerprint == fingerprint(first.model)
    assert edit.applied  # on the first one's record, which says so
    with pytest.raises(WrongModel):
        first.contexts("memit")


def test_a_stack_does_not_keep_its_model() -> None:
    model = tiny_model("llama")
    stack = EditStack.of(model)
    edit = Edit(Delta({DOWN.format(0): (torch.ones(32, 1), torch.ones(64, 1))}), stack).apply()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    with pytest.raises(WrongModel, match="model is gone"):
        edit.undo()


class _Interrupt(KeyboardInterrupt):
    pass


class interrupted:
    """Raise at the n-th line of fastmemit's own code that runs inside, and at no other.

    CPython looks for signals when a function begins or a generator goes on, after a call and at a jump backwards. Three
    events of a trace are where none is ever handled: the line of a with statement, visited again on the way out behind
    what protects its body; the line of a try, which is protected by nothing; and the call of a generator that goes on,
    before it is in the block where it stopped. And `Edit.__exit__` alone hands on to contextlib's, as any context that
    is a generator does: no code can stand before the call of it.
    """

    def __init__(self, at: int) -> None:
        self.left = at

    def _trace(self, frame, event, _arg):
        if frame.f_code is Edit.__exit__.__code__:
            return None
        if "fastmemit" not in frame.f_code.co_filename or "/tests/" in frame.f_code.co_filename:
            return None
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip()
        generator = event == "call" and frame.f_code.co_flags & inspect.CO_GENERATOR
        if event in ("call", "line") and not generator and not line.startswith(("with ", "try:")):
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise _Interrupt
        return self._trace

    def __enter__(self) -> interrupted:
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)


def lines_of(work) -> int:
    with interrupted(-1) as counting:
        work()
    return -counting.left - 1


def test_an_interrupt_at_any_line_of_apply_and_undo_leaves_what_is_on_record(editor: Editor) -> None:
    below = random_edit(editor, 0, seed=1).apply()
    before = weights(editor.model)
    edit = random_edit(editor, 0, 1, seed=2)
    edit.apply()
    after = weights(editor.model)
    edit.undo()

    def work() -> None:
        edit.apply()
        edit.undo()

    tally = {True: 0, False: 0}
    lines = lines_of(work)
    assert lines > 100
    for at in range(1, lines + 1):
        with pytest.raises(_Interrupt), interrupted(at):
            work()
        tally[edit.applied] += 1
        assert changed(editor.model, after if edit.applied else before) == [], at
        if edit.applied:
            edit.undo()
        assert changed(editor.model, before) == [], at
        assert editor.edits == (below,)
    assert tally[True] > 20 and tally[False] > 50
    below.undo()


def test_an_interrupt_at_any_line_of_a_block_leaves_what_is_on_record(editor: Editor) -> None:
    before = weights(editor.model)
    edit = random_edit(editor, 0)
    edit.apply()
    after = weights(editor.model)
    edit.undo()

    def work() -> None:
        with edit:
            pass

    for at in range(1, lines_of(work) + 1):
        with pytest.raises(_Interrupt), interrupted(at):
            work()
        assert changed(editor.model, after if edit.applied else before) == [], at
        if edit.applied:
            edit.undo()
        assert editor._stack.lock.acquire(blocking=False)
        editor._stack.lock.release()
        assert not editor._stack.lock._is_owned(), at


def test_an_interrupt_while_trial_weights_are_written_gives_them_back(editor: Editor) -> None:
    editor.plan(FACTS[:1], "memit", **QUICK)  # with what is stored, the rest is short
    before = weights(editor.model)

    def work() -> None:
        trial = editor._stack.trial([DOWN.format(0), DOWN.format(1)])
        with trial, trial, torch.no_grad():
            for layer in (0, 1):
                editor.model.get_parameter(DOWN.format(layer)).add_(1)

    for at in range(1, lines_of(work) + 1):
        with pytest.raises(_Interrupt), interrupted(at):
            work()
        assert changed(editor.model, before) == [], at
    lines = lines_of(lambda: editor.plan(FACTS[:1], "memit", **QUICK))
    for at in range(1, lines + 1, 41):
        with pytest.raises(_Interrupt), interrupted(at):
            editor.plan(FACTS[:1], "memit", **QUICK)
        assert changed(editor.model, before) == [], at


def test_what_a_second_interrupt_has_left_is_put_right_by_the_next_use(
    editor: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = weights(editor.model)
    edit = random_edit(editor, 0, 1)

    def stopped(*_: object) -> None:
        raise _Interrupt

    with monkeypatch.context() as patch:
        patch.setattr("fastmemit.edits.checksums", stopped)
        patch.setattr("fastmemit.edits.restore", stopped)
        with pytest.raises(_Interrupt):
            edit.apply()
    assert changed(editor.model, before) != [] and not edit.applied
    assert editor.fingerprint == editor._stack.state()
    assert changed(editor.model, before) == []
    edit.apply()
    with monkeypatch.context() as patch:
        patch.setattr("fastmemit.edits.restore", stopped)
        with pytest.raises(_Interrupt):
            edit.undo()
    editor._stack.settle()
    assert changed(editor.model, before) == [] and not edit.applied


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError, MemoryError])
def test_an_error_between_the_write_and_the_record_takes_the_write_back(
    editor: Editor, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    before = weights(editor.model)

    def failing(*_: object) -> None:
        assert changed(editor.model, before) != []
        raise error("simulated")

    monkeypatch.setattr("fastmemit.edits.checksums", failing)
    with pytest.raises(error):
        random_edit(editor, 0, 1).apply()
    assert changed(editor.model, before) == [] and editor.edits == ()


def test_threads_take_turns(editor: Editor) -> None:
    before = weights(editor.model)
    failures: list[str] = []
    interval = sys.getswitchinterval()
    end = time.monotonic() + 1.5

    def work(number: int) -> None:
        rounds = 0
        while time.monotonic() < end:
            edit = random_edit(editor, number % 2, seed=1000 * number + rounds)
            rounds += 1
            with edit:
                if editor.edits != (edit,):
                    failures.append(f"{editor.edits} in the block of {edit}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert failures == [] and editor.edits == ()
    assert changed(editor.model, before) == []


def test_a_thread_that_edits_waits_for_the_end_of_a_block(editor: Editor) -> None:
    unedited = weights(editor.model)
    edit = random_edit(editor, 0, 1)
    seen: list[object] = []

    def other() -> None:
        try:
            seen.append(editor.plan(FACTS[:1], "memit", **QUICK).delta.provenance["on_top_of"])
        except FastmemitError as error:
            seen.append(error)

    thread = threading.Thread(target=other)
    with edit:
        thread.start()
        thread.join(0.5)
        assert thread.is_alive() and seen == []
    thread.join()
    assert seen == [[]]
    assert changed(editor.model, unedited) == []
