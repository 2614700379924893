"""The paper's own code on our functions: stand-ins that call and unpack as it does."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastmemit import compat
from fastmemit.compat import efficient
from fastmemit.errors import BadConfig
from tiny_editors import FACTS
from tiny_models import tiny_model

NAME = "model.layers.{}.mlp.down_proj"
REQUESTS = [
    {"case_id": i, "prompt": f.prompt, "subject": f.subject, "target_new": {"str": f.target_new}}
    for i, f in enumerate(FACTS[:2])
]


def hparams(**changed: Any) -> SimpleNamespace:
    fields = {
        "layers": [0, 1], "layer_selection": "all", "fact_token": "subject_last", "v_num_grad_steps": 4, "v_lr": 0.4,
        "v_loss_layer": 2, "v_weight_decay": 0.3, "clamp_norm_factor": 2, "kl_factor": 0.05, "mom2_adjustment": True,
        "mom2_update_weight": 50, "rewrite_module_tmp": NAME, "mom2_dataset": "wikipedia", "mom2_n_samples": 100000,
        "mom2_dtype": "float32", "calculate_objective_value": False, "update_norm_lambda": 0, "emmet_lambda": 0.1,
        "dynamic_multiplier": 10, "dynamic": True, "shuffle_text": False, "wikipedia_lang": "en",
        "skill_preservation": False, "skill_lambda": 1, "skill_sample_size": 10000,
        "random_vector_preservation": False, "proj_dim": 64, "identity_cov": False,
    }  # fmt: skip
    return SimpleNamespace(**{**fields, **changed})


def asked(model: Any, tok: Any, settings: Any, layer: int) -> Any:
    """C as its MEMIT asks for it."""
    cov, preserved_keys = efficient.get_cov(
        model, tok, settings.rewrite_module_tmp.format(layer), settings.mom2_dataset, settings.mom2_n_samples,
        settings.mom2_dtype, force_recompute=settings.calculate_objective_value, hparams=settings,
    )  # fmt: skip
    assert preserved_keys == []
    return cov


def test_c_is_times_its_weight_and_of_the_unedited_model(model: Any, tok: Any) -> None:
    settings, other = hparams(), tiny_model("llama")
    for layer in (0, 1, 0):
        C = compat.get_cov(other, tok, NAME.format(layer), "wikipedia", 1, "float32")
        assert torch.equal(asked(model, tok, settings, layer), 50 * C)
        with torch.no_grad():
            model.get_parameter(f"{NAME.format(layer)}.weight")[...] += 0.1
    for width in (64, 99):  # the projection's own, whatever they say
        assert torch.equal(asked(model, tok, hparams(identity_cov=True, proj_dim=width), 1), 50 * torch.eye(64))


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"calculate_objective_value": True}, "calculate_objective_value of hparams is true, but no keys are kept"),
        ({"skill_preservation": True}, "skill_preservation of hparams is True, which cannot be honoured"),
        ({"random_vector_preservation": True}, "random_vector_preservation of hparams is True"),
        ({"mom2_update_weight": "much"}, "mom2_update_weight of hparams must be a finite number but is 'much'"),
        ({"mom2_update_weight": None}, "mom2_update_weight of hparams must be a finite number but is None"),
    ],
)
def test_what_cannot_be_honoured(model: Any, tok: Any, changed: dict[str, Any], match: str) -> None:
    with pytest.raises(BadConfig, match=match):
        asked(model, tok, hparams(**changed), 1)


@pytest.mark.parametrize("field", ["skill_preservation", "random_vector_preservation", "shuffle_text"])
def test_nor_by_its_rome_and_its_statistics(model: Any, tok: Any, field: str) -> None:
    settings, name = hparams(**{field: True}), NAME.format(1)
    with pytest.raises(BadConfig, match=f"{field} of hparams is True, which cannot be honoured"):
        efficient.get_inv_cov(model, tok, settings, name, "wikipedia", 100000, "float32")
    with pytest.raises(BadConfig, match=f"{field} of hparams is True, which cannot be honoured"):
        efficient.layer_stats(model, tok, name, "data/stats", "wikipedia", ["mom2"], hparams=settings)


def test_the_inverse_in_its_own_order_of_arguments(model: Any, tok: Any) -> None:
    settings = hparams(layers=[1])
    inverse = efficient.get_inv_cov(model, tok, settings, NAME.format(1), "wikipedia", 100000, "float32")
    assert torch.equal(inverse, compat.get_inv_cov(model, tok, NAME.format(1), "wikipedia", 100000, "float32"))
    u = torch.randn(64)
    assert (inverse @ u.unsqueeze(1)).squeeze().shape == (64,)
    C = compat.get_cov(model, tok, NAME.format(1), "wikipedia", 1, "float32").double()
    more = efficient.get_inv_cov(
        model, tok, settings, NAME.format(1), "wikipedia", 100000, "float32", constraint_rome=True, constraint_lambda=3
    )
    assert torch.allclose(more.double(), torch.linalg.inv(C + 3 * torch.eye(64)), rtol=1e-5, atol=1e-7)
    with pytest.raises(BadConfig, match="constraint_lambda of get_inv_cov must be a finite number but is nan"):
        efficient.get_inv_cov(
            model, tok, settings, NAME.format(1), "wikipedia", 1, "float32", True, constraint_lambda=math.nan
        )


@pytest.mark.parametrize("name", ["layer_stats", "layer_stats_dynamic"])
def test_statistics_are_a_pair(name: str, model: Any, tok: Any) -> None:
    stat, key_vectors = getattr(efficient, name)(
        model, tok, NAME.format(1), "data/stats", "wikipedia", to_collect=["mom2"], sample_size=100000,
        precision="float32", force_recompute=True, hparams=hparams(),
    )  # fmt: skip
    assert stat.mom2.count == 256 and key_vectors == []
    assert torch.equal(stat.mom2.moment().float() * 50, asked(model, tok, hparams(), 1))


@pytest.mark.parametrize("method", ["rome", "emmet", "memit"])
def test_an_edit_is_three_values(method: str, model: Any, tok: Any) -> None:
    one = {} if method == "memit" else {"layers": [1]}
    settings = hparams(algo_name=method.upper(), **one)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    edited, weights_copy, distances = getattr(efficient, f"apply_{method}_to_model")(
        model, tok, REQUESTS, settings, copy=False, return_orig_weights=True, cache_template=None
    )
    assert edited is model
    other = tiny_model("llama")
    getattr(compat, f"apply_{method}_to_model")(other, tok, REQUESTS, settings)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())
    if method == "rome":
        assert distances is None
        return
    assert json.loads(json.dumps(distances)).keys() == {str(layer) for layer in settings.layers}
    for name, weight in weights_copy.items():
        found = distances[name.split(".")[2]]
        now = model.get_parameter(name).detach()
        assert torch.equal(weight, before[name]) and found["preservation_distance"] is None
        assert found["delta_norm"] == pytest.approx(float((now - weight).norm()), rel=1e-4)
        assert found["new_weights_norm"] == pytest.approx(float(now.norm()), rel=1e-6)
        assert found["original_weights_norm"] == pytest.approx(float(weight.norm()), rel=1e-6)


def test_the_norms_of_weights_that_are_stored_transposed(tok: Any) -> None:
    model = tiny_model("gpt2")
    settings = hparams(rewrite_module_tmp="transformer.h.{}.mlp.c_proj")
    _, before, distances = efficient.apply_memit_to_model(model, tok, REQUESTS, settings, return_orig_weights=True)
    assert distances is not None and distances.keys() == {"0", "1"}
    for name, weight in before.items():
        now = model.get_parameter(name).detach()
        assert distances[name.split(".")[2]]["delta_norm"] == pytest.approx(float((now - weight).norm()), rel=1e-4)
