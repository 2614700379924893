"""PMET, ENCORE and AlphaEdit: each against its formula written out, and what it has in common."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from fastmemit.editor import Editor
from fastmemit.errors import BadConfig, BadRequest
from fastmemit.methods import CONFIGS, METHODS, PRESERVING, Draft, PreservedKeys
from fastmemit.methods.base import averaged_keys
from fastmemit.methods.solve import share
from fastmemit.partial_forward import read_at_subject
from fastmemit.text import subject_row
from reference import closed_form as literal
from tiny_editors import FACTS, tiny_editor

LAYERS = (0, 1, 2)
A: dict[str, Any] = {"layers": LAYERS, "steps": 3, "weight": 20.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "memit": {**A, "ridge": 0.01},
    "pmet": {**A, "ridge": 0.01},
    "encore": {**A, "ridge": 3.0, "stop": "loss"},
    "rlsedit": {**A, "relative_ridge": 0.2},
    "alphaedit": {"layers": LAYERS, "steps": 3, "null_relative": 0.5, "l2": 2.0},
}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Editor:
    editor = tiny_editor(tmp_path_factory.mktemp("editor"), request.param, layers=LAYERS)
    for method in METHODS:
        editor.contexts(method)
    return editor


def moment(editor: Editor, layer: int) -> Any:
    statistics = editor.store.covering([layer])
    return statistics.second_moment(editor.adapter.projection_name(layer)).double().numpy()


def block_output(editor: Editor, facts: Any) -> Any:
    """What the last edited block puts out at the bare prompts' subjects, (B, d) float64."""
    rows = [subject_row(editor.tokenizer, "", fact) for fact in facts]
    _, (output,) = read_at_subject(editor.adapter, rows, outputs=[editor.adapter.block(2)])
    return output.double()


def literal_change(editor: Editor, method: str, layer: int, K: Any, R: Any, earlier: Any) -> Any:
    settings, C = SETTINGS[method], moment(editor, layer)
    if method == "alphaedit":
        P = literal.null_projector(C, settings["null_relative"] * C.diagonal().mean())
        assert 0 < round(P.trace()) < len(P)
        return literal.alphaedit(P, K, R, settings["l2"], earlier)
    ridge = settings.get("ridge", 0.0)
    if method == "rlsedit":
        ridge = settings["relative_ridge"] * settings["weight"] * C.diagonal().mean()
    base = literal.regularised(C, settings["weight"], ridge)
    return literal.memit(literal.preserving(base, [] if earlier is None else [earlier]), K, R)


def write_literally(editor: Editor, method: str, facts: Any, earlier: dict[int, Any]) -> Any:
    """The changes by layer and the keys, by the formulas; the weights are as before afterwards."""
    config = editor.config(method, **SETTINGS[method])
    weights = {layer: editor.adapter.weight(layer) for layer in LAYERS}
    before = {layer: weight.clone() for layer, weight in weights.items()}
    goal = torch.stack([t.vector for t in editor.targets(facts, config)]).double()
    work = Draft(editor.workspace, config, PreservedKeys())
    changes, keys = {}, {}
    for position, layer in enumerate(LAYERS):
        keys[layer] = averaged_keys(work.context_outputs(layer, facts).keys).numpy()
        spread = "sqrt" if method == "pmet" else "linear"
        part = literal.spread_share(spread, len(LAYERS) - position)
        R = ((goal - block_output(editor, facts)) * part).T.numpy()
        change = literal_change(editor, method, layer, keys[layer], R, earlier.get(layer))
        changes[layer] = torch.tensor(change)
        with torch.no_grad():
            weights[layer].copy_(weights[layer].double() + changes[layer])
    with torch.no_grad():
        for layer, weight in weights.items():
            weight.copy_(before[layer])
    return changes, keys


def change_of(editor: Editor, delta: Any, layer: int) -> Any:
    left, right = delta.factors[editor.adapter.weight_name(layer)]
    change = left.double() @ right.double().T
    return change.T if editor.adapter.weight_is_transposed(layer) else change


