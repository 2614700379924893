"""The face: what a first script writes, in each of its forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastmemit
from fastmemit import Edit, Editor, EditRequest, MemitConfig
from fastmemit.delta import Delta
from fastmemit.errors import BadConfig, BadRequest, BadUndo
from fastmemit.request import as_requests
from tiny_editors import FACTS, QUICK, tiny_corpus, tiny_editor

FACT = EditRequest("{} is located in the city of", "Eiffel Tower", "Rome")
SAME: list[Any] = [
    FACT,
    ("{} is located in the city of", "Eiffel Tower", "Rome"),
    ("Eiffel Tower is located in the city of", "Eiffel Tower", "Rome"),
    {"prompt": "{} is located in the city of", "subject": "Eiffel Tower", "target": "Rome"},
]


def test_dir_shows_what_is_public() -> None:
    assert dir(fastmemit) == sorted([*fastmemit.__all__, "__version__"])
    assert all(getattr(fastmemit, name) is not None for name in fastmemit.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Sources'"):
        _ = fastmemit.Sources


@pytest.mark.parametrize("fact", SAME, ids=["request", "triple", "filled", "dict"])
def test_a_fact_may_be_written_in_several_ways(fact: Any) -> None:
    assert as_requests(fact) == as_requests([fact]) == [FACT]
    assert as_requests((fact, FACTS[1], fact)) == [FACT, FACTS[1], FACT]


@pytest.mark.parametrize("wrong", ["a text", ["a text"], [("one", "two")], [3], [None], 3, None])
def test_what_is_no_fact_is_refused(wrong: Any) -> None:
    with pytest.raises(BadRequest, match="is no fact; give an EditRequest, a dictionary, or a triple"):
        as_requests(wrong)


def test_the_face_of_an_edit(tmp_path: Path) -> None:
    editor = tiny_editor(tmp_path / "cache", layers=None)
    assert editor.statistics is None
    found = editor.precompute(tiny_corpus(), multiplier=4, layers=(0, 1))
    assert editor.statistics is found
    before = [tensor.clone() for tensor in editor.model.state_dict().values()]

    def unchanged() -> bool:
        return all(map(torch.equal, before, editor.model.state_dict().values()))

    planned = editor.plan(SAME[1], MemitConfig(**QUICK))
    assert isinstance(planned, Edit) and not planned.applied and unchanged()
    planned.save(tmp_path / "edit.safetensors")
    loaded = editor.load(tmp_path / "edit.safetensors")
    assert type(loaded) is type(planned) and not loaded.applied
    assert editor.edit(SAME[3], "memit", **QUICK).delta.digest() == planned.delta.digest()
    editor.edits[0].undo()
    with planned as inside:
        assert inside is planned and planned.applied and not unchanged()
        assert editor.generate("The capital of") == editor.generate(["The capital of"])
    assert unchanged() and loaded.apply() is loaded
    loaded.undo()
    assert unchanged()
    assert (planned.save_adapter(tmp_path / "adapter") / "adapter_config.json").is_file()
    dry = planned.push_to_hub("me/edit", dry_run=tmp_path / "dry")
    assert str(tmp_path / "dry") in str(dry) and (tmp_path / "dry" / "README.md").is_file()
    editor.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "config.json").is_file()
    with pytest.raises(BadConfig, match="lambda_e is a setting of emmet"):
        editor.plan(FACT, MemitConfig(**QUICK), lambda_e=0.1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"maxlength": 20}, r"no field 'maxlength'; did you mean 'max_length'\? A collection has allow_fewer, "),
        ({"colour": "red"}, "no field 'colour'; a collection has .*, seed"),
        ({"max_length": "20"}, "max_length must be a whole number but is '20'"),
        ({"max_length": 0}, "max_length must be from 1 to"),
        ({"seed": "x"}, "seed must be a whole number but is 'x'"),
        ({"seed": 1.5}, "seed must be a whole number but is 1.5"),
        ({"multiplier": "10"}, "multiplier '10' is no number"),
        ({"method": "memit"}, r"layers \(\[1\]\) and a method"),
    ],
)
def test_what_is_no_field_of_a_collection_is_told_before_anything_runs(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    editor = tiny_editor(tmp_path, layers=None)
    with pytest.raises(BadConfig, match=said):
        editor.precompute(tiny_corpus(), layers=1, **settings)
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_numpy_and_one_layer_will_do(tmp_path: Path) -> None:
    editor = tiny_editor(tmp_path, layers=None)
    plain = editor.precompute(tiny_corpus(), layers=[1], multiplier=2, seed=3, max_length=20, allow_fewer=True)
    same: dict[str, Any] = {"multiplier": np.float64(2), "seed": np.int64(3), "max_length": np.int64(20)}
    assert editor.precompute(tiny_corpus(), layers=1, allow_fewer=1, **same) == plain


def test_a_model_is_loaded_from_a_path_and_a_mistyped_argument_told_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = tiny_editor(tmp_path / "cache", layers=None)
    editor.save_pretrained(tmp_path / "model")
    again = Editor.from_pretrained(tmp_path / "model", device="cpu", cache_dir=tmp_path / "cache")
    assert again.fingerprint == editor.fingerprint and again.name == "model"
    monkeypatch.setattr("fastmemit.editor.load_model", None)  # to call it would raise something else
    with pytest.raises(TypeError, match="'cachedir'"):
        Editor.from_pretrained(tmp_path / "model", cachedir=tmp_path)


def test_an_edit_says_which_model_it_is_of_and_what_that_said_before(tmp_path: Path) -> None:
    # A snapshot in the hub's cache is called by its revision, and the model by its full name.
    place = tmp_path / "models--me--tiny-llama" / "snapshots" / "0123abcd"
    tiny_editor(tmp_path / "cache", layers=None).save_pretrained(place)
    editor = Editor.from_pretrained(place, device="cpu", cache_dir=tmp_path / "cache")
    assert editor.name == "me/tiny-llama" and editor.record == {}
    editor.model.config._commit_hash = "0123abcd"
    editor.precompute(tiny_corpus(), multiplier=4, layers=(0, 1))
    (asked,) = editor.ask(FACT)
    edit = editor.edit(FACT, "memit", **QUICK)
    edit.save(tmp_path / "edit.safetensors")
    about = Delta.load(tmp_path / "edit.safetensors").provenance
    assert (about["model_name"], about["model_revision"]) == ("me/tiny-llama", "0123abcd")
    assert about["former"] == [asked.says] == [edit.outcomes[0].before.says]
    with pytest.raises(BadUndo, match=r"is in the weights already, among the edits that are applied; applied again"):
        editor.load(tmp_path / "edit.safetensors").apply()
    edit.undo()
    editor.load(tmp_path / "edit.safetensors").apply().undo()
