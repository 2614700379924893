"""A collect killed after any batch goes on to the same bits."""

from __future__ import annotations

import math
import shutil
from unittest import mock

import pytest
import torch

from fastcov import Checkpoint, collect_moments
from reference.tiny import Tiny
from tiny_checkpoints import (
    IDENTITY,
    MODULES,
    Killed,
    batches,
    quick_disk,  # noqa: F401
    run,
    same,
)

SETTINGS = [
    {},
    {"dtype": torch.float64},
    {"launch_rows": 37},  # keys wait between batches, and that is part of the order of the sum
    {"launch_rows": 10_000},  # all of them until the end
    {"launch_rows": 37, "quartic": False},  # as it is where nobody asks for them
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

    run(kept, model=model, told=copy, **settings)
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
        ran, found = run(tmp_path / "c", kill_after=1 if not (tmp_path / "c").exists() else 2, **settings)
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
        collect_moments(model, MODULES, given, None, progress=progress,
                checkpoint=Checkpoint(tmp_path / "c", IDENTITY, 0))  # fmt: skip
    before, again = sum(told), []
    found = collect_moments(model, MODULES, given, None, progress=again.append,
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


def test_keys_that_waited_for_a_large_launch_are_summed_where_nothing_waits(tmp_path):
    # Begun on a GPU, whose launches are large, and gone on with on a CPU, which takes batches as they come.
    number, whole = run(None)
    run(tmp_path / "c", kill_after=3, launch_rows=10_000)
    with mock.patch.multiple("fastcov.collecting", LAUNCH_ROWS=10_000, CPU_LAUNCH_ROWS=1):
        left, found = run(tmp_path / "c")
    assert left == number - 3
    for name, moment in found.items():
        assert moment.count == whole[name].count
        torch.testing.assert_close(moment.sum, whole[name].sum)
