"""The store of targets serves a vector for exactly what it was made for."""

import dataclasses
from pathlib import Path

import pytest
import torch

from fastmemit.models import find_adapter
from fastmemit.request import EditRequest
from fastmemit.targets import Target, TargetSettings, TargetStore, stored_or_optimised
from fastmemit.targets import store as store_module
from tiny_models import tiny_model, tiny_tokenizer

SETTINGS = TargetSettings(layer=1, steps=2)
REQUEST = EditRequest("{} is in", "Paris", "Rome", "France")
TARGET = Target(torch.randn(8), torch.randn(8), (3.0, 2.5))


def key(store, **changed):
    fields = {"model": "m", "request": REQUEST, "contexts": ("",), "settings": SETTINGS}
    return store.key(**{**fields, **changed})


def test_every_field_is_part_of_the_key(tmp_path):
    store = TargetStore(tmp_path)
    changes = [
        {"model": "n"},
        {"contexts": ("", "a. ")},
        {"front": "\n"},
        {"request": dataclasses.replace(REQUEST, join="")},
        {"request": dataclasses.replace(REQUEST, target_new="Milan")},
        {"request": dataclasses.replace(REQUEST, prompt="{} lies in")},
        {"request": dataclasses.replace(REQUEST, subject="Lyon")},
    ]
    others = {"layer": 2, "site": "projection", "steps": 9, "learning_rate": 1.0, "clamp": 9.0}
    others |= {"weight_decay": 9.0, "kl_factor": 9.0, "early_stop": 9.0, "stop": "most-probable"}
    assert set(others) == {f.name for f in dataclasses.fields(TargetSettings)}
    changes += [{"settings": dataclasses.replace(SETTINGS, **{n: v})} for n, v in others.items()]
    keys = {key(store), *(key(store, **change) for change in changes)}
    assert len(keys) == 1 + len(changes)


def test_what_another_recipe_made_is_not_found(tmp_path, monkeypatch):
    store = TargetStore(tmp_path)
    store.put(key(store), TARGET)
    assert TargetStore(tmp_path).get(key(store)) is not None
    monkeypatch.setattr(store_module, "RECIPE", store_module.RECIPE + 1)
    assert TargetStore(tmp_path).get(key(store)) is None


def test_the_limit_of_the_loss_is_no_part_of_the_key_where_nobody_reads_it(tmp_path):
    store = TargetStore(tmp_path)
    probable = [
        dataclasses.replace(SETTINGS, stop="most-probable", early_stop=limit)
        for limit in (0.1, 9.0)
    ]
    assert len({key(store, settings=settings) for settings in probable}) == 1


def test_the_true_answer_and_a_leading_space_do_not_matter(tmp_path):
    store = TargetStore(tmp_path)
    same = EditRequest("{} is in", "Paris", " Rome", None)
    assert key(store) == key(store, request=same)


def test_round_trip_through_the_disk_is_exact(tmp_path):
    TargetStore(tmp_path).put("ab12", TARGET)
    found = TargetStore(tmp_path).get("ab12")
    assert torch.equal(found.vector, TARGET.vector)
    assert torch.equal(found.start, TARGET.start)
    assert found.losses == TARGET.losses


@pytest.mark.parametrize("place", [0, 100, -3])
def test_a_changed_byte_counts_as_absent_and_is_said(tmp_path, caplog, place):
    TargetStore(tmp_path).put("ab12", TARGET)
    (path,) = tmp_path.rglob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[place] ^= 0x11
    path.write_bytes(bytes(data))
    assert TargetStore(tmp_path).get("ab12") is None
    assert "made again" in caplog.text


def test_only_missing_targets_are_computed(tmp_path, monkeypatch):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer("byte_bpe")
    asked = []
    original = store_module.optimise

    def spy(adapter, tokenizer, requests, *args, **kwargs):
        asked.append([request.subject for request in requests])
        return original(adapter, tokenizer, requests, *args, **kwargs)

    monkeypatch.setattr(store_module, "optimise", spy)

    def run(subjects, progress=None):
        requests = [EditRequest("{} is in", name, "Rome") for name in subjects]
        return stored_or_optimised(
            TargetStore(tmp_path), "m", find_adapter(model), tokenizer, requests, ("",), SETTINGS,
            batch_tokens=500, progress=progress,
        )  # fmt: skip

    first = run(["Ann", "Bob"])
    done = []
    second = run(["Bob", "Carl", "Ann"], done.append)
    assert asked == [["Ann", "Bob"], ["Carl"]]
    assert torch.equal(second[0].vector, first[1].vector)
    assert torch.equal(second[2].vector, first[0].vector)
    assert sum(done) == 3 * SETTINGS.steps


def test_memory_does_not_grow_with_the_folder(tmp_path: Path) -> None:
    def target(number: int) -> Target:
        return Target(torch.full((4,), float(number)), torch.zeros(4), (1.0,))

    store = TargetStore(tmp_path, held=3)
    for number in range(10):
        store.put(f"{number:064}", target(number))
    assert len(store._memory) == 3
    for number in (0, 9, 5):  # those that are not held come from their files
        found = store.get(f"{number:064}")
        assert found is not None and torch.equal(found.vector, target(number).vector)
    assert len(store._memory) == 3
    alone = TargetStore(None, held=3)  # there is no file that could serve
    for number in range(10):
        alone.put(f"{number:064}", target(number))
    assert len(alone._memory) == 10
