"""EasyEdit's modules with our functions in them, driven by stand-ins that call and unpack as its own code does."""

from __future__ import annotations

import copy
import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from fastmemit import compat
from fastmemit.compat import drop_in, easyeditor
from fastmemit.errors import BadConfig
from fastmemit.request import EditRequest
from fastmemit.targets import TargetSettings, optimise
from tiny_editors import FACTS
from tiny_models import tiny_model
from tiny_tokenizers import SENTENCES

NAME = "model.layers.{}.mlp.down_proj"
#: As EasyEdit's editor makes them: a full prompt, and an answer without a space.
REQUESTS = [
    {"prompt": f.text, "subject": f.subject, "target_new": f.target_new, "ground_truth": "x", "portability": {},
     "locality": {}} for f in FACTS[:2]
]  # fmt: skip
TEMPLATES = [["{}"], [f"{SENTENCES[0]}. {{}}", f"{SENTENCES[1]}. {{}}"]]
PLACES = {
    "memit.memit_main": ("get_cov", "compute_z", "execute_memit"),
    "emmet.emmet_main": ("get_cov", "compute_z", "execute_emmet"),
    "memit_FE.memit_FE_main": ("get_cov", "compute_z"),
    "pmet.pmet_main": ("get_cov", "compute_zs"),
    "eamet.eamet_main": ("get_cov", "compute_z"),
    "core.core_main": ("get_cov", "compute_z"),
    "alphaedit.AlphaEdit_main": ("get_cov", "compute_z", "execute_AlphaEdit"),
    "SPHERE.SPHERE_main": ("get_cov", "compute_z", "execute_AlphaEdit"),
    "rome.compute_u": ("get_inv_cov",),
    "r_rome.compute_u": ("get_inv_cov",),
}


def hparams(alg_name: str, **changed: Any) -> SimpleNamespace:
    fields = {
        "alg_name": alg_name, "layers": [0, 1], "layer_selection": "all", "fact_token": "subject_last",
        "v_num_grad_steps": 4, "v_lr": 0.4, "v_loss_layer": 2, "v_weight_decay": 0.3, "clamp_norm_factor": 2,
        "kl_factor": 0.05, "mom2_adjustment": True, "mom2_update_weight": 50, "rewrite_module_tmp": NAME,
        "layer_module_tmp": "model.layers.{}", "mom2_dataset": "wikipedia", "mom2_n_samples": 100000,
        "mom2_dtype": "float32", "device": "cpu", "stats_dir": "./data/stats", "batch_size": 1,
    }  # fmt: skip
    return SimpleNamespace(**{**fields, **changed})


def theirs(*_: Any, **__: Any) -> Any:
    raise AssertionError("one of EasyEdit's own functions ran")


def execute_memit(module: Any) -> Any:
    """A function that asks for contexts, targets and C as EasyEdit's does, and writes MEMIT's formula."""

    def execute(model: Any, tok: Any, requests: Any, hparams: Any, cache_template: Any = None) -> Any:
        made = [dict(request) for request in requests]
        for request in made:
            request["target_new"] = " " + request["target_new"]
            request["prompt"] = request["prompt"].replace(request["subject"], "{}")
        templates = module.get_context_templates(model, tok)
        z_layer, zs = hparams.layers[-1], []
        for request in made:
            zs.append(module.compute_z(model, tok, request, hparams, z_layer, templates))
        deltas = {}
        for layer in hparams.layers:
            cov = module.get_cov(
                model, tok, hparams.rewrite_module_tmp.format(layer), hparams.mom2_dataset, hparams.mom2_n_samples,
                hparams.mom2_dtype, force_recompute=False, hparams=hparams,
            )  # fmt: skip
            deltas[layer] = hparams.mom2_update_weight * cov.double()
            with torch.no_grad():
                model.get_parameter(f"{hparams.rewrite_module_tmp.format(layer)}.weight")[...] += 0.01
        return torch.stack(zs, dim=1), deltas

    return execute


