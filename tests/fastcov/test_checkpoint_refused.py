"""A checkpoint that is damaged or of something else is not used, and that is said."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import struct

import pytest
import torch
from safetensors import safe_open

from fastcov import Checkpoint, NonFinite, StaleCheckpoint, StoreDamaged, store
from fastcov.collecting import Accumulator
from fastcov.store import read_checkpoint
from reference.tiny import Tiny, paths
from tiny_checkpoints import (
    IDENTITY,
    MODULES,
    TOTAL,
    batches,
    quick_disk,  # noqa: F401
    run,
    same,
)


def damaged(data):
    """The bytes of a checkpoint, spoilt in many ways."""
    header = struct.unpack("<Q", data[:8])[0]
    for size in (0, 7, 40, header, len(data) // 2, len(data) - 1):
        yield data[:size]
    yield data + b"x"
    for place in (0, 8, 8 + header // 2, 8 + header, len(data) - 40, len(data) - 1):
        flipped = bytearray(data)
        flipped[place] ^= 4
        yield bytes(flipped)
    yield b"\xff" * len(data)
    yield os.urandom(200)


def test_a_damaged_file_is_reported_and_not_used(tmp_path, caplog):
    path = tmp_path / "c"
    number, whole = run(None)
    run(path, kill_after=3)
    data = path.read_bytes()
    for spoilt in damaged(data):
        path.write_bytes(spoilt)
        caplog.clear()
        left, found = run(path)
        assert left == number
        same(found, whole)
        assert "the checkpoint is not used" in caplog.text and str(path) in caplog.text
    path.write_bytes(data)
    assert run(path)[0] == number - 3


def test_a_sealed_file_of_another_kind(tmp_path, caplog):
    path = tmp_path / "c"
    run(path, kill_after=3)
    data = path.read_bytes()
    body = data[:-32].replace(b'"version": "1"', b'"version": "2"')
    path.write_bytes(body + hashlib.sha256(body).digest())
    assert run(path)[0] == run(None)[0]
    assert "has version '2'" in caplog.text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("state", "[" * 5000),
        ("state", "[]"),
        ("batches", "3"),
        ("modules", []),
        ("d", 10**6),  # a square of 4 TB
        ("d", -9),
        ("count", None),
        ("device", "nowhere"),
    ],
)
def test_a_forged_state_is_refused_before_it_is_used(tmp_path, name, value):
    path = tmp_path / "c"
    run(path, kill_after=3)
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    state = json.loads(header["__metadata__"]["state"])
    module = next(iter(state["modules"].values()))
    (module if name in module else state)[name] = value
    header["__metadata__"]["state"] = value if name == "state" else json.dumps(state)
    raw = json.dumps(header).encode()
    body = struct.pack("<Q", len(raw)) + raw + data[8 + size : -32]
    path.write_bytes(body + hashlib.sha256(body).digest())
    with pytest.raises(StoreDamaged, match="may be deleted"):
        read_checkpoint(path)


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(StoreDamaged, match="is not a file"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"identity": {**IDENTITY, "seed": 1}}, "of another seed (0, not 1) and is"),
        ({"identity": {**IDENTITY, "model": "n"}}, "of another model ('m', not 'n') and is"),
        ({"identity": {"model": "m"}}, "of another seed (0, not nothing) and is"),
        ({"identity": {**IDENTITY, "more": None}}, "another more (nothing, not None) and is"),
        ({"identity": {**IDENTITY, "a": 1, "seed": 2}}, "of another a (nothing, not 1); seed (0, not 2) and is"),
        (
            {"dtype": torch.float64},
            "order of the sums ({'dtype': 'torch.float32', 'launch_rows': 8192, 'quartic': True}, not "
            "{'dtype': 'torch.float64', 'launch_rows': 8192, 'quartic': True}) and is",
        ),
        (
            {"launch_rows": 5},
            "'launch_rows': 8192, 'quartic': True}, not {'dtype': 'torch.float32', 'launch_rows': 5, 'quartic': True})",
        ),
        ({"budget": TOTAL // 2}, "of another budget ("),
        ({"modules": paths(1, 2)}, "of another budget ("),
    ],
)
def test_what_is_of_something_else_is_not_used(tmp_path, caplog, changed, what):
    number, whole = run(None, **changed)
    run(tmp_path / "c", kill_after=3)
    left, found = run(tmp_path / "c", **changed)
    assert left == number
    same(found, whole)
    assert what in caplog.text and "not used" in caplog.text


@pytest.mark.parametrize("changed", ["token", "order", "shorter", "mask"])
def test_other_text_is_noticed(tmp_path, changed):
    run(tmp_path / "c", kill_after=3)
    given = [dict(batch) for batch in batches()]
    if changed == "token":
        given[1]["input_ids"] = given[1]["input_ids"] + 1
    elif changed == "order":
        given[0], given[1] = given[1], given[0]
    elif changed == "shorter":
        del given[2:]
    else:
        given[2]["attention_mask"] = given[2]["attention_mask"] * 0
    with pytest.raises(StaleCheckpoint, match=r"The text is not what it was .* 3 batches; delete"):
        run(tmp_path / "c", given=given)


def test_another_machine_is_told_of(tmp_path, caplog, monkeypatch):
    _, whole = run(None)
    run(tmp_path / "c", kill_after=3)
    monkeypatch.setattr(store, "_machine", lambda: {"threads": 77, "kernels": []})
    _, found = run(tmp_path / "c")
    assert "'threads': 77" in caplog.text and "last bits may differ" in caplog.text
    same(found, whole)  # it was the same one, in truth


def test_a_disk_that_is_full_costs_the_checkpoint_alone(tmp_path, caplog, monkeypatch):
    path = tmp_path / "c"
    number, whole = run(None)
    run(path, kill_after=2)
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    left, found = run(path)
    assert left == number - 2
    same(found, whole)
    assert "no checkpoint was written" in caplog.text and "No space left" in caplog.text
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["c"]


def test_nan_is_found_before_it_is_kept(tmp_path):
    model = Tiny(dtype=torch.float32)
    with torch.no_grad():
        model.layers[0].up.weight[0, 0] = math.nan
    with pytest.raises(NonFinite):
        run(tmp_path / "c", model=model, launch_rows=3)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("seconds", [-1, math.nan])
def test_seconds_that_make_no_sense(seconds):
    with pytest.raises(ValueError, match="must be 0 or more"):
        Checkpoint("c", {}, seconds)


def test_when_it_is_written(tmp_path, monkeypatch):
    """Every five minutes, and less often where a write takes more than 1.5 seconds."""
    now = [1000.0]
    monkeypatch.setattr(store.time, "monotonic", lambda: now[0])
    model, written, took = Tiny(dtype=torch.float32), [], [0.0]

    def write(file, state, taken):
        now[0] += took[0]
        written.append(now[0])

    monkeypatch.setattr(store, "write_checkpoint", write)

    def times(seconds, cost, step, steps):
        took[0] = cost
        written.clear()
        now[0] = 1000.0
        sums = Accumulator(model, {MODULES[0]: None}, torch.float32)
        checkpoint = Checkpoint(tmp_path / "c", IDENTITY, seconds)
        assert list(checkpoint.resume(sums, [])) == []
        for _ in range(steps):
            now[0] += step
            checkpoint.write(sums)
            checkpoint.path.unlink(missing_ok=True)
        return [moment - 1000 for moment in written]

    assert times(None, 0, 100, 10) == [300, 600, 900]
    assert times(None, 10, 100, 60) == [310, 2320, 4330]  # 10 s in 2000
    assert times(0, 10, 1, 2) == [11, 22]
    assert times(250, 10, 100, 6) == [310, 620]
    assert times(math.inf, 0, 1e9, 3) == []


def test_the_file_is_plain_safetensors(tmp_path):
    run(tmp_path / "c", kill_after=3, launch_rows=50)
    with safe_open(tmp_path / "c", framework="pt") as file:
        state = json.loads(file.metadata()["state"])
        names = set(file.keys())
    assert state["batches"] == 3 and state["identity"] == IDENTITY
    assert list(state["modules"]) == MODULES
    assert {"0:sum", "0:quartic", "0:waiting", "1:sum", "sha256"} <= names
    _, taken = read_checkpoint(tmp_path / "c")
    one = taken[MODULES[0]]
    assert one.found == one.moment.count + len(one.waiting)


def test_it_says_where_it_goes_on(tmp_path, caplog):
    run(tmp_path / "c", kill_after=3)
    with caplog.at_level(logging.INFO, "fastcov"):
        run(tmp_path / "c")
    assert "going on behind batch 3 of" in caplog.text


def test_it_is_removed_once(tmp_path):
    run(tmp_path / "c", kill_after=3)
    checkpoint = Checkpoint(tmp_path / "c", IDENTITY)
    checkpoint.remove()
    checkpoint.remove()
    assert os.listdir(tmp_path) == []
