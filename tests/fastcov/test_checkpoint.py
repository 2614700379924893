"""A collect killed after any batch goes on to the same bits, or begins anew and says why."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shutil
import struct

import pytest
import torch
from safetensors import safe_open

from fastcov import Checkpoint, NonFiniteKeys, StaleCheckpoint, bucket, collect
from fastcov import checkpoint as checkpoint_module
from fastcov.checkpoint_file import read_checkpoint
from fastcov.spans import Span
from fastcov.tally import Tally
from reference.tiny import Tiny, paths

GENERATOR = torch.Generator().manual_seed(3)
DOCUMENTS = [
    torch.randint(1, 50, (int(n),), generator=GENERATOR).tolist()
    for n in torch.randint(1, 30, (30,), generator=GENERATOR)
]
TOTAL = sum(map(len, DOCUMENTS))
MODULES = paths(0, 2)
IDENTITY = {"model": "m", "seed": 0}


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch):
    """Hundreds of files in a second: whether they survive a power cut is not asked here."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


class Killed(Exception):
    """Stands in for the end of the process."""


def batches(documents=DOCUMENTS):
    spans = [
        Span(ids, min(2, len(ids) - 1)) if i % 3 == 0 else ids for i, ids in enumerate(documents)
    ]
    return list(bucket(spans, 40, max_padding=0.3, window=8))


def run(path, *, kill_after=None, model=None, seconds=0.0, given=None, modules=MODULES, budget=None,
        identity=IDENTITY, **more):  # fmt: skip
    """Collect with a checkpoint after every batch; how many batches ran, and the moments."""
    model = Tiny(dtype=torch.float32) if model is None else model
    ran = []

    def progress(keys):
        ran.append(keys)
        if len(ran) == kill_after:
            raise Killed

    model.seen.clear()
    checkpoint = None if path is None else Checkpoint(path, identity, seconds)
    try:
        found = collect(model, modules, batches() if given is None else given, budget,
                        progress=progress, checkpoint=checkpoint, **more)  # fmt: skip
    except Killed:
        found = None
    return len(model.seen), found


def same(got, wanted):
    assert list(got) == list(wanted)
    for name, moment in got.items():
        other = wanted[name]
        assert moment.count == other.count and moment.dtype == other.dtype
        assert torch.equal(moment.lower.tril(), other.lower.tril())
        assert moment.quartic is None or torch.equal(moment.quartic, other.quartic)


