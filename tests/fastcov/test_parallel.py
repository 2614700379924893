"""Two processes collect the keys of one, and a failure in either ends both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastcov import collect_moments, take
from fastcov.batching import bucket
from fastcov.collecting import Accumulator, Division
from fastcov.distributed import Processes
from fastcov.errors import FastcovError
from reference.tiny import Tiny, keys_of
from tiny_parallel import DOCUMENTS, FAILING, MODULES, SOUND, batches, sums

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests" / "tiny_parallel.py"


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder into which two processes wrote what they found; they run once."""
    folder = tmp_path_factory.mktemp("two")
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(folder)],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for worker in workers:
        _, said = worker.communicate(timeout=240)
        assert worker.returncode == 0, said
    return folder


@pytest.mark.parametrize("case", SOUND)
def test_two_processes_have_the_keys_of_one(two, case):
    budget, n = SOUND[case]
    model = Tiny(dtype=torch.float32)
    one = sums(collect_moments(model, MODULES, batches(DOCUMENTS[:n]), budget, quartic=True))
    both = [torch.load(two / f"sums{rank}.pt")[case] for rank in range(2)]
    for name, layer in zip(MODULES, (0, 2), strict=True):
        alone, count, quartic = one[name]
        keys = keys_of(model, DOCUMENTS[:n], layer).double().abs()
        # Each entry is a sum of `count` products. In float32 (unit roundoff u) any order of adding
        # them is within gamma = count u / (1 - count u) of the exact one, times the sum of the
        # absolute products; so two orders are within twice that of each other.
        rounding = count * 2.0**-24
        bound = 2 * rounding / (1 - rounding) * (keys.T @ keys)
        for found, found_count, found_quartic in (both[0][name], both[1][name]):
            assert found_count == count == (budget[name] if isinstance(budget, dict) else
                                            budget or sum(map(len, DOCUMENTS)))  # fmt: skip
            assert ((found.double() - alone.double()).abs() <= bound).all()
            assert found_quartic == pytest.approx(quartic, rel=1e-6)
        assert torch.equal(both[0][name][0], both[1][name][0])


def test_the_bound_would_show_a_single_key(two):
    """What the test above allows is less than one key more or less would make."""
    count = 301
    model = Tiny(dtype=torch.float32)
    first = keys_of(model, list(take(DOCUMENTS, count, 64)), 0).double()
    rounding = count * 2.0**-24
    bound = 2 * rounding / (1 - rounding) * (first.abs().T @ first.abs())
    assert all((torch.outer(key, key).abs() > bound).any() for key in first)


def test_each_runs_half_and_counts_all(two):
    steps = [json.loads((two / f"said{rank}.json").read_text())["steps"] for rank in range(2)]
    whole = Tiny(dtype=torch.float32)
    collect_moments(whole, MODULES, batches(DOCUMENTS), 301)
    assert [keys for keys, _, _ in steps] == [301, 301]
    assert [n for _, n, _ in steps] == [len(whole.seen)] * 2
    assert [ran for _, _, ran in steps] == [-(-len(whole.seen) // 2), len(whole.seen) // 2]


def test_two_processes_that_were_interrupted_go_on_to_the_same_bits(two):
    for rank in range(2):
        found = torch.load(two / f"sums{rank}.pt")
        for name in MODULES:
            assert torch.equal(found["interrupted"][name][0], found["exact"][name][0])
            assert found["interrupted"][name][1:] == found["exact"][name][1:]
        said = json.loads((two / f"said{rank}.json").read_text())
        before, after = said["parts"]
        assert before >= 1 and before + after == said["steps"][2]  # nothing ran twice


@pytest.mark.parametrize(
    ("case", "kinds", "words"),
    [
        ("too short", {"BudgetNotMet", "FailedElsewhere"}, "keys for 'layers.0.down_proj' but"),
        ("short in one", ("FailedElsewhere", "BudgetNotMet"), "but 300 were wanted"),
        ("other text in one", {"FastcovError", "FailedElsewhere"}, "has read other text"),
        ("nan in one", ("FailedElsewhere", "NonFinite"), "hold NaN or infinity"),
    ],
)
def test_an_error_in_one_process_ends_both(two, case, kinds, words):
    assert case in FAILING
    said = [json.loads((two / f"said{rank}.json").read_text())[case] for rank in range(2)]
    found = [kind for kind, _ in said]
    assert (set(found) if isinstance(kinds, set) else tuple(found)) == kinds
    for kind, message in said:
        assert words in message
        if kind == "FailedElsewhere":
            assert message.startswith(f"Process {1 - found.index(kind)} of 2 failed (")


def test_a_batch_whose_keys_cannot_be_counted():
    processes = Processes(torch.distributed.HashStore(), 1, 2)
    division = Division(processes, Accumulator(Tiny(), {MODULES[0]: 3}, torch.float32))
    with pytest.raises(FastcovError, match="neither input_ids nor an attention_mask"):
        list(division.own([{"inputs_embeds": torch.ones(1, 2, 3)}]))


def test_batches_without_a_mask_are_counted_by_their_tokens():
    processes = Processes(torch.distributed.HashStore(), 1, 2)
    sums = Accumulator(Tiny(), {MODULES[0]: 7, MODULES[1]: None}, torch.float32)
    division = Division(processes, sums)
    own = []
    for batch in division.own({"input_ids": torch.ones(2, n, dtype=torch.long)} for n in (2, 3, 5)):
        own.append(batch["input_ids"].shape[1])
        sums.start(None)  # as whoever runs it does
        sums.skip(0)
    assert own == [3]
    assert (sums.found(MODULES[0]), sums.found(MODULES[1])) == (7, 14)


def test_padding_and_tokens_that_are_no_keys_are_not_counted():
    processes = Processes(torch.distributed.HashStore(), 1, 2)
    sums = Accumulator(Tiny(), {MODULES[0]: None}, torch.float32)
    (batch,) = bucket([[1, 2, 3], [4, 5]], 100, max_padding=0.9)
    division = Division(processes, sums)
    keys = {**batch, "key_mask": batch["attention_mask"] * (batch["position_ids"] > 0)}
    assert list(division.own([batch])) == [] and sums.found(MODULES[0]) == 5
    sums.start(None)  # the one after is this process's
    assert list(division.own([keys])) == [] and sums.found(MODULES[0]) == 8