def assert_equal(editor: Editor, delta: Any, changes: Any) -> None:
    for layer, wanted in changes.items():
        assert (change_of(editor, delta, layer) - wanted).norm() <= 1e-4 * wanted.norm()


@pytest.mark.parametrize("method", ["pmet", "encore", "rlsedit", "alphaedit"])
def test_two_batches_equal_the_formula_written_out(editor: Editor, method: str) -> None:
    """The second one with the keys of the first where they belong to the method."""
    changes, keys = write_literally(editor, method, FACTS[:1], {})
    first = editor.edit(FACTS[:1], method, **SETTINGS[method])
    assert_equal(editor, first.delta, changes)
    counted = keys if method in PRESERVING else {}
    changes, _ = write_literally(editor, method, FACTS[1:], counted)
    second = editor.plan(FACTS[1:], method, **SETTINGS[method]).delta
    assert_equal(editor, second, changes)
    if method in PRESERVING:  # and they make a difference
        alone, _ = write_literally(editor, method, FACTS[1:], {})
        assert (alone[0] - changes[0]).norm() > 1e-3 * changes[0].norm()
        unasked = editor.plan(FACTS[1:], method, preserved=PreservedKeys(), **SETTINGS[method]).delta
        assert_equal(editor, unasked, alone)
        assert second.provenance["preserved"] == [first.delta.digest()]


@pytest.mark.parametrize("method", PRESERVING)
def test_keys_of_an_undone_edit_do_not_count(editor: Editor, method: str) -> None:
    settings = SETTINGS[method]
    alone = editor.plan(FACTS[1:], method, **settings).delta
    first = editor.edit(FACTS[:1], method, **settings)
    upon = editor.plan(FACTS[1:], method, **settings).delta.digest()
    first.undo()
    again = editor.plan(FACTS[1:], method, **settings).delta
    assert again.digest() == alone.digest() != upon
    assert again.provenance["preserved"] == []
    first.apply()
    assert editor.plan(FACTS[1:], method, **settings).delta.digest() == upon


@pytest.mark.parametrize("method", PRESERVING)
def test_earlier_edits_count_whatever_method_they_are_of(editor: Editor, method: str) -> None:
    first = editor.edit(FACTS[:1], "memit", preserved=PreservedKeys(), **SETTINGS["memit"])
    second = editor.edit(FACTS[1:2], method, **SETTINGS[method])
    third = editor.plan(FACTS[2:], method, **SETTINGS[method]).delta
    assert third.provenance["preserved"] == [first.delta.digest(), second.delta.digest()]
    plain = editor.plan(FACTS[2:], "memit", **SETTINGS["memit"]).delta
    assert "preserved" not in plain.provenance


def test_keys_are_kept_only_where_a_method_asks_for_them(editor: Editor, caplog: pytest.LogCaptureFixture) -> None:
    kept = editor.workspace.preserved
    first = editor.edit(FACTS[:1], "memit", **SETTINGS["memit"])
    assert kept.of(first) == {} and kept.edits == ()
    second = editor.edit(FACTS[1:2], "encore", **SETTINGS["encore"])
    assert "1 edit in the weights is without keys" in caplog.text
    assert "given preserved=PreservedKeys(), and encore does not preserve them" in caplog.text
    assert second.delta.provenance["preserved"] == []
    assert {len(blocks) for blocks in kept.of(second).values()} == {1} and len(kept.of(second)) == len(LAYERS)
    third = editor.edit(FACTS[2:], "memit", preserved=PreservedKeys(), **SETTINGS["memit"])
    assert kept.edits == (second, third)


