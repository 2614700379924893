"""Each kind of settings file that the other codebases have: read as the method that it is for, or refused by name.

The names are those of their files, and the values in the usual range; none is copied.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastmemit.compat import load_hparams, read_hparams
from fastmemit.errors import BadConfig
from fastmemit.methods import AlphaEditConfig, EmmetConfig, MemitConfig, RomeConfig

SHARED: dict[str, Any] = {
    "layers": [6], "fact_token": "subject_last", "v_num_grad_steps": 21, "v_lr": "4e-1", "v_loss_layer": 31,
    "v_weight_decay": "2e-3", "clamp_norm_factor": 3, "kl_factor": 0.06, "mom2_adjustment": True,
    "rewrite_module_tmp": "model.layers.{}.mlp.down_proj", "layer_module_tmp": "model.layers.{}",
    "mlp_module_tmp": "model.layers.{}.mlp", "attn_module_tmp": "model.layers.{}.self_attn",
    "ln_f_module": "model.norm", "lm_head_module": "lm_head", "mom2_dataset": "wikipedia",
    "mom2_n_samples": 100000, "mom2_dtype": "float32",
}  # fmt: skip
CONTEXTS = {"context_template_length_params": [[5, 10], [10, 10]]}
EASYEDIT = {"model_name": "./a/llama-3-8b", "stats_dir": "./data/stats", "device": 0, "model_parallel": False}
MANY = {**SHARED, "layers": [4, 5, 6], "layer_selection": "all", "mom2_update_weight": 14000}
NULL = {"nullspace_threshold": "3e-2", "L2": 5}
EFFICIENT = {
    "calculate_objective_value": False, "update_norm_lambda": 0.02, "emmet_lambda": 0.2, "dynamic_multiplier": 10,
    "dynamic": True, "shuffle_text": False, "wikipedia_lang": "en", "skill_preservation": False, "skill_lambda": 1,
    "skill_sample_size": 10000, "random_vector_preservation": False, "proj_dim": 6400, "identity_cov": False,
}  # fmt: skip

SETTINGS: dict[str, Any] = {
    "steps": 21, "v_lr": 0.4, "weight_decay": 0.002, "clamp": 3.0, "kl_factor": 0.06, "scale": "published"
}  # fmt: skip
ROME = RomeConfig(layers=(6,), relative_ridge=0.0, preset="x.json", **SETTINGS)
IDENTITY = RomeConfig(layers=(6,), relative_ridge=0.0, covariance="identity", preset="x.json", **SETTINGS)
R_ROME = RomeConfig(layers=(6,), relative_ridge=0.0, covariance="identity", keys="mean", preset="x.json", **SETTINGS)
MEMIT = MemitConfig(layers=(4, 5, 6), weight=14000.0, relative_ridge=0.0, preset="x.json", **SETTINGS)
ALPHAEDIT = AlphaEditConfig(layers=(4, 5, 6), l2=5.0, null_threshold=0.03, preset="x.json", **SETTINGS)

#: Whose folder, the fields, and what they are read as.
READ: list[tuple[str, dict[str, Any], Any]] = [
    ("rome/hparams/ROME", {**SHARED, **CONTEXTS}, ROME),
    ("memit/hparams/MEMIT", MANY, MEMIT),
    ("EasyEdit/hparams/ROME", {**SHARED, **CONTEXTS, **EASYEDIT, "alg_name": "ROME", "mom2_adjustment": False,
                               "fp16": False}, IDENTITY),
    ("EasyEdit/hparams/R-ROME", {**SHARED, **CONTEXTS, **EASYEDIT, "alg_name": "R-ROME", "mom2_adjustment": False},
     R_ROME),
    ("EasyEdit/hparams/MEMIT", {**MANY, **EASYEDIT, "alg_name": "MEMIT"}, MEMIT),
    ("EasyEdit/hparams/EMMET", {**SHARED, **EASYEDIT, "alg_name": "EMMET", "mom2_update_weight": 90000,
                                "update_norm_lambda": 0, "emmet_lambda": 0.1, "layer_selection": "all"},
     EmmetConfig(layers=(6,), weight=90000.0, lambda_e=0.1, relative_ridge=0.0, preset="x.json", **SETTINGS)),
    ("EasyEdit/hparams/AlphaEdit", {**MANY, **EASYEDIT, **NULL, "alg_name": "AlphaEdit", "P_loc": "./n.pt"}, ALPHAEDIT),
    ("AlphaEdit/hparams/AlphaEdit", {**MANY, **NULL, "model_name": "Llama3-8B"}, ALPHAEDIT),
    ("AlphaEdit/hparams/MEMIT", {**MANY, "model_name": "Llama3-8B"}, MEMIT),
    ("efficient/hparams/ROME", {**SHARED, **CONTEXTS, "bias_update": False, "dynamic": False,
                                "dynamic_multiplier": 1}, ROME),
    ("efficient/hparams/EMMET", {**SHARED, **EFFICIENT, "mom2_update_weight": 90000},
     EmmetConfig(layers=(6,), weight=90000.0, ridge=0.02, lambda_e=0.2, relative_ridge=0.0, preset="x.json",
                 **SETTINGS)),
    ("efficient/hparams/MEMIT", {**MANY, **EFFICIENT},
     MemitConfig(layers=(4, 5, 6), weight=14000.0, ridge=0.02, relative_ridge=0.0, preset="x.json", **SETTINGS)),
]  # fmt: skip

#: Whose folder, and the fields; the name of the method is in the refusal.
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("EasyEdit/hparams/PMET", {**MANY, "alg_name": "PMET", "nll_loss_factor": 1,
                               "rewrite_module_tmps": ["model.layers.{}.mlp.down_proj"]}),
    ("EasyEdit/hparams/SPHERE", {**MANY, **NULL, "alg_name": "SPHERE", "cumulative_ratio": 0.5,
                                 "suppression_strength": 0.5}),
    ("EasyEdit/hparams/EAMET", {**MANY, "alg_name": "EAMET", "ks_bs": 1, "cs_factor": 1, "mse_factor": 1,
                                "mom2_update_weight": [15000] * 3}),
    ("EasyEdit/hparams/MEMIT-FE", {**MANY, "alg_name": "MEMIT-FE"}),
    ("EasyEdit/hparams/CORE", {**MANY, "alg_name": "CORE", "ctx_len": 10, "ctx_num": 5, "ctx_top_k": 5}),
    ("AlphaEdit/hparams/NSE", {**MANY, "alpha": 15, "upper_bound": 100, "max_iterations": 3,
                               "neuron_threshold": 0.8}),
    ("EasyEdit/hparams/UnKE", {**MANY, "fact_token": "last", "ex_data_num": 20, "optim_num_step": 50}),
    ("EasyEdit/hparams/UltraEdit", {"alg_name": "ULTRAEDIT", "inner_params": ["model.layers.9.mlp.up_proj"], "lr": 1e-6,
                                    "token": "mask", "batch_size_once": 10, "editor_batch_size": 1024}),
    ("EasyEdit/hparams/GRACE", {"alg_name": "GRACE", "edit_lr": 1.0}),
]  # fmt: skip


def written(path: Path, fields: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(fields))
    return path


@pytest.mark.parametrize(("folder", "fields", "wanted"), READ, ids=[folder for folder, _, _ in READ])
def test_a_file_is_read_as_the_method_that_it_is_for(
    folder: str, fields: dict[str, Any], wanted: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert load_hparams(written(tmp_path / folder / "x.json", fields)) == wanted
    # Where its folder does not say it, the fields do.
    assert load_hparams(written(tmp_path / "elsewhere" / "x.json", fields)) == wanted
    assert not caplog.records


@pytest.mark.parametrize(("folder", "fields"), REFUSED, ids=[folder for folder, _ in REFUSED])
def test_a_file_of_another_method_is_refused_by_its_name(folder: str, fields: dict[str, Any], tmp_path: Path) -> None:
    name = folder.rpartition("/")[2]
    for place in (folder, "elsewhere"):
        with pytest.raises(BadConfig, match=rf"x\.json is for (?i:{name}), whose settings are not read"):
            load_hparams(written(tmp_path / place / "x.json", fields))


def test_methods_that_fields_alone_tell_are_not_taken_for_memit() -> None:
    for _, fields in REFUSED:
        plain = {name: value for name, value in fields.items() if name != "alg_name"}
        if plain.keys() == MANY.keys():  # MEMIT-FE has no field of its own
            continue
        with pytest.raises(
            BadConfig, match=r"settings are not read|none of the fields clamp_norm_factor, .* --?|none of"
        ):
            read_hparams(plain)
    with pytest.raises(BadConfig, match="hparams is for alphaedit but not for memit"):
        read_hparams({**MANY, **NULL}, "memit")


def test_a_fine_tunings_file_is_not_romes(tmp_path: Path) -> None:
    fields = {"layers": [0], "num_steps": 25, "lr": 5e-4, "weight_decay": 0, "kl_factor": 0, "norm_constraint": 5e-4,
              "rewrite_module_tmp": "transformer.h.{}.mlp.c_proj"}  # fmt: skip
    with pytest.raises(
        BadConfig, match=r"x\.json names no method \(alg_name\) and has none of .* another one than ROME"
    ):
        load_hparams(written(tmp_path / "FT" / "x.json", fields))


def test_a_folder_and_a_name_that_disagree(tmp_path: Path) -> None:
    path = written(tmp_path / "MEMIT-FE" / "x.json", {**MANY, "alg_name": "MEMIT"})
    with pytest.raises(
        BadConfig, match=r"among the files of MEMIT-FE but says alg_name 'MEMIT'; .* method= \(--method"
    ):
        load_hparams(path)
    assert load_hparams(path, "memit") == MEMIT
    path = written(tmp_path / "ROME" / "x.json", {**MANY, "algo_name": "MEMIT"})
    with pytest.raises(BadConfig, match="among the files of ROME but says algo_name 'MEMIT'"):
        load_hparams(path)


@pytest.mark.parametrize(
    ("changed", "keys"),
    [
        ({}, "mean"),
        ({"enable_prompt_keys": False, "enable_random_prefix_keys": True, "original_implementation": False}, "mean"),
        ({"enable_random_prefix_keys": False, "original_implementation": True}, "original"),
        ({"enable_prompt_keys": True, "enable_random_prefix_keys": False}, None),
        ({"enable_random_prefix_keys": False}, None),
    ],
)
def test_the_key_of_r_rome(changed: dict[str, Any], keys: str | None) -> None:
    fields = {**SHARED, "alg_name": "R-ROME", **changed}
    if keys is None:
        with pytest.raises(
            BadConfig, match=r"enable_prompt_keys of hparams is .* mean over contexts here; set it to f"
        ):
            read_hparams(fields)
        return
    config = read_hparams(fields).config
    assert isinstance(config, RomeConfig) and config.keys == keys


def test_without_the_adjustment_c_is_the_identity_where_theirs_reads_it(caplog: pytest.LogCaptureFixture) -> None:
    memit = read_hparams({**MANY, "mom2_adjustment": False}).config
    assert isinstance(memit, MemitConfig) and memit.covariance == "collected"
    assert "mom2_adjustment is false, which MEMIT never reads there; C is used as there" in caplog.text
    assert read_hparams({**MANY, **EFFICIENT, "identity_cov": True}, "memit").config.needs_statistics is False


def test_a_run_of_the_papers_own_code_names_its_method() -> None:
    fields = {**MANY, **EFFICIENT, "algo_name": "MEMIT", "dataset": "mcf", "n_edits": 16, "sequential": False}
    assert read_hparams(fields).config.method == "memit"
