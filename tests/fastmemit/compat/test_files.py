"""Files of hyper-parameters, and files that are none."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fastmemit.compat import load_hparams, open_hparams, read_hparams
from fastmemit.errors import BadConfig

MEMIT: dict[str, Any] = {
    "layers": [3, 4, 5, 6, 7, 8],
    "clamp_norm_factor": 0.75,
    "fact_token": "subject_last",
    "v_num_grad_steps": 25,
    "v_lr": 5e-1,
    "v_loss_layer": 27,
    "v_weight_decay": 0.5,
    "kl_factor": 0.0625,
    "mom2_adjustment": True,
    "mom2_update_weight": 15000,
    "rewrite_module_tmp": "transformer.h.{}.mlp.fc_out",
}
# As YAML 1.1 has it, 5e-1 is text.
YAML = """alg_name: "MEMIT"
model_name: "./hugging_cache/llama-2-7b"
stats_dir: "./data/stats"
device: 0
layers: [4, 5, 6, 7, 8]
clamp_norm_factor: 4
layer_selection: "all"
fact_token: "subject_last"
v_num_grad_steps: 25
v_lr: 5e-1
v_loss_layer: 31
v_weight_decay: 1e-3
kl_factor: 0.0625
mom2_adjustment: true
mom2_update_weight: 15000
rewrite_module_tmp: "model.layers.{}.mlp.down_proj"
mom2_dataset: "wikipedia"
model_parallel: false  # and a comment
"""


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_files(tmp_path: Path) -> None:
    path = written(tmp_path / "MEMIT" / "gpt-j.json", json.dumps(MEMIT))
    assert load_hparams(path) == dataclasses.replace(read_hparams(MEMIT).config, preset="gpt-j.json")
    config = load_hparams(written(tmp_path / "llama.yaml", YAML))
    assert (config.method, config.layers, config.v_lr, config.weight_decay, config.clamp) == (
        "memit", (4, 5, 6, 7, 8), 0.5, 1e-3, 4,
    )  # fmt: skip
    found = open_hparams(tmp_path / "llama.yaml")
    assert (found.module, found.loss_layer) == ("model.layers.{}.mlp.down_proj", 31)


def test_the_folder_says_the_method_where_nothing_else_does(tmp_path: Path) -> None:
    plain = {"layers": [5], "v_lr": 0.5}
    for folder, method in (("ROME", "rome"), ("EMMET", "emmet"), ("MEMIT", "memit"), ("x", "rome")):
        path = written(tmp_path / folder / "a.json", json.dumps(plain))
        assert load_hparams(path).method == method
    assert load_hparams(tmp_path / "ROME" / "a.json", "emmet").method == "emmet"


BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nlayers: *b\n"


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("a.json", "", "is empty"),
        ("a.json", "{", "is not JSON"),
        ("a.json", "[1]", "holds no names with values"),
        ("a.yaml", "- 1", "holds no names with values"),
        ("a.yaml", "1: 2", "holds no names with values"),
        ("a.yaml", "a: [", "is not YAML"),
        ("a.yaml", "a: !!python/object/apply:os.system ['true']", "is not YAML"),
        ("a.yml", BOMB, "uses YAML aliases"),
        ("a.yaml", "[" * 30000, "is nested too deep"),
        ("a.json", " " * (1 << 16) + "{}", "which is no file of hyper-parameters"),
    ],
)
def test_files_that_are_none(tmp_path: Path, name: str, text: str, match: str) -> None:
    with pytest.raises(BadConfig, match=match):
        load_hparams(written(tmp_path / name, text))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "no.json"):
        with pytest.raises(BadConfig, match=r"is a folder|does not exist"):
            load_hparams(path)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", '{"v_lr": 0.5, "v_lr": 0.1}', "'v_lr' is there twice"),
        ("a.json", '{"v_lr": NaN}', "NaN is no number"),
        ("a.yaml", "v_lr: 0.5\nlayers: [3]\nv_lr: 0.1\n", "'v_lr' twice in one place"),
        ("a.yaml", "layers: [3]\nmore: [{a: 1, b: 2, a: 3}]\n", "'a' twice in one place"),
        ("a.yml", YAML + "v_lr: .nan\n", "'v_lr' twice"),
    ],
)
def test_a_name_that_is_there_twice_has_no_one_value(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(BadConfig, match=r"twice|NaN") as found:
        load_hparams(tmp_path / name)
    assert said in str(found.value)
