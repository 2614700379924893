"""Settings from other codebases' files on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastmemit.delta import Delta
from tiny_commands import Place, refused, run

Capture = pytest.CaptureFixture[str]
FIELDS: dict[str, Any] = {
    "layers": [1], "fact_token": "subject_last", "v_num_grad_steps": 3, "v_lr": 0.25,
    "v_loss_layer": 2, "v_weight_decay": 0.1, "clamp_norm_factor": 2, "kl_factor": 0.05,
    "mom2_adjustment": True, "rewrite_module_tmp": "model.layers.{}.mlp.down_proj",
}  # fmt: skip


def file(place: Place, folder: str, **changed: Any) -> Path:
    path = place.at / folder / "tiny.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**FIELDS, **changed}))
    return path


def command(place: Place, hparams: Path, *more: Any) -> list[Any]:
    return ["edit", *place.model, "--config", hparams, "--multiplier", "4", *more, "--corpus",
            place.corpus, "--facts", place.requests, "--out", place.at / "e.st"]  # fmt: skip


def test_all_settings_come_from_the_file(place: Place, capsys: Capture) -> None:
    out = run(capsys, *command(place, file(place, "ROME"), "--set", "steps=2"))
    assert "edited by rome: " in out and " of 2 facts are now what the model says" in out
    settings = Delta.load(place.at / "e.st").provenance["settings"]
    assert (settings["method"], settings["layers"], settings["steps"]) == ("rome", [1], 2)
    assert (settings["v_lr"], settings["clamp"], settings["kl_factor"]) == (0.25, 2.0, 0.05)
    assert (settings["weight_decay"], settings["weight"]) == (0.1, None)
    both = file(place, "MEMIT", layers=[0, 1], mom2_update_weight=9)
    out = run(capsys, *command(place, both, "--method", "memit"))
    assert "layers 0, 1 of tiny-llama edited by memit: " in out
    assert Delta.load(place.at / "e.st").provenance["settings"]["weight"] == 9


def test_few_keys_get_no_ridge_but_by_set(place: Place, capsys: Capture) -> None:
    for more, ridge in ([], 0.0), (["relative_ridge=0.05"], 0.05), (["relative_ridge=none"], 0.1):
        chosen = [word for value in more for word in ("--set", value)]
        run(capsys, *command(place, file(place, "ROME"), *chosen, "--multiplier", "2"))
        assert Delta.load(place.at / "e.st").provenance["settings"]["relative_ridge"] == ridge


def test_the_files_multiplier_holds_where_none_is_named(place: Place, capsys: Capture) -> None:
    path = file(place, "ROME", dynamic=True, dynamic_multiplier=3)
    words = command(place, path)
    at = words.index("--multiplier")
    for many, left in (4, words), (3, words[:at] + words[at + 2 :]):
        run(capsys, *left)
        provenance = Delta.load(place.at / "e.st").provenance
        assert provenance["statistics"]["multiplier"] == many


def test_the_other_verbs_take_it_too(place: Place, capsys: Capture) -> None:
    result = place.at / "out.json"
    out = run(capsys, "evaluate", *place.model, "--config", file(place, "ROME"), "--facts",
              place.records, "--batch-size", "1", "--num-batches", "1", "--corpus", place.corpus,
              "--multiplier", "4", "--json", result)  # fmt: skip
    assert ", rome, 1 record " in out
    assert json.loads(result.read_text())["settings"]["method"] == "rome"


@pytest.mark.parametrize(
    ("changed", "more", "part"),
    [
        ({"fact_token": "last"}, [], "fact_token of tiny.json is 'last', which cannot be hon"),
        ({"v_loss_layer": 47}, [], "v_loss_layer is 47 but the last block of this model is 2"),
        ({"layers": [5]}, [], "Layer 5 is out of range"),
        ({"rewrite_module_tmp": "transformer.h.{}.mlp.c_proj"}, [], "leads to no linear map"),
        ({}, ["--method", "pmet"], "tiny.json is for PMET, whose settings are not read: it optimises what"),
        ({"alg_name": "ROME"}, ["--method", "memit"], "is for ROME but not for memit"),
    ],
)
def test_a_file_that_does_not_fit(
    place: Place, capsys: Capture, changed: dict[str, Any], more: list[str], part: str
) -> None:
    line = refused(capsys, place, *command(place, file(place, "ROME", **changed), *more))
    assert part in line


def test_easyedits_rome_asks_for_no_statistics(place: Place, capsys: Capture) -> None:
    words = ["edit", *place.model, "--config", file(place, "ROME", mom2_adjustment=False), "--facts", place.requests]
    out = run(capsys, *words, "--out", place.at / "e.st")
    assert "edited by rome: " in out and "statistics:" not in out
    provenance = Delta.load(place.at / "e.st").provenance
    assert (provenance["settings"]["covariance"], provenance["statistics"]) == ("identity", {})


def test_no_file(place: Place, capsys: Capture) -> None:
    assert "does not exist" in refused(capsys, place, *command(place, place.at / "no.json"))
