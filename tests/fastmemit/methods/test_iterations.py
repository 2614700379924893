"""Solving again for what is left: the formulas written out, what is left by hand, and which keys count."""

from __future__ import annotations

import logging
import re
from typing import Any

import numpy as np
import pytest
import torch

from fastmemit.editor import Editor
from fastmemit.errors import BadConfig
from fastmemit.methods import CONFIGS, Draft, PreservedKeys
from fastmemit.methods.base import averaged_keys
from fastmemit.partial_forward import read_at_subject
from fastmemit.text import Contexts, subject_row
from reference import closed_form as literal
from tiny_editors import FACTS

A: dict[str, Any] = {"steps": 3, "weight": 20.0, "ridge": 0.01}
SETTINGS: dict[str, dict[str, Any]] = {
    "emmet": {**A, "layers": (1,), "lambda_e": 0.3},
    "memit": {**A, "layers": (0, 1)},
    "pmet": {**A, "layers": (0, 1)},
    "encore": {**A, "layers": (0, 1), "stop": "loss"},
    "rlsedit": {**A, "layers": (0, 1), "relative_ridge": 0.2},
    "alphaedit": {"steps": 3, "layers": (0, 1), "null_relative": 0.5, "l2": 2.0},
}


def block_output(editor: Editor) -> Any:
    rows = [subject_row(editor.tokenizer, "", fact) for fact in FACTS]
    _, (output,) = read_at_subject(editor.adapter, rows, outputs=[editor.adapter.block(1)])
    return output.double()


def literal_change(editor: Editor, method: str, layer: int, K: Any, R: Any) -> Any:
    settings = SETTINGS[method]
    C = editor.store.covering([layer]).second_moment(editor.adapter.projection_name(layer)).double().numpy()
    if method == "alphaedit":
        return literal.alphaedit(literal.null_projector(C, 0.5 * C.diagonal().mean()), K, R, settings["l2"])
    ridge = settings["ridge"] + settings.get("relative_ridge", 0.0) * settings["weight"] * C.diagonal().mean()
    base = literal.regularised(C, settings["weight"], ridge)
    return literal.emmet(base, K, R, settings["lambda_e"]) if method == "emmet" else literal.memit(base, K, R)


@pytest.mark.parametrize("method", SETTINGS)
def test_two_iterations_are_the_formula_twice_on_the_model_as_it_is_then(editor: Editor, method: str) -> None:
    config = editor.config(method, **SETTINGS[method])
    weights = {layer: editor.adapter.weight(layer) for layer in config.layers}
    before = {layer: weight.clone() for layer, weight in weights.items()}
    goal = torch.stack([target.vector for target in editor.targets(FACTS, config)]).double()
    work, wanted = Draft(editor.workspace, config), dict.fromkeys(config.layers, 0.0)
    for _ in range(2):
        for position, layer in enumerate(config.layers):
            K = averaged_keys(work.context_outputs(layer, FACTS).keys).numpy()
            part = literal.spread_share("sqrt" if method == "pmet" else "linear", len(config.layers) - position)
            change = literal_change(editor, method, layer, K, ((goal - block_output(editor)) * part).T.numpy())
            wanted[layer] += change
            with torch.no_grad():
                weights[layer].copy_(weights[layer].double() + torch.tensor(change))
    with torch.no_grad():
        for layer, weight in weights.items():
            weight.copy_(before[layer])
    delta = editor.plan(FACTS, method, iterations=2, **SETTINGS[method]).delta
    once = editor.plan(FACTS, method, **SETTINGS[method]).delta
    assert delta.provenance["settings"]["iterations"] == 2 and once.provenance["settings"]["iterations"] == 1
    for layer in config.layers:
        left, right = delta.factors[editor.adapter.weight_name(layer)]
        found = (left @ right.T).double().numpy()
        assert abs(found - wanted[layer]).max() <= 1e-4 * abs(wanted[layer]).max()
        assert left.shape[1] == 2 * len(FACTS)
        left, right = once.factors[editor.adapter.weight_name(layer)]
        assert abs((left @ right.T).double().numpy() - found).max() > 1e-3 * abs(found).max()


