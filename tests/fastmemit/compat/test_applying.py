"""The other codebases' functions edit as the editor does, and give back what was there."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastcov
from fastmemit import compat
from fastmemit.compat import drop_in
from fastmemit.errors import BadConfig, BadLayer, BadRequest
from fastmemit.methods import MemitConfig, RomeConfig
from fastmemit.methods.config import SMALL_BUDGET_RIDGE
from tiny_editors import FACTS, tiny_editor
from tiny_models import tiny_model, tiny_tokenizer

APPLY = {"rome": compat.apply_rome_to_model, "emmet": compat.apply_emmet_to_model, "memit": compat.apply_memit_to_model}
MEMIT_STYLE = [
    {"case_id": i, "prompt": f.prompt, "subject": f.subject, "target_new": {"str": f.target_new}}
    for i, f in enumerate(FACTS[:2])
]


def hparams(method: str, **changed: Any) -> SimpleNamespace:
    """Hyper-parameters as an object, as the ROME family has them."""
    fields = {
        "layers": [0, 1] if method == "memit" else [1],
        "fact_token": "subject_last",
        "v_num_grad_steps": 4,
        "v_lr": 0.4,
        "v_loss_layer": 2,
        "v_weight_decay": 0.3,
        "clamp_norm_factor": 2,
        "kl_factor": 0.05,
        "mom2_adjustment": True,
        "rewrite_module_tmp": "model.layers.{}.mlp.down_proj",
        "layer_module_tmp": "model.layers.{}",
        "mom2_dataset": "wikipedia",
        "mom2_n_samples": 100000,
        "mom2_dtype": "float32",
    }
    if method != "rome":
        fields["mom2_update_weight"] = 50
    if method == "emmet":
        fields.update(emmet_lambda=0.2, update_norm_lambda=0.01)
    return SimpleNamespace(**{**fields, **changed})


def settings(method: str) -> dict[str, Any]:
    """The same in our words, by hand."""
    values: dict[str, Any] = {
        "layers": (0, 1) if method == "memit" else (1,),
        "steps": 4, "v_lr": 0.4, "weight_decay": 0.3, "clamp": 2.0, "kl_factor": 0.05,
        "scale": "published",
    }  # fmt: skip
    if method != "rome":
        values["weight"] = 50.0
    if method == "emmet":
        values.update(lambda_e=0.2, ridge=0.01)
    return values


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize("method", APPLY)
def test_it_is_the_editors_edit_bit_for_bit(method: str, model: Any, tok: Any, tmp_path: Path) -> None:
    before = state(model)
    edited, weights = APPLY[method](model, tok, MEMIT_STYLE, hparams(method))
    assert edited is model and weights == {}
    editor = tiny_editor(tmp_path / "own")
    editor.edit(FACTS[:2], method, **settings(method))
    assert equal(state(model), state(editor.model)) and not equal(state(model), before)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_what_it_returns_gives_the_bits_back(architecture: str, tok: Any) -> None:
    model = tiny_model(architecture)
    module = {"gpt2": "transformer.h.{}.mlp.c_proj"}.get(architecture)
    theirs = hparams("memit", **({} if module is None else {"rewrite_module_tmp": module}))
    before = state(model)
    _, weights = APPLY["memit"](model, tok, MEMIT_STYLE, theirs, return_orig_weights=True)
    assert list(weights) == [theirs.rewrite_module_tmp.format(i) + ".weight" for i in (0, 1)]
    after = state(model)
    for name, weight in weights.items():
        assert not weight.requires_grad and weight.device == model.device
        assert torch.equal(weight, before[name]) and not torch.equal(weight, after[name])
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_parameter(name)[...] = weight
    assert equal(state(model), before)
    # And then the same edit is the same again.
    _, kept = APPLY["memit"](model, tok, MEMIT_STYLE, theirs, keep_original_weight=True)
    assert equal(state(model), after) and kept.keys() == weights.keys()


def test_a_copy_is_edited_and_the_model_is_not(model: Any, tok: Any) -> None:
    before = state(model)
    edited, weights = APPLY["memit"](model, tok, MEMIT_STYLE, hparams("memit"), copy=True, return_orig_weights=True)
    assert edited is not model and equal(state(model), before)
    APPLY["memit"](model, tok, MEMIT_STYLE, hparams("memit"))
    assert equal(state(model), state(edited))
    assert all(torch.equal(weight, before[name]) for name, weight in weights.items())


def test_the_three_spellings_give_the_same_edit(tok: Any) -> None:
    easyedit = [
        {"prompt": f.text, "subject": f.subject, "target_new": f.target_new, "ground_truth": "x"} for f in FACTS[:2]
    ]
    fastedit = [{"prompt": f.prompt, "subject": f.subject, "target": f.target_new} for f in FACTS[:2]]
    found = []
    for requests in (MEMIT_STYLE, easyedit, fastedit, list(FACTS[:2])):
        model = tiny_model("llama")
        APPLY["memit"](model, tok, requests, hparams("memit"))
        found.append(state(model))
    assert all(equal(found[0], other) for other in found[1:])


def test_one_request_need_not_be_a_list(tok: Any) -> None:
    one, two = tiny_model("llama"), tiny_model("llama")
    APPLY["rome"](one, tok, MEMIT_STYLE[0], hparams("rome"))
    APPLY["rome"](two, tok, MEMIT_STYLE[:1], hparams("rome"))
    assert equal(state(one), state(two))


def test_settings_of_ours_are_taken_as_they_are(model: Any, tok: Any) -> None:
    config = RomeConfig(keys="original", **settings("rome"))
    APPLY["rome"](model, tok, MEMIT_STYLE[:1], config)
    other = tiny_model("llama")
    APPLY["rome"](other, tok, MEMIT_STYLE[:1], dataclasses.replace(config, keys="mean"))
    assert not equal(state(model), state(other))
    with pytest.raises(BadConfig, match="are for rome but not for memit"):
        APPLY["memit"](model, tok, MEMIT_STYLE, config)


@pytest.mark.parametrize("hold", [lambda h: h, vars, compat.read_hparams, MemitConfig])
def test_few_keys_get_a_ridge_only_where_the_settings_are_ours(
    hold: Any, model: Any, tok: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, made = [], fastcov.regularised

    def regularised(*args: Any, **named: Any) -> torch.Tensor:
        asked.append(named["relative_ridge"])
        return made(*args, **named)

    monkeypatch.setattr(fastcov, "regularised", regularised)
    compat.configure(multiplier=1)
    ours = hold is MemitConfig
    theirs = MemitConfig(**settings("memit")) if ours else hold(hparams("memit"))
    APPLY["memit"](model, tok, MEMIT_STYLE, theirs)
    assert asked == [SMALL_BUDGET_RIDGE if ours else 0.0] * 2


def test_settings_that_say_nothing_of_contexts_leave_them(model: Any, tok: Any, tmp_path: Path) -> None:
    APPLY["memit"](model, tok, MEMIT_STYLE[:1], hparams("memit"))
    compat.configure(layers=[0, 1, 2], multiplier=4.0, allow_fewer=True)
    APPLY["memit"](model, tok, MEMIT_STYLE[1:], hparams("memit"))
    editor = tiny_editor(tmp_path / "own")
    for fact in FACTS[:2]:
        editor.edit([fact], "memit", **settings("memit"))
    assert equal(state(model), state(editor.model))  # with the unedited model's contexts


def test_an_edit_upon_an_edit_is_on_the_unedited_statistics(model: Any, tok: Any, tmp_path: Path) -> None:
    for request in MEMIT_STYLE:
        APPLY["memit"](model, tok, [request], hparams("memit"))
    editor = tiny_editor(tmp_path / "own")
    for fact in FACTS[:2]:
        editor.edit([fact], "memit", **settings("memit"))
    assert equal(state(model), state(editor.model))


def test_target_vectors_are_those_of_the_weights_as_they_are(tok: Any) -> None:
    one, other = tiny_model("llama"), tiny_model("llama")
    theirs = hparams("memit")
    # One is put back between two edits, the other is not: what is kept must not mix them up.
    _, weights = APPLY["memit"](one, tok, MEMIT_STYLE[:1], theirs, return_orig_weights=True)
    with torch.no_grad():
        for name, weight in weights.items():
            one.get_parameter(name).copy_(weight)
    APPLY["memit"](one, tok, MEMIT_STYLE[1:], theirs)
    for request in MEMIT_STYLE:
        APPLY["memit"](other, tok, [request], theirs)
    alone = tiny_model("llama")
    APPLY["memit"](alone, tok, MEMIT_STYLE[1:], theirs)
    assert equal(state(one), state(alone)) and not equal(state(other), state(one))


def test_somebody_elses_edit_lies_below(model: Any, tok: Any, tmp_path: Path) -> None:
    compat.get_cov(model, tok, "model.layers.0.mlp.down_proj", "wikipedia", 1, "float32")
    weight = model.get_parameter("model.layers.0.self_attn.o_proj.weight")
    with torch.no_grad():
        weight.add_(0.05 * torch.randn_like(weight))
    after = state(model)
    APPLY["memit"](model, tok, MEMIT_STYLE, hparams("memit"))
    changed = [n for n, tensor in state(model).items() if not torch.equal(tensor, after[n])]
    assert changed == [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]
    found = drop_in.live(model, tok, None)
    assert found.store.covering([0, 1]).provenance["model"] == found.baseline
    assert found.stack.digests()[0].startswith("unknown:")


def test_what_goes_wrong_changes_nothing(model: Any, tok: Any) -> None:
    before = state(model)
    refusals: list[tuple[type[Exception], str, Any, Any]] = [
        (BadRequest, "no request to edit", [], hparams("memit")),
        (BadRequest, "both edit", [MEMIT_STYLE[0]] * 2, hparams("memit")),
        (BadRequest, "has no target_new", [{"prompt": "{} is", "subject": "x"}], hparams("memit")),
        (BadConfig, "v_loss_layer is 31 but the last .* is 2", MEMIT_STYLE,
         hparams("memit", v_loss_layer=31)),
        (BadLayer, "Layer 7 is out of range", MEMIT_STYLE, hparams("memit", layers=[0, 7])),
        (BadConfig, "fact_token of hparams is 'last'", MEMIT_STYLE,
         hparams("memit", fact_token="last")),
    ]  # fmt: skip
    for error, match, requests, theirs in refusals:
        with pytest.raises(error, match=match):
            APPLY["memit"](model, tok, requests, theirs)
    assert equal(state(model), before)


def test_what_is_not_used_is_said(model: Any, tok: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fastmemit.compat"):
        APPLY["rome"](model, tok, MEMIT_STYLE[:1], hparams("rome", objective="x"), train_ds=None)
    assert "hparams: not used here: objective" in caplog.text
    assert "not used here: train_ds" in caplog.text
    assert "1 fact written by rome into model.layers.1.mlp.down_proj.weight" in caplog.text


def test_another_tokenizer_is_another_memory(model: Any) -> None:
    name = "model.layers.1.mlp.down_proj"
    one = compat.get_cov(model, tiny_tokenizer(), name, "wikipedia", 1, "float32")
    two = compat.get_cov(model, tiny_tokenizer("bpe_bos"), name, "wikipedia", 1, "float32")
    assert not torch.allclose(one, two, rtol=1e-3)
