"""The keys of earlier edits in A: the literal formula, and in and out with the edits themselves."""

from __future__ import annotations

import gc
import weakref
from typing import Any, cast

import pytest
import torch

from fastcov import factorize
from fastmemit.editor import Editor
from fastmemit.errors import WrongModel
from fastmemit.methods import REGISTRY, Draft, PreservedKeys
from fastmemit.methods.base import Method, averaged_keys
from reference import closed_form as literal
from tiny_editors import FACTS, tiny_editor
from tiny_models import D, tiny_model

LAYERS = (0, 1, 2)
A: dict[str, Any] = {"steps": 2, "weight": 5.0, "ridge": 0.01}
SETTINGS: dict[str, dict[str, Any]] = {
    "memit": {**A, "layers": (0, 1)},
    "emmet": {**A, "layers": (1,), "lambda_e": 0.1},
    "rome": {**A, "layers": (1,)},
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Editor:
    editor = tiny_editor(tmp_path_factory.mktemp("editor"), layers=LAYERS)
    for method in SETTINGS:
        editor.contexts(method)
    return editor


def literal_A(editor: Editor, layer: int, blocks: Any) -> Any:
    statistics = editor.store.covering([layer])
    moment = statistics.second_moment(editor.adapter.projection_name(layer)).double()
    base = literal.regularised(moment.numpy(), A["weight"], A["ridge"])
    return literal.preserving(base, [block.numpy() for block in blocks])


@pytest.mark.parametrize("method", SETTINGS)
def test_a_later_batch_equals_the_formula_with_the_earlier_keys(
    editor: Editor, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and residuals that the closed form was given, put into the literal float64 formula."""
    from fastcov import closed_form

    settings, preserved = SETTINGS[method], PreservedKeys()
    given: list[tuple[Any, Any]] = []
    real = getattr(closed_form, method)

    def spy(factor: Any, K: Any, R: Any, *args: Any, **kwargs: Any) -> Any:
        given.append((K.reshape(64, -1).numpy(), R.reshape(32, -1).numpy()))
        return real(factor, K, R, *args, **kwargs)

    monkeypatch.setattr(closed_form, method, spy)
    first = editor.edit(FACTS[:1], method, preserved=preserved, **settings)
    earlier = {layer: preserved.blocks(editor.adapter.weight_name(layer)) for layer in settings["layers"]}
    assert [len(blocks) for blocks in earlier.values()] == [1] * len(earlier)
    assert all((earlier[i][0].numpy() == k).all() for i, (k, _) in zip(earlier, given, strict=True))
    given.clear()
    second = editor.edit(FACTS[1:], method, preserved=preserved, **settings)
    for layer in settings["layers"]:
        (left, right) = second.delta.factors[editor.adapter.weight_name(layer)]
        change = (left @ right.T).double().numpy()
        if method == "rome":  # two facts, the second on top of the first's key as well
            (k, r), (k2, r2) = given
            wanted = literal.rome(literal_A(editor, layer, earlier[layer]), k[:, 0], r[:, 0])
            total = literal_A(editor, layer, (*earlier[layer], torch.tensor(k)))
            wanted = wanted + literal.rome(total, k2[:, 0], r2[:, 0])
        else:
            k, r = given[settings["layers"].index(layer)]
            total = literal_A(editor, layer, earlier[layer])
            more = (0.1,) if method == "emmet" else ()
            wanted = getattr(literal, method)(total, k, r, *more)
        assert abs(change - wanted).max() <= 1e-5 * abs(wanted).max()
    # The earlier key is moved less than where nothing preserves it.
    second.undo()
    plain = editor.edit(FACTS[1:], method, **settings)
    name = editor.adapter.weight_name(settings["layers"][0])
    key = earlier[settings["layers"][0]][0].float()
    moved = [
        float((left @ (right.T @ key)).norm())
        for left, right in (second.delta.factors[name], plain.delta.factors[name])
    ]
    assert moved[0] < moved[1]
    assert second.delta.provenance["preserved"] == [first.delta.digest()]
    assert "preserved" not in plain.delta.provenance


@pytest.mark.parametrize("method", SETTINGS)
def test_the_first_edit_is_the_same_as_without(editor: Editor, method: str) -> None:
    facts = FACTS[:1] if method == "rome" else FACTS
    one = editor.plan(facts, method, preserved=PreservedKeys(), **SETTINGS[method]).delta
    assert one.digest() == editor.plan(facts, method, **SETTINGS[method]).delta.digest()


def test_rome_of_three_facts_is_three_edits(editor: Editor) -> None:
    settings, one, other = SETTINGS["rome"], PreservedKeys(), PreservedKeys()
    together = editor.edit(FACTS, "rome", preserved=one, **settings)
    weight = editor.adapter.weight(1).clone()
    assert len(one) == 3
    together.undo()
    for fact in FACTS:
        editor.edit([fact], "rome", preserved=other, **settings)
    assert len(other) == 3
    assert (editor.adapter.weight(1) - weight).norm() <= 1e-4 * weight.norm()


def test_keys_count_while_their_edit_is_in_the_weights(editor: Editor) -> None:
    preserved = PreservedKeys()
    settings = SETTINGS["memit"]
    first = editor.edit(FACTS[:1], "memit", preserved=preserved, **settings)
    second = editor.edit(FACTS[1:], "memit", preserved=preserved, **settings)
    assert preserved.edits == (first, second) and len(preserved) == 3
    names = [editor.adapter.weight_name(layer) for layer in LAYERS]
    assert [k.shape for k in preserved.blocks(names[1])] == [(64, 1), (64, 2)]
    assert preserved.blocks(names[2]) == ()
    second.undo()
    assert preserved.edits == (first,) and len(preserved) == 1
    second.apply()
    assert len(preserved) == 3
    second.undo()
    first.undo()
    assert len(preserved) == 0 and preserved.blocks(names[0]) == ()
    # What is undone and forgotten is not held for ever.
    del first, second
    gc.collect()
    assert len(preserved._keys) == 0


def test_nothing_joins_where_nothing_was_applied(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    preserved = PreservedKeys()
    editor.plan(FACTS, "memit", preserved=preserved, **SETTINGS["memit"])
    assert len(preserved._keys) == 0

    def fails(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(REGISTRY, "memit", Method(fails))
    with pytest.raises(KeyboardInterrupt):
        editor.edit(FACTS, "memit", preserved=preserved, **SETTINGS["memit"])
    assert len(preserved._keys) == 0


def test_keys_of_another_editor_are_refused(editor: Editor, tmp_path: Any) -> None:
    other, preserved = tiny_editor(tmp_path, layers=(0, 1)), PreservedKeys()
    edit = other.edit(FACTS[:1], "memit", preserved=preserved, **SETTINGS["memit"])
    with pytest.raises(WrongModel, match="belongs to another editor"):
        editor.plan(FACTS[1:], "memit", preserved=preserved, **SETTINGS["memit"])
    edit.undo()
    editor.plan(FACTS[1:], "memit", preserved=preserved, **SETTINGS["memit"])


def test_keys_of_another_projection_do_not_count(tmp_path: Any) -> None:
    """Two editors of one model, whose keys are of one width."""
    model = tiny_model("llama", intermediate_size=D)
    one = tiny_editor(tmp_path, model=model, layers=(0, 1))
    other = tiny_editor(tmp_path, model=model, layers=(0, 1), module="model.layers.{}.self_attn.o_proj")
    preserved = PreservedKeys()
    other.contexts("memit")
    one.edit(FACTS[:1], "memit", preserved=preserved, **SETTINGS["memit"])
    assert len(preserved) == 1
    found, alone = (
        other.plan(FACTS[1:], "memit", preserved=each, **SETTINGS["memit"]).delta
        for each in (preserved, PreservedKeys())
    )
    for name, (left, right) in alone.factors.items():
        torch.testing.assert_close(found.factors[name][0] @ found.factors[name][1].T, left @ right.T)


def test_a_factor_is_updated_by_what_is_new_and_made_again_for_another_A(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastmemit.methods import base as module

    widths: list[int] = []
    real = module.updated

    def spy(factor: Any, P: Any) -> Any:
        widths.append(P.shape[1])
        return real(factor, P)

    class Applied:
        applied = True

    monkeypatch.setattr(module, "updated", spy)
    preserved, base = PreservedKeys(), factorize(torch.eye(6).double())
    one, other = cast("Any", Applied()), cast("Any", Applied())  # all that is asked of an edit here
    blocks = [torch.randn(6, n).double() for n in (2, 1, 3)]
    assert preserved.factor("weight", base) is base and widths == []
    assert preserved._held == {}  # without keys the factor belongs to its cache alone
    preserved.add(one, {"weight": blocks[:1]})
    preserved.factor("weight", base)
    preserved.add(other, {"weight": blocks[1:2]})
    factor = preserved.factor("weight", base)
    assert preserved.factor("weight", base).whitened is factor.whitened and widths == [2, 1]
    # A factor that was dropped and made again is the same one, and the old one is not held for its keys.
    again, old = factorize(torch.eye(6).double()), weakref.ref(base)
    del base, factor
    gc.collect()
    assert old() is None
    base = again
    preserved.factor("weight", base)
    assert widths == [2, 1]
    preserved.factor("weight", base, [blocks[2]])
    assert widths == [2, 1, 3]
    again = factorize(2 * torch.eye(6).double())
    found = preserved.factor("weight", again)
    assert widths == [2, 1, 3, 3]
    joined = torch.cat(blocks[:2], 1)
    wanted = torch.linalg.inv(2 * torch.eye(6).double() + joined @ joined.T)
    torch.testing.assert_close(found.solve(torch.eye(6).double()), wanted)
    one.applied = False
    found = preserved.factor("weight", again)
    assert widths == [2, 1, 3, 3, 1]
    torch.testing.assert_close(
        found.solve(blocks[1]), torch.linalg.solve(2 * torch.eye(6).double() + blocks[1] @ blocks[1].T, blocks[1])
    )


def test_averaged_keys_are_what_is_kept(editor: Editor) -> None:
    preserved = PreservedKeys()
    work = Draft(editor.workspace, editor.config("emmet", **SETTINGS["emmet"]))
    keys = averaged_keys(work.context_outputs(1, FACTS).keys)
    editor.edit(FACTS, "emmet", preserved=preserved, **SETTINGS["emmet"])
    (block,) = preserved.blocks(editor.adapter.weight_name(1))
    assert block.dtype == torch.float64 and (block - keys).norm() <= 1e-6 * keys.norm()