@pytest.fixture
def editor(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The modules of a stand-in, by their names below ``easyeditor.models``, and its ALG_DICT."""
    names = ["easyeditor", "easyeditor.models", "easyeditor.util", "easyeditor.util.alg_dict"]
    names += [f"easyeditor.models.{place.partition('.')[0]}" for place in PLACES]
    names += [f"easyeditor.models.{place}" for place in PLACES]
    for name in names:
        module = ModuleType(name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    found: dict[str, Any] = {place: sys.modules[f"easyeditor.models.{place}"] for place in PLACES}
    for place, functions in PLACES.items():
        for function in functions:
            setattr(found[place], function, theirs)
    memit = found["memit.memit_main"]
    memit.execute_memit, memit.get_context_templates = execute_memit(memit), lambda model, tok: TEMPLATES
    table = dict.fromkeys(["ROME", "R-ROME", "MEMIT", "MEMIT-FE", "EMMET", "AlphaEdit", "GRACE"], theirs)
    alg_dict: Any = sys.modules["easyeditor.util.alg_dict"]
    alg_dict.ALG_DICT = table
    return {**found, "ALG_DICT": table}


def test_every_module_gets_its_functions(editor: dict[str, Any]) -> None:
    done = compat.install_easyeditor()
    for place, functions in PLACES.items():
        for function in functions:
            ours = getattr(editor[place], function)
            if function in ("get_cov", "get_inv_cov"):
                assert ours is getattr(compat, function)
            elif place in ("memit_FE.memit_FE_main", "pmet.pmet_main", "eamet.eamet_main", "core.core_main"):
                assert ours is theirs  # their losses are their own
            assert (ours is theirs) != (f"{place}.{function}" in done)
    assert editor["ALG_DICT"] == {
        "ROME": compat.apply_rome_to_model, "R-ROME": compat.apply_r_rome_to_model,
        "MEMIT": compat.apply_memit_to_model, "EMMET": compat.apply_emmet_to_model,
        "AlphaEdit": compat.apply_alphaedit_to_model, "MEMIT-FE": theirs, "GRACE": theirs,
    }  # fmt: skip
    execute = editor["memit.memit_main"].execute_memit
    compat.install_easyeditor()
    assert editor["memit.memit_main"].execute_memit is execute  # a second time nothing is wrapped again


def test_a_part_of_it(editor: dict[str, Any]) -> None:
    done = compat.install_easyeditor(targets=False, editors=False)
    assert done == [*(f"{place}.{names[0]}" for place, names in PLACES.items())]
    assert editor["memit.memit_main"].compute_z is theirs and editor["ALG_DICT"]["MEMIT"] is theirs


def test_its_memit_asks_once_for_all_targets_and_gets_the_unedited_c(
    editor: dict[str, Any], model: Any, tok: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compat.install_easyeditor()
    asked: list[int] = []
    made = easyeditor.stored_or_optimised

    def counted(*args: Any, **named: Any) -> Any:
        asked.append(len(args[4]))
        return made(*args, **named)

    monkeypatch.setattr(easyeditor, "stored_or_optimised", counted)
    zs, matrices = editor["memit.memit_main"].execute_memit(model, tok, REQUESTS, hparams("MEMIT"), cache_template=None)
    assert asked == [2] and not easyeditor._ahead
    other = tiny_model("llama")
    settings = TargetSettings(1, steps=4, learning_rate=0.4, weight_decay=0.3, clamp=2.0, kl_factor=0.05)
    contexts = ["", f"{SENTENCES[0]}. ", f"{SENTENCES[1]}. "]
    expected = optimise(drop_in.find_adapter(other, None), tok, list(FACTS[:2]), contexts, settings)
    assert zs.shape == (32, 2) and torch.allclose(zs, torch.stack([t.vector for t in expected], 1), atol=1e-6)
    for layer in (0, 1):
        C = compat.get_cov(other, tok, NAME.format(layer), "wikipedia", 1, "float32", hparams=hparams("MEMIT"))
        assert torch.equal(matrices[layer], 50 * C.double())


def test_one_target_alone(model: Any, tok: Any) -> None:
    request = {"prompt": FACTS[0].prompt, "subject": FACTS[0].subject, "target_new": " " + FACTS[0].target_new}
    z = compat.compute_z(model, tok, request, hparams("MEMIT"), 1, TEMPLATES)
    again = compat.compute_z(model, tok, request, hparams("SPHERE", cumulative_ratio=0.5), 1, TEMPLATES)
    memits = {**request, "case_id": 0, "target_new": {"str": request["target_new"]}}  # MEMIT's own spelling
    assert torch.equal(compat.compute_z(model, tok, memits, hparams("MEMIT"), 1, TEMPLATES), z)
    assert z.shape == (32,) and torch.equal(z, again) and z.data_ptr() != again.data_ptr()
    for changed, match in [
        ({"v_loss_layer": 31}, "v_loss_layer is 31 but the last block of this model is 2"),
        ({"fact_token": "last"}, "fact_token of hparams is 'last'"),
        ({"v_num_grad_steps": 2.5}, "steps must be a whole number"),
        ({"v_loss_layer": 1.5}, "v_loss_layer of hparams must be a whole number but is 1.5; name the last block"),
        ({"clamp_norm_factor": -1}, "clamp must be a finite number above 0"),
        ({"v_lr": "fast"}, "v_lr of hparams must be a finite number but is 'fast'"),
    ]:
        with pytest.raises(BadConfig, match=match):
            compat.compute_z(model, tok, request, hparams("MEMIT", **changed), 1, TEMPLATES)
    few = {"fact_token": "subject_last", "v_num_grad_steps": 4, "v_lr": "4e-1", "v_weight_decay": 0.3,
           "clamp_norm_factor": 2, "kl_factor": 0.05}  # fmt: skip
    assert torch.equal(
        compat.compute_z(model, tok, request, few, 1, TEMPLATES), z
    )  # what is not named is not asked for
    with pytest.raises(BadConfig, match=r"context 'They say \{\}, he said' is no text with the prompt"):
        compat.compute_z(model, tok, request, hparams("MEMIT"), 1, [["They say {}, he said"]])


def test_its_editor_edits_through_the_table_and_restores(editor: dict[str, Any], model: Any, tok: Any) -> None:
    compat.install_easyeditor()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for alg_name in ("ROME", "R-ROME", "MEMIT", "EMMET", "AlphaEdit"):
        one = {"layers": [1]} if alg_name in ("ROME", "R-ROME", "EMMET") else {}
        settings = hparams(alg_name, **one, mom2_adjustment=alg_name == "MEMIT")
        if alg_name == "AlphaEdit":
            settings.L2, settings.nullspace_threshold, settings.P_loc = 1, 0.1, "./p.pt"
        edited, weights = editor["ALG_DICT"][alg_name](
            model, tok, [REQUESTS[0]], settings, copy=False, return_orig_weights=True, keep_original_weight=False,
            train_ds=None,
        )  # fmt: skip
        assert edited is model and weights
        assert not torch.equal(model.get_parameter(next(iter(weights))), before[next(iter(weights))])
        with torch.no_grad():
            for name, weight in weights.items():
                model.get_parameter(name)[...] = weight
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def alphaedit(model: Any, tok: Any, fact: EditRequest) -> dict[str, torch.Tensor]:
    settings = hparams("AlphaEdit", L2=1, nullspace_threshold=1e4)  # all of the space
    return compat.apply_alphaedit_to_model(model, tok, [fact], settings, return_orig_weights=True)[1]


def test_alphaedits_earlier_keys_count_as_long_as_they_are_in_the_weights(model: Any, tok: Any) -> None:
    alphaedit(model, tok, FACTS[0])
    found = drop_in.live(model, tok, None)
    assert len(found.stack.edits) == 1
    compat.configure(progress=False, layers=[0, 1])  # what does not decide on statistics forgets nothing
    weights = alphaedit(model, tok, FACTS[1])
    found.stack.look()
    first, second = found.stack.edits
    assert second.delta.provenance["preserved"] == [first.delta.digest()]
    assert len(found.workspace.preserved) == 2
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_parameter(name).data.copy_(weight)  # which torch does not count
    alphaedit(model, tok, FACTS[2])
    assert [edit is first for edit in found.stack.edits] == [True, False]
    # And the second of the two is not what it would be on the first alone's weights without its keys.
    other = tiny_model("llama")
    editor = drop_in.live(other, tok, None)
    alphaedit(other, tok, FACTS[0])
    editor._preserved = drop_in.PreservedKeys()
    editor.workspace.preserved = editor._preserved
    alphaedit(other, tok, FACTS[2])
    name = NAME.format(1) + ".weight"
    assert not torch.allclose(other.get_parameter(name), model.get_parameter(name), atol=1e-9)


@pytest.mark.parametrize("copied", ["by the call", "before", "twice before"])
def test_a_copy_preserves_the_keys_that_came_with_it(model: Any, tok: Any, copied: str) -> None:
    alphaedit(model, tok, FACTS[0])
    settings = hparams("AlphaEdit", L2=1, nullspace_threshold=1e4)
    twin = model if copied == "by the call" else copy.deepcopy(model)
    twin = copy.deepcopy(twin) if copied == "twice before" else twin
    edited, _ = compat.apply_alphaedit_to_model(twin, tok, [FACTS[1]], settings, copy=copied == "by the call")
    alphaedit(model, tok, FACTS[1])
    assert edited is not model
    assert all(torch.equal(tensor, edited.state_dict()[name]) for name, tensor in model.state_dict().items())
    first, second = drop_in.live(edited, tok, None).stack.edits
    assert second.delta.provenance["preserved"] == [first.delta.digest()]


def test_what_others_write_upon_an_edit_does_not_take_its_keys_out(
    model: Any, tok: Any, caplog: pytest.LogCaptureFixture
) -> None:
    alphaedit(model, tok, FACTS[0])
    compat.apply_memit_to_model(model, tok, REQUESTS[1:], hparams("MEMIT"))
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[...] *= 1.5
    alphaedit(model, tok, FACTS[2])
    assert "1 edit in the weights is without keys, from files, from others" in caplog.text
    first, second = drop_in.live(model, tok, None).stack.edits
    assert second.delta.provenance["preserved"] == [first.delta.digest()]


def test_a_fact_reads_the_weights_that_are_edited_and_no_others(
    model: Any, tok: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprint = importlib.import_module("fastmemit.models.fingerprint")  # its package has a function of this name
    compat.apply_memit_to_model(model, tok, REQUESTS[:1], hparams("MEMIT"))
    read: list[str] = []
    checksums = fingerprint.checksums

    def noted(tensors: Any) -> Any:
        kept = list(tensors)
        read.extend(name for name, _ in kept)
        return checksums(kept)

    monkeypatch.setattr(fingerprint, "checksums", noted)
    compat.apply_memit_to_model(model, tok, REQUESTS[1:], hparams("MEMIT"))
    assert sorted(set(read)) == [f"{NAME.format(layer)}.weight" for layer in (0, 1)]
    # A write elsewhere is seen.
    read.clear()
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[...] *= 1.5
    compat.apply_memit_to_model(model, tok, REQUESTS[1:], hparams("MEMIT"))
    assert "model.norm.weight" in read


def test_without_easyedit_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadConfig, match=r"cannot be imported \(No module named 'easyeditor'\); run from its fo"):
        compat.install_easyeditor()
    monkeypatch.setitem(sys.modules, "easyeditor", ModuleType("easyeditor"))
    with pytest.raises(BadConfig, match="Nothing of EasyEdit is where it should be"):
        compat.install_easyeditor()
