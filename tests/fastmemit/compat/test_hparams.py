"""Hyper-parameters of other codebases, whatever holds them."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastmemit.compat import Hparams, read_hparams
from fastmemit.compat.hparams import device_of
from fastmemit.errors import BadConfig
from fastmemit.methods import MemitConfig, RomeConfig
from fastmemit.models import find_adapter
from tiny_models import tiny_model

MEMIT: dict[str, Any] = {
    "layers": [3, 4, 5, 6, 7, 8],
    "clamp_norm_factor": 0.75,
    "layer_selection": "all",
    "fact_token": "subject_last",
    "v_num_grad_steps": 25,
    "v_lr": 5e-1,
    "v_loss_layer": 27,
    "v_weight_decay": 0.5,
    "kl_factor": 0.0625,
    "mom2_adjustment": True,
    "mom2_update_weight": 15000,
    "rewrite_module_tmp": "transformer.h.{}.mlp.fc_out",
    "layer_module_tmp": "transformer.h.{}",
    "mlp_module_tmp": "transformer.h.{}.mlp",
    "attn_module_tmp": "transformer.h.{}.attn",
    "ln_f_module": "transformer.ln_f",
    "lm_head_module": "lm_head",
    "mom2_dataset": "wikipedia",
    "mom2_n_samples": 100000,
    "mom2_dtype": "float32",
}
ROME = {
    **{k: v for k, v in MEMIT.items() if k not in ("mom2_update_weight", "layer_selection")},
    "layers": [5],
    "context_template_length_params": [[5, 10], [10, 10]],
}
EMMET = {**MEMIT, "layers": [5], "emmet_lambda": 0.1, "update_norm_lambda": 0.5, "prob_cutoff": 0}


def test_memits_fields() -> None:
    found = read_hparams(MEMIT)
    assert found == Hparams(
        MemitConfig(
            layers=(3, 4, 5, 6, 7, 8), weight=15000.0, clamp=0.75, steps=25, v_lr=0.5,
            weight_decay=0.5, kl_factor=0.0625, relative_ridge=0.0, scale="published", preset="hparams",
        ),
        module="transformer.h.{}.mlp.fc_out", loss_layer=27,
    )  # fmt: skip


def test_emmets_and_romes_fields() -> None:
    emmet = read_hparams(EMMET).config
    assert (emmet.method, emmet.lambda_e, emmet.ridge, emmet.weight) == ("emmet", 0.1, 0.5, 15000)
    rome = read_hparams(ROME).config
    assert (rome.method, rome.layers, rome.weight) == ("rome", (5,), None)
    ridge = read_hparams({**MEMIT, "update_norm_lambda": 0.01}).config
    assert (ridge.method, ridge.ridge) == ("memit", 0.01)
    assert type(read_hparams({**EMMET, "layers": [5]}, "memit").config) is MemitConfig
    plain = {k: v for k, v in EMMET.items() if k != "emmet_lambda"}
    assert read_hparams(plain, "emmet").config.lambda_e == 0


def test_the_papers_own_multiplier() -> None:
    assert read_hparams({**ROME, "dynamic": True, "dynamic_multiplier": 10}).multiplier == 10
    assert read_hparams({**ROME, "dynamic": False, "dynamic_multiplier": 10}).multiplier is None


def test_whatever_holds_the_fields() -> None:
    wanted = read_hparams(MEMIT)

    class Constants:
        pass

    for name, value in MEMIT.items():
        setattr(Constants, name, value)
    data = dataclasses.make_dataclass("MEMITHyperParams", list(MEMIT))
    for holder in (SimpleNamespace(**MEMIT), Constants(), data(**MEMIT), tuple_values(MEMIT)):
        assert read_hparams(holder) == wanted
    assert read_hparams(wanted) is wanted and read_hparams(wanted.config).config is wanted.config


def tuple_values(fields: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"fact_token": "last"}, "fact_token of hparams is 'last', which cannot be honoured, for"),
        ({"layer_selection": "random"}, 'for all layers are edited.*; set it to "all"'),
        (
            {"skill_preservation": True},
            "skill_preservation of hparams is True, .* for C is of one corpus; set it to fal",
        ),
        ({"wikipedia_lang": "de"}, "wikipedia_lang of hparams is 'de', which cannot be honoured"),
        ({"context_template_length_params": [[2, 3]]}, r"is \[\[2, 3\]\], .*set it to \[\[5, 10"),
        ({"prob_cutoff": 0.9}, r"prob_cutoff of hparams is 0\.9, which cannot"),
        ({"layers": []}, "hparams has no layers"),
        ({"layers": None}, "hparams has no layers"),
        ({"layers": ["4"]}, r"must be whole numbers but are \['4'\]"),
        ({"layers": [5, 4]}, "must be ascending"),
        ({"v_lr": "fast"}, "v_lr of hparams must be a finite number but is 'fast'"),
        ({"v_lr": True}, "must be a finite number but is True"),
        ({"v_lr": "nan"}, "must be a finite number but is 'nan'"),
        ({"v_lr": [1]}, r"must be a finite number but is \[1\]"),
        ({"v_num_grad_steps": 2.5}, "steps must be a whole number"),
        ({"clamp_norm_factor": -1}, "clamp must be a finite number above 0"),
        ({"rewrite_module_tmp": 3}, "rewrite_module_tmp of hparams must be text but is 3"),
        ({"alg_name": "PMET"}, "hparams is for PMET, whose settings are not read: it optimises what attention"),
        (
            {"alg_name": "GRACE"},
            r"is for GRACE, whose settings are not read\. Those of ROME, .* AlphaEdit are; .*--set",
        ),
        ({"alg_name": "ROME"}, "memit edits|rome edits one layer"),
    ],
)
def test_what_cannot_be_honoured(changed: dict[str, Any], match: str) -> None:
    with pytest.raises(BadConfig, match=match):
        read_hparams({**MEMIT, **changed})


def test_another_method_is_refused() -> None:
    with pytest.raises(BadConfig, match=r"is for MEMIT but not for rome; name the"):
        read_hparams({**MEMIT, "alg_name": "MEMIT"}, "rome")


@pytest.mark.parametrize("method", ["pmet", "encore", "rom"])
def test_methods_whose_own_settings_would_be_lost_are_refused(method: str) -> None:
    with pytest.raises(BadConfig, match=f"hparams is for {method.upper()}, whose settings are not read"):
        read_hparams(MEMIT, method)


@pytest.mark.parametrize("value", [None, {1: 2, "layers": [4]}, "hparams/MEMIT/gpt2.json", 3, [1], object()])
def test_what_are_no_hparams(value: Any) -> None:
    with pytest.raises(BadConfig, match=r"must be an object with fields, .*compat\.load_hparams"):
        read_hparams(value)


def test_names_that_are_not_known_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    read_hparams({**MEMIT, "objective": 1, "beta": 10, "alg_name": "MEMIT", "L2": 10})
    assert [r.getMessage() for r in caplog.records] == ["hparams: not used here: L2, beta, objective"]
    caplog.clear()
    read_hparams(MEMIT)
    read_hparams(EMMET)
    assert not caplog.records


def test_a_model_that_they_are_not_for() -> None:
    adapter = find_adapter(tiny_model("llama"))
    good = Hparams(RomeConfig(layers=(1,)), "model.layers.{}.mlp.down_proj", 2)
    good.check(adapter)
    with pytest.raises(BadConfig, match="v_loss_layer is 27 but the last block of this model is 2"):
        dataclasses.replace(good, loss_layer=27).check(adapter)
    with pytest.raises(BadConfig, match=r"rewrite_module_tmp is 'transformer\.h\.\{\}\.x' but 'mo"):
        dataclasses.replace(good, module="transformer.h.{}.x").check(adapter)


@pytest.mark.parametrize(
    ("device", "wanted"),
    [(0, "cuda:0"), ("1", "cuda:1"), ("cuda:2", "cuda:2"), ("cpu", "cpu"), (None, None), ("", None)],
)
def test_the_device_as_easyedit_reads_it(device: Any, wanted: str | None) -> None:
    assert device_of({**MEMIT, "device": device}) == (None if wanted is None else torch.device(wanted))


def test_what_is_no_device() -> None:
    assert device_of(None) is None and device_of(MEMIT) is None
    with pytest.raises(BadConfig, match="device of hparams is 'gpu', which is no device; write 0 or 'cpu'"):
        device_of({**MEMIT, "device": "gpu"})
