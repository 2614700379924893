"""UltraEdit against its formulas written out, and what it is normalised by: applied, undone, saved and loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastcov import closed_form
from fastmemit.answers import judge_answers
from fastmemit.delta import Delta
from fastmemit.editor import Editor
from fastmemit.errors import BadConfig, DamagedFile, FastmemitError, UnknownArchitecture
from fastmemit.methods import UltraEditConfig, ultraedit
from fastmemit.methods.ultraedit import Moments, read_features
from reference import literal_ultraedit as literal
from tiny_editors import FACTS, tiny_corpus, tiny_editor

SETTINGS: dict[str, Any] = {"layers": (0, 1), "eta": 1e-3}
WIDE: dict[str, Any] = {**SETTINGS, "tokens": "all"}


def editor_of(folder: Path, architecture: str = "llama", **more: Any) -> Editor:
    return tiny_editor(folder, architecture, layers=None, **more)  # no statistics


@pytest.fixture
def editor(tmp_path: Path) -> Editor:
    return editor_of(tmp_path)


def literal_features(editor: Editor, facts: Any, tokens: str) -> dict[int, Any]:
    """layer -> keys and gradients of the model as it is, in float64."""
    model = copy.deepcopy(editor.model).double()
    twin = Editor(model, editor.tokenizer, cache_dir=editor.workspace.stored_targets._folder)
    modules = [twin.adapter.projection(layer) for layer in (0, 1)]
    read = [literal.features(model, editor.tokenizer, modules, fact, tokens) for fact in facts]
    return {n: tuple(np.concatenate([each[n][side] for each in read]) for side in (0, 1)) for n in (0, 1)}


def change_of(editor: Editor, delta: Delta, layer: int) -> torch.Tensor:
    left, right = delta.factors[editor.adapter.weight_name(layer)]
    change = left.double() @ right.double().T
    return change.T if editor.adapter.weight_is_transposed(layer) else change


@pytest.mark.parametrize("tokens", ["answer", "all"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gptj", "gemma3", "opt"])
def test_two_edits_equal_the_formulas_written_out(tmp_path: Path, architecture: str, tokens: str) -> None:
    """The second one is read from the edited model, and normalised by the tokens of both."""
    editor = editor_of(tmp_path, architecture)
    settings = {**SETTINGS, "tokens": tokens}
    seen = {layer: np.empty((0, 96)) for layer in (0, 1)}
    for facts in (FACTS[:2], FACTS[2:]):
        read = literal_features(editor, facts, tokens)
        edit = editor.edit(facts, "ultraedit", verify=False, **settings)
        for layer, (H, G) in read.items():
            wanted = torch.tensor(literal.change(H, G, seen[layer], SETTINGS["eta"]))
            assert wanted.norm() > 0
            found = change_of(editor, edit.delta, layer)
            assert (found - wanted).norm() <= 2e-4 * wanted.norm()
            seen[layer] = np.concatenate([seen[layer], np.concatenate([H, G], 1)])


def test_facts_do_not_depend_on_what_they_run_beside(editor: Editor) -> None:
    config = UltraEditConfig(**WIDE)
    together = read_features(editor.adapter, editor.tokenizer, FACTS, config, 10_000)
    alone = [read_features(editor.adapter, editor.tokenizer, [fact], config, 1) for fact in FACTS]
    for layer, sides in together.items():
        for side, found in enumerate(sides):
            wanted = torch.cat([each[layer][side] for each in alone])
            assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_a_step_makes_the_answers_less_costly(editor: Editor) -> None:
    questions = [(fact.text, fact.target) for fact in FACTS]
    before = judge_answers(editor.adapter, editor.tokenizer, questions)
    with editor.plan(FACTS, "ultraedit", layers=(0, 1), eta=1e-4):
        after = judge_answers(editor.adapter, editor.tokenizer, questions)
    assert sum(answer.nll for answer in after) < sum(answer.nll for answer in before)


def test_moments_of_parts_are_those_of_the_whole() -> None:
    torch.manual_seed(0)
    whole = torch.randn(7, 3, dtype=torch.float64) * torch.tensor([1.0, 1e-9, 1e3]) + 5
    whole[:, 1] -= 5
    joined = Moments.of(whole[:3]).joined(Moments.of(whole[3:4])).joined(Moments.of(whole[4:]))
    assert joined.count == 7
    assert torch.allclose(joined.mean, whole.mean(0)) and torch.allclose(joined.squares, 6 * whole.var(0))
    assert torch.allclose(joined.normalised(whole), (whole - whole.mean(0)) / whole.std(0))
    again = Moments.read(7, joined.stored())
    assert torch.allclose(again.squares, joined.squares, rtol=1e-6)


def test_ridge_solves_for_the_fewer_of_keys_and_directions() -> None:
    torch.manual_seed(0)
    for n in (3, 40):
        H, V = torch.randn(n, 8, dtype=torch.float64), torch.randn(n, 5, dtype=torch.float64)
        wanted = torch.linalg.inv(H.T @ H + 0.5 * torch.eye(8, dtype=torch.float64)) @ H.T @ V
        assert torch.allclose(closed_form.ridge(H.T, V.T, 0.5).dense(), wanted.T)


def test_an_undo_takes_an_edits_share_out_and_applying_it_brings_it_back(editor: Editor) -> None:
    alone = editor.plan(FACTS[2:], "ultraedit", **WIDE).delta.digest()
    first = editor.edit(FACTS[:2], "ultraedit", verify=False, **WIDE)
    upon = editor.plan(FACTS[2:], "ultraedit", **WIDE).delta.digest()
    first.undo()
    assert editor.plan(FACTS[2:], "ultraedit", **WIDE).delta.digest() == alone != upon
    first.apply()
    assert editor.plan(FACTS[2:], "ultraedit", **WIDE).delta.digest() == upon


def test_a_saved_edit_brings_its_share_along_bit_for_bit(tmp_path: Path, editor: Editor) -> None:
    first = editor.edit(FACTS[:2], "ultraedit", verify=False, **WIDE)
    first.save(tmp_path / "first.safetensors")
    second = editor.plan(FACTS[2:], "ultraedit", **WIDE).delta
    other = editor_of(tmp_path / "other")
    loaded = other.load(tmp_path / "first.safetensors").apply()
    assert loaded.delta.digest() == first.delta.digest()
    assert other.plan(FACTS[2:], "ultraedit", **WIDE).delta.digest() == second.digest()
    assert second.provenance["on_top_of"] == [first.delta.digest()]


def test_moments_that_do_not_fit_are_refused(tmp_path: Path, editor: Editor) -> None:
    delta = editor.plan(FACTS, "ultraedit", **WIDE).delta
    name = next(iter(delta.factors))
    for wrong in (delta.moments[name][:, 1:], delta.moments[name].double(), delta.moments[name] * float("nan")):
        Delta(delta.factors, delta.provenance, {**delta.moments, name: wrong}).save(tmp_path / "edit")
        with pytest.raises(DamagedFile, match=r"holds moments of .* that do not fit its factors"):
            Delta.load(tmp_path / "edit")
    other = Delta(delta.factors, delta.provenance, {**delta.moments, name: delta.moments[name] + 1})
    assert other.digest() != delta.digest() != Delta(delta.factors, delta.provenance).digest()


def test_one_token_alone_changes_nothing_which_is_said_before_it_is_read(
    editor: Editor, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fact = next(fact for fact in FACTS if len(read_one(editor, fact)) == 1)
    other = next(other for other in FACTS if other != fact)
    said: list[str] = []
    monkeypatch.setattr(
        ultraedit, "read_features", lambda *given: said.extend(caplog.messages) or read_features(*given)
    )
    delta = editor.plan(fact, "ultraedit", **SETTINGS).delta
    assert not written(delta)
    (sentence,) = said  # once, whatever the number of layers
    assert sentence.startswith(f"The answer {fact.target!r} of {fact.text!r} is one token, which has no deviation")
    assert sentence.endswith("pass tokens='all' (--set tokens=all), or write several facts together.")
    caplog.clear()
    for facts, settings in ((fact, WIDE), ([fact, other], SETTINGS)):
        assert written(editor.plan(facts, "ultraedit", **settings).delta)
    first = editor.edit(fact, "ultraedit", verify=False, **WIDE)
    assert written(editor.plan(fact, "ultraedit", **SETTINGS).delta)
    first.undo()
    assert caplog.messages == [], "where something is written"


def written(delta: Delta) -> bool:
    return any(bool((left @ right.T).any()) for left, right in delta.factors.values())


def read_one(editor: Editor, fact: Any) -> torch.Tensor:
    config = UltraEditConfig(**SETTINGS)
    return read_features(editor.adapter, editor.tokenizer, [fact], config, 100)[0][0]


def test_parameters_get_no_gradient_and_stay_as_they_are(editor: Editor) -> None:
    before = {name: (p.clone(), p.requires_grad) for name, p in editor.model.named_parameters()}
    editor.plan(FACTS, "ultraedit", **WIDE)
    for name, parameter in editor.model.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.requires_grad == before[name][1]
        assert parameter.grad is None


def test_layers_that_do_not_reach_the_logits_are_refused(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = "What the projection of layer {} of LlamaForCausalLM puts out does not reach the logits"
    with (
        editor.adapter.lm_head.register_forward_pre_hook(lambda _, args: (args[0].detach(),)),
        pytest.raises(UnknownArchitecture, match=refused.format(0)),
    ):
        editor.plan(FACTS, "ultraedit", **SETTINGS)
    with (
        editor.adapter.projection(1).register_forward_hook(lambda _, args, out: out * 0 + out.detach()),
        pytest.raises(UnknownArchitecture, match=refused.format(2)),
    ):
        monkeypatch.setattr(editor.adapter.block(2).mlp, "forward", lambda hidden: hidden)
        editor.plan(FACTS, "ultraedit", layers=(1, 2), eta=1e-3)


def test_a_loss_that_is_not_finite_names_its_fact(editor: Editor) -> None:
    with torch.no_grad():
        editor.adapter.lm_head.weight.mul_(float("inf"))
    with pytest.raises(FastmemitError, match="The loss of 'Eiffel Tower is located in the city of' is nan"):
        read_features(editor.adapter, editor.tokenizer, FACTS[:1], UltraEditConfig(**SETTINGS), 100)


def test_its_layers_ask_for_no_statistics(editor: Editor) -> None:
    with pytest.raises(BadConfig, match="ultraedit with these settings needs no statistics; edit at once"):
        editor.precompute(tiny_corpus(), multiplier=1, method="ultraedit")
    assert editor.config("ultraedit").layers == (0, 1)  # but the last
    found = editor.precompute(tiny_corpus(), multiplier=1, method="emmet")
    assert len(found.paths) == 1
    assert editor.store.prepare(editor.config("ultraedit")) == {}


def test_it_has_no_target_vectors_and_no_settings_of_them(editor: Editor) -> None:
    assert editor.targets(FACTS, "ultraedit") == []
    assert editor.config("ultraedit").targets() is None
    with pytest.raises(BadConfig, match=r"clamp is a setting of rome, emmet, .*; ultraedit has layers, eta, tokens"):
        editor.config("ultraedit", clamp=1.0)
    with pytest.raises(BadConfig, match="eta must be a finite number above 0 but is 0"):
        editor.config("ultraedit", eta=0.0)