def test_what_is_left_by_hand(
    editor: Editor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of one context and one layer ``R (l (S + l I)^-1)^n`` with ``S = K^T A^-1 K``, by EMMET; by MEMIT l is 1."""
    monkeypatch.setattr(Contexts, "of", lambda *_, **__: ("",))
    for method, l in (("emmet", 0.3), ("memit", 1.0)):  # noqa: E741
        settings = {**A, "layers": (1,), **({"lambda_e": l} if method == "emmet" else {})}
        config = editor.config(method, iterations=3, **settings)
        goal = torch.stack([target.vector for target in editor.targets(FACTS, config)]).double()
        R = (goal - block_output(editor)).T.numpy()
        K = Draft(editor.workspace, config).context_outputs(1, FACTS).keys[:, 0].T.numpy()
        C = editor.store.covering([1]).second_moment(editor.adapter.projection_name(1)).double().numpy()
        S = K.T @ np.linalg.inv(literal.regularised(C, A["weight"], A["ridge"])) @ K
        once = l * np.linalg.inv(S + l * np.eye(len(FACTS)))
        caplog.clear()
        with caplog.at_level(logging.INFO, "fastmemit"), editor.edit(FACTS, config, verify=False):
            left = (goal - block_output(editor)).T.numpy()
        wanted = R @ once @ once @ once
        assert np.linalg.norm(left - wanted) <= 1e-4 * np.linalg.norm(R)
        said = re.findall(r"iteration (\d) of 3 begins with ([\d.]+) % of the residual", caplog.text)
        shares = [
            100 * np.linalg.norm(R @ once) / np.linalg.norm(R),
            100 * np.linalg.norm(R @ once @ once) / np.linalg.norm(R),
        ]
        assert [number for number, _ in said] == ["2", "3"]
        assert [float(share) for _, share in said] == pytest.approx(shares, abs=0.06)


def test_a_batch_is_not_preserved_against_itself_and_its_last_keys_are_on_record(editor: Editor) -> None:
    preserved, settings = PreservedKeys(), {**SETTINGS["memit"], "iterations": 2}
    alone = editor.plan(FACTS, "memit", **settings).delta
    edit = editor.edit(FACTS, "memit", preserved=preserved, **settings)
    for name, (left, right) in alone.factors.items():
        torch.testing.assert_close(edit.delta.factors[name][0] @ edit.delta.factors[name][1].T, left @ right.T)
        assert [k.shape for k in preserved.blocks(name)] == [(64, len(FACTS))]
    # The keys of the upper layer as they are once the lower one is written: nearly those of the edited model.
    config = editor.config("memit", **SETTINGS["memit"])
    now = averaged_keys(Draft(editor.workspace, config).context_outputs(1, FACTS).keys)
    (kept,) = preserved.blocks(editor.adapter.weight_name(1))
    edit.undo()
    before = averaged_keys(Draft(editor.workspace, config).context_outputs(1, FACTS).keys)
    assert (kept - now).norm() <= 1e-4 * now.norm()
    assert (kept - before).norm() > 1e-3 * now.norm()  # and not those of the unedited one


def test_iterations_of_what_is_no_number_and_of_other_methods(editor: Editor) -> None:
    for value in (0, -1, 2.0, True):
        with pytest.raises(BadConfig, match="iterations must be a whole number above 0 but is"):
            editor.config("memit", iterations=value)
    assert {method for method, cls in CONFIGS.items() if "iterations" in cls.settings()} == set(SETTINGS)
    with pytest.raises(BadConfig, match="iterations is a setting of emmet, memit, pmet, encore, rlsedit and alphaedit"):
        editor.config("rome", iterations=2)
