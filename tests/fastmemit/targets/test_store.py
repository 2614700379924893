"""The store of targets serves a vector for exactly what it was made for."""

import dataclasses
import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from fastmemit import targets as store_module
from fastmemit.errors import FastmemitError
from fastmemit.models import find_adapter
from fastmemit.request import EditRequest
from fastmemit.targets import Target, TargetKey, TargetSettings, TargetStore, stored_or_optimised
from tiny_editors import FACTS, QUICK, tiny_editor
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
    others |= {"scale": "median", "optimiser": "rotate"}
    assert {*others, "rho"} == {f.name for f in dataclasses.fields(TargetSettings)}
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
    probable = [dataclasses.replace(SETTINGS, stop="most-probable", early_stop=limit) for limit in (0.1, 9.0)]
    assert len({key(store, settings=settings) for settings in probable}) == 1


def test_each_optimiser_s_step_is_part_of_its_own_keys_alone(tmp_path):
    store = TargetStore(tmp_path)
    rotate = dataclasses.replace(SETTINGS, optimiser="rotate")
    for name, of, idle in (("rho", rotate, SETTINGS), ("learning_rate", SETTINGS, rotate)):
        assert key(store, settings=of) != key(store, settings=dataclasses.replace(of, **{name: 0.7}))
        assert key(store, settings=idle) == key(store, settings=dataclasses.replace(idle, **{name: 0.7}))
    assert "optimiser" not in key(store).content  # as before there was another one


def test_the_true_answer_and_a_leading_space_do_not_matter(tmp_path):
    store = TargetStore(tmp_path)
    same = EditRequest("{} is in", "Paris", " Rome", None)
    assert key(store) == key(store, request=same)


def test_round_trip_through_the_disk_is_exact(tmp_path):
    made = key(TargetStore(tmp_path))
    TargetStore(tmp_path).put(made, TARGET)
    found = TargetStore(tmp_path).get(made)
    assert torch.equal(found.vector, TARGET.vector)
    assert torch.equal(found.start, TARGET.start)
    assert found.losses == TARGET.losses


@pytest.mark.parametrize("place", [0, 100, -3])
def test_a_changed_byte_counts_as_absent_and_is_said(tmp_path, caplog, place):
    made = key(TargetStore(tmp_path))
    TargetStore(tmp_path).put(made, TARGET)
    (path,) = tmp_path.rglob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[place] ^= 0x11
    path.write_bytes(bytes(data))
    assert TargetStore(tmp_path).get(made) is None
    assert "made again" in caplog.text


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": "n"}, "of another model ('n', not 'm')"),
        ({"contexts": ("", "a. ")}, "of another contexts (['', 'a. '], not [''])"),
        (
            {"request": dataclasses.replace(REQUEST, target_new="Milan")},
            "of another request (['{} is in', 'Paris', ' Milan'], not ['{} is in', 'Paris', ' Rome'])",
        ),
        ({"settings": dataclasses.replace(SETTINGS, layer=2)}, "of another layer (2, not 1)"),
        ({"settings": dataclasses.replace(SETTINGS, clamp=9.0)}, "of another clamp (9.0, not 1.0)"),
        (
            {"settings": dataclasses.replace(SETTINGS, stop="most-probable")},
            "of another early_stop (nothing, not 0.05)",
        ),
    ],
)
def test_a_sound_file_of_something_else_is_not_served(tmp_path, caplog, changed, said):
    store = TargetStore(tmp_path)
    mine, other = key(store), key(store, **changed)
    store.put(mine, TARGET)
    store.put(other, Target(torch.zeros(8), torch.zeros(8), (1.0,)))
    mine_at, other_at = (store._path(k) for k in (mine, other))
    shutil.copyfile(other_at, mine_at)
    assert TargetStore(tmp_path).get(mine) is None
    (record,) = caplog.records
    assert record.getMessage() == f"the stored target {mine_at} is {said} and is made again"
    assert TargetStore(tmp_path).get(other) is not None
    store.put(mine, TARGET)  # as it is made again
    assert torch.equal(TargetStore(tmp_path).get(mine).vector, TARGET.vector)