SETTINGS = [
    {},
    {"dtype": torch.float64},
    {"launch_rows": 37},  # keys wait between batches, and that is part of the order of the sum
    {"launch_rows": 10_000},  # all of them until the end
    {"launch_rows": 37, "dtype": torch.float64, "budget": {MODULES[0]: 41, MODULES[1]: 150}},
    {"budget": 200},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_killed_after_every_batch_in_turn_it_gives_the_same_bits(tmp_path, settings, dtype):
    model = Tiny(dtype=dtype)
    number, whole = run(None, model=model, **settings)
    assert number > 4
    kept, copies = tmp_path / "c", []

    def copy(keys):
        if kept.exists():  # not behind the last batch, when nothing is left to do
            copies.append(shutil.copy(kept, tmp_path / str(len(copies))))

    collect(model, MODULES, batches(), **{"budget": None, **settings},
            progress=copy, checkpoint=Checkpoint(kept, IDENTITY, 0))  # fmt: skip
    assert len(copies) >= number - 1
    for after, path in enumerate(copies[: number - 1], 1):
        left, found = run(path, model=model, seconds=math.inf, **settings)
        assert left == number - after
        same(found, whole)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_killed_again_and_again(tmp_path, settings):
    number, whole = run(None, **settings)
    for _ in range(number - 1):
        # Each run does one batch more; the first call of progress is for the earlier keys.
        ran, found = run(
            tmp_path / "c", kill_after=1 if not (tmp_path / "c").exists() else 2, **settings
        )
        assert (ran, found) == (1, None)
    left, found = run(tmp_path / "c", **settings)
    assert left == 1
    same(found, whole)


def test_progress_counts_every_key_once(tmp_path):
    told = []

    def progress(keys):
        told.append(keys)
        if len(told) == 3:
            raise Killed

    model, given = Tiny(dtype=torch.float32), batches()
    with pytest.raises(Killed):
        collect(model, MODULES, given, None, progress=progress,
                checkpoint=Checkpoint(tmp_path / "c", IDENTITY, 0))  # fmt: skip
    before, again = sum(told), []
    found = collect(model, MODULES, given, None, progress=again.append,
                    checkpoint=Checkpoint(tmp_path / "c", IDENTITY, 0))  # fmt: skip
    assert again[0] == before and sum(again) == found[MODULES[0]].count


def test_some_of_the_modules_go_on_alone(tmp_path):
    # Killed between the files of two modules, only the second is still wanted.
    _, whole = run(None, budget=200)
    run(tmp_path / "c", kill_after=3, budget=200)
    left, found = run(tmp_path / "c", modules=MODULES[1:], budget=200)
    assert left > 0
    same(found, {MODULES[1]: whole[MODULES[1]]})


def test_nothing_runs_where_all_is_there_already(tmp_path):
    budget = {MODULES[0]: 20, MODULES[1]: 200}
    _, whole = run(None, budget=budget)
    run(tmp_path / "c", kill_after=2, budget=budget)
    left, found = run(tmp_path / "c", modules=MODULES[:1], budget=budget)
    assert left == 0
    same(found, {MODULES[0]: whole[MODULES[0]]})


@pytest.mark.parametrize("settings", [{}, {"launch_rows": 10_000}], ids=str)
def test_a_corpus_that_ends_where_it_was_killed(tmp_path, settings):
    number, whole = run(None, **settings)
    assert run(tmp_path / "c", kill_after=number, **settings) == (number, None)
    left, found = run(tmp_path / "c", **settings)
    assert left == 0  # keys that waited are summed all the same
    same(found, whole)


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
    import hashlib

    path = tmp_path / "c"
    run(path, kill_after=3)
    data = path.read_bytes()
    body = data[:-32].replace(b'"version": "1"', b'"version": "2"')
    path.write_bytes(body + hashlib.sha256(body).digest())
    assert run(path)[0] == run(None)[0]
    assert "has version '2'" in caplog.text


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"identity": {**IDENTITY, "seed": 1}}, "seed"),
        ({"identity": {"model": "m"}}, "seed"),
        ({"identity": {**IDENTITY, "more": None, "versions": {"torch": "9"}}}, "versions"),
        ({"dtype": torch.float64}, "order of the sums"),
        ({"launch_rows": 5}, "order of the sums"),
        ({"budget": TOTAL // 2}, "modules or budgets"),
        ({"modules": paths(1, 2)}, "modules or budgets"),
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
    monkeypatch.setattr(checkpoint_module, "_machine", lambda: {"threads": 77, "kernels": []})
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
    with pytest.raises(NonFiniteKeys):
        run(tmp_path / "c", model=model, launch_rows=3)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("seconds", [-1, math.nan])
def test_seconds_that_make_no_sense(seconds):
    with pytest.raises(ValueError, match="must be 0 or more"):
        Checkpoint("c", {}, seconds)


def test_when_it_is_written(tmp_path, monkeypatch):
    """Every five minutes, and less often where a write takes more than 1.5 seconds."""
    now = [1000.0]
    monkeypatch.setattr(checkpoint_module.time, "monotonic", lambda: now[0])
    model, written, took = Tiny(dtype=torch.float32), [], [0.0]

    def write(file, state, taken):
        now[0] += took[0]
        written.append(now[0])

    monkeypatch.setattr(checkpoint_module, "write_checkpoint", write)

    def times(seconds, cost, step, steps):
        took[0] = cost
        written.clear()
        now[0] = 1000.0
        tally = Tally(model, {MODULES[0]: None}, torch.float32)
        checkpoint = Checkpoint(tmp_path / "c", IDENTITY, seconds)
        assert list(checkpoint.resume(tally, [])) == []
        for _ in range(steps):
            now[0] += step
            checkpoint.keep(tally)
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