def test_edits_from_files_bring_no_keys_and_that_is_said(
    editor: Editor, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    first = editor.edit(FACTS[:1], "encore", **SETTINGS["encore"])
    assert "from files" not in caplog.text
    first.save(tmp_path / "first.safetensors")
    first.undo()
    editor.load(tmp_path / "first.safetensors").apply()
    upon = editor.plan(FACTS[1:], "encore", **SETTINGS["encore"]).delta
    assert "1 edit in the weights is without keys, from files" in caplog.text
    assert upon.provenance["preserved"] == [] and len(upon.provenance["on_top_of"]) == 1


def test_an_object_of_ones_own_takes_the_place_of_the_editors(editor: Editor) -> None:
    own = PreservedKeys()
    editor.edit(FACTS[:1], "encore", **SETTINGS["encore"])
    second = editor.edit(FACTS[1:2], "encore", preserved=own, **SETTINGS["encore"])
    assert own.edits == (second,) and second.delta.provenance["preserved"] == []
    third = editor.plan(FACTS[2:], "encore", **SETTINGS["encore"]).delta
    assert len(third.provenance["preserved"]) == 2


def test_a_memit_edit_with_preserved_keys_is_encores(editor: Editor) -> None:
    """ENCORE without its ridge and its stopping rule is sequential MEMIT."""
    same = {**A, "ridge": 0.0, "stop": "loss"}
    preserved = PreservedKeys()
    one = editor.edit(FACTS[:1], "memit", preserved=preserved, **same)
    wanted = editor.plan(FACTS[1:], "memit", preserved=preserved, **same).delta
    assert editor.plan(FACTS[1:], "encore", **same).delta.digest() == wanted.digest()
    one.undo()
    plain = editor.plan(FACTS, "memit", **same).delta
    assert editor.plan(FACTS, "encore", **same).delta.digest() == plain.digest()


def test_pmet_with_one_layer_is_memit(editor: Editor) -> None:
    one = {**A, "layers": (1,)}
    plans = [editor.plan(FACTS, method, **one).delta.digest() for method in ("memit", "pmet")]
    assert plans[0] == plans[1]
    several = [editor.plan(FACTS, method, **A).delta.digest() for method in ("memit", "pmet")]
    assert several[0] != several[1]
    assert editor.plan(FACTS, "memit", spread="sqrt", **A).delta.digest() == several[1]
    assert [share("sqrt", n) for n in (4, 1)] == [2, 1] and share("linear", 4) == 4


def test_alphaedit_does_not_move_keys_outside_the_null_space(editor: Editor) -> None:
    delta = editor.plan(FACTS, "alphaedit", **SETTINGS["alphaedit"]).delta
    config = editor.config("alphaedit", **SETTINGS["alphaedit"])
    for layer in LAYERS:
        space, change = editor.store.null_space(config, layer), change_of(editor, delta, layer)
        outside = torch.eye(64, dtype=torch.float64) - space.projector()
        assert (change @ outside).norm() <= 1e-6 * change.norm()  # stored in float32


@pytest.mark.parametrize("method", ["pmet", "encore", "alphaedit"])
def test_undo_is_bit_exact(editor: Editor, method: str) -> None:
    """What the fixture checks too, here with something in between."""
    before = {layer: editor.adapter.weight(layer).clone() for layer in LAYERS}
    edit = editor.edit(FACTS, method, **SETTINGS[method])
    assert all(not torch.equal(editor.adapter.weight(i), before[i]) for i in LAYERS)
    edit.undo()
    assert all(torch.equal(editor.adapter.weight(i), before[i]) for i in LAYERS)


OTHERS: dict[str, Any] = {
    "lambda_e": 0.7, "spread": "sqrt", "l2": 9.0, "null_threshold": 0.5, "null_relative": 0.9,
    "weight": 3.0, "ridge": 0.7, "relative_ridge": 0.3, "shrinkage": "oas", "keys": "mean",
    "covariance": "identity",
    "clamp": 0.01, "steps": 3, "v_lr": 0.1, "weight_decay": 50.0, "kl_factor": 9.0,
    "early_stop": 1e9, "stop": None, "layers": (0, 2), "scale": "published", "site": "projection",
    "optimiser": "rotate", "rho": None, "eta": 2e-4, "tokens": "all", "iterations": 2,
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_each_setting_of_a_method_changes_its_results(editor: Editor, method: str) -> None:
    if editor.adapter.model.config.model_type == "gpt2":
        pytest.skip("one architecture is enough")
    own: dict[str, Any] = {"layers": (0, 1)}
    values = dict(OTHERS)
    if method in ("rome", "emmet"):
        own["layers"], values["layers"] = (1,), (0,)
    if method == "alphaedit":  # a threshold that the eigenvalues lie on both sides of
        middle = float(torch.linalg.eigvalsh(torch.tensor(moment(editor, 1)))[32])
        own["null_relative"] = 0.5
        values["null_threshold"] = middle
    elif method != "ultraedit":
        own["ridge"] = 0.01  # the scale of A cancels in ROME as long as there is none
    if method != "ultraedit":
        own["steps"] = 4
    if method == "pmet":
        values["spread"] = "linear"
    if method == "encore":
        own["stop"] = "loss"  # so that early_stop is read
    facts = FACTS[:1] if method == "rome" else FACTS
    plain = editor.plan(facts, method, **own).delta.digest()
    settings = CONFIGS[method].settings()
    assert settings.keys() <= values.keys()
    idle = set()
    # No target is ever what this model says, so that both ways to stop are alike: what stop does is
    # tested with the optimiser, and so is the step that only the other optimiser has.
    for name in settings.keys() - {"stop", "rho"}:
        changed = {**own, name: values[name]}
        if name == "null_threshold":
            del changed["null_relative"]
        if editor.plan(facts, method, **changed).delta.digest() == plain:
            idle.add(name)
    assert idle == set()


def test_encore_stops_where_the_target_is_said(editor: Editor) -> None:
    config = editor.config("encore", layers=LAYERS, steps=6, v_lr=2.0, clamp=20.0)
    assert config.stop == "most-probable" and config.ridge == 10.0
    targets = editor.targets(FACTS, config)
    assert any(len(t.losses) > 1 for t in targets)
    with pytest.raises(BadConfig, match="early_stop=1 would change nothing"):
        dataclasses.replace(config, early_stop=1)


def test_no_null_space_is_said_with_both_settings(editor: Editor) -> None:
    with pytest.raises(BadConfig, match=r"C of layer 0 .*null_threshold.*null_relative"):
        editor.edit(FACTS, "alphaedit", layers=LAYERS, steps=2, null_threshold=1e-12)
    assert editor.edits == ()


def test_a_null_space_that_is_everything_is_said(editor: Editor, caplog: pytest.LogCaptureFixture) -> None:
    editor.plan(FACTS, "alphaedit", layers=(1,), steps=2, null_relative=1e6)
    assert "64 of 64 directions of C of layer 1" in caplog.text
    assert "edits preserve nothing" in caplog.text


def test_facts_that_the_null_space_cannot_tell_apart_are_refused_without_l2(editor: Editor) -> None:
    values = torch.linalg.eigvalsh(torch.tensor(moment(editor, 1)))
    two = float(values[1] + values[2]) / 2  # two directions for three facts
    settings = {"layers": (1,), "steps": 2, "null_threshold": two}
    with pytest.raises(BadConfig, match=r"layer 1 \(2 directions\).*set l2=10"):
        editor.plan(FACTS, "alphaedit", l2=0.0, **settings)
    editor.plan(FACTS, "alphaedit", **settings)


def test_a_key_outside_the_null_space_names_its_fact(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    import fastcov

    def outside(*_: Any) -> Any:
        raise fastcov.NoNullSpace("", columns=(1,))

    monkeypatch.setattr(fastcov, "alphaedit", outside)
    with pytest.raises(BadRequest, match=r"'The capital of France is' in layer 0"):
        editor.plan(FACTS, "alphaedit", **SETTINGS["alphaedit"])