@pytest.mark.parametrize("sealed_too", [False, True])
@pytest.mark.parametrize("content", [None, "", "[]", "3", '{"model": "m"', '{"model": "m"}', "{}"])
def test_a_file_that_does_not_say_what_it_is_of_counts_as_absent(tmp_path, caplog, content, sealed_too):
    store = TargetStore(tmp_path)
    made = key(store)
    store.put(made, TARGET)
    path = store._path(made)
    parts = load_file(path)
    about = {"content": made.content, "sha256": store_module._seal(parts, made.content)}
    path.write_bytes(save(parts, about))
    assert TargetStore(tmp_path).get(made) is not None  # so much for this test's own writing
    about["content"] = content
    if sealed_too:
        about["sha256"] = store_module._seal(parts, content or "")
    path.write_bytes(save(parts, {k: v for k, v in about.items() if v is not None}))
    assert TargetStore(tmp_path).get(made) is None
    (record,) = caplog.records
    assert str(path) in record.getMessage() and "made again" in record.getMessage()


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
        store.put(TargetKey(f"{number}"), target(number))
    assert len(store._memory) == 3
    for number in (0, 9, 5):  # those that are not held come from their files
        found = store.get(TargetKey(f"{number}"))
        assert found is not None and torch.equal(found.vector, target(number).vector)
    assert len(store._memory) == 3
    alone = TargetStore(None, held=3)  # there is no file that could serve
    for number in range(10):
        alone.put(TargetKey(f"{number}"), target(number))
    assert len(alone._memory) == 10


def test_targets_that_ran_out_of_steps_are_counted_and_named(caplog):
    from fastmemit.targets import _name_unfinished

    settings = TargetSettings(layer=0, steps=3, early_stop=0.05)
    requests = [EditRequest("{} is", f"Fact{n}", "true") for n in range(8)]
    ends = [(1.0, 0.04), (3.0, 2.0, 0.04), (3.0, 2.0, 1.5), *[(3.0, 2.0, 0.06)] * 5]
    targets = [Target(torch.zeros(2), torch.zeros(2), losses) for losses in ends]
    with caplog.at_level("WARNING"):
        _name_unfinished(requests, targets, settings)
    assert "6 of 8 targets stopped at the last of 3 steps above the loss limit of 0.05" in caplog.text
    assert "'Fact2 is true' 1.50; " in caplog.text and "and 1 more; optimiser=rotate with steps=25 may" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING"):
        _name_unfinished(requests, targets, dataclasses.replace(settings, optimiser="rotate", steps=25))
        ends = [(1.5,) * 25, *[(0.01,)] * 7]
        targets = [Target(torch.zeros(2), torch.zeros(2), losses) for losses in ends]
        _name_unfinished(requests, targets, dataclasses.replace(settings, optimiser="rotate", steps=25))
    assert caplog.text.count("of 8 targets") == 1 and "may go further" not in caplog.text
    caplog.clear()
    targets = [Target(torch.zeros(2), torch.zeros(2), (3.0, 2.0, 0.06))] * 8
    with caplog.at_level("WARNING"):
        _name_unfinished(requests[3:], targets[3:], settings)  # 0.06 is nothing to warn of
        _name_unfinished(requests, targets, dataclasses.replace(settings, stop="most-probable"))
    assert caplog.text == ""


def test_a_cache_that_cannot_be_written_serves_what_it_has(tmp_path, monkeypatch, caplog):
    editor = tiny_editor(tmp_path)
    editor.edit(FACTS[:1], "memit", **QUICK).undo()
    for error in (errno.EROFS, errno.EACCES):

        def refused(*_, error=error, **__):
            raise OSError(error, os.strerror(error))

        with monkeypatch.context() as patch:
            patch.setattr(store_module, "atomic_file", refused)
            patch.setattr(store_module, "shared_folder", refused)
            again = tiny_editor(tmp_path, layers=None)
            edit = again.edit(FACTS, "memit", **QUICK)
            assert "cannot be written" in caplog.text
            edit.undo()
            assert again.plan(FACTS, "memit", **QUICK).delta.digest() == edit.delta.digest()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store_module, "atomic_file", full)
    with pytest.raises(OSError, match="No space"):
        tiny_editor(tmp_path, layers=None).edit(FACTS[1:], "memit", **QUICK)


@pytest.mark.parametrize(("part", "value"), [("vector", "nan"), ("start", "inf"), ("losses", "nan")])
def test_what_is_not_finite_is_neither_stored_nor_served(tmp_path, caplog, part, value):
    store = TargetStore(tmp_path)
    asked = key(store)
    good = {"vector": TARGET.vector, "start": TARGET.start, "losses": torch.tensor(TARGET.losses, dtype=torch.float64)}
    bad = {**good, part: good[part].clone().index_fill_(0, torch.tensor([1]), float(value))}
    target = Target(bad["vector"], bad["start"], tuple(bad["losses"].tolist()))
    for place in (store, TargetStore(None)):
        with pytest.raises(FastmemitError, match=r"'\{\} is in' about 'Paris' is not finite; load the model"):
            place.put(asked, target)
        assert place.get(asked) is None
    assert list(tmp_path.iterdir()) == []
    store.put(asked, TARGET)
    (path,) = tmp_path.rglob("*.safetensors")
    metadata = {"content": asked.content, "sha256": store_module._seal(bad, asked.content)}
    path.write_bytes(save(bad, metadata))
    assert TargetStore(tmp_path).get(asked) is None
    assert "has values that are not finite and is made again" in caplog.text
