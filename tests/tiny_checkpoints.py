"""Collects with a checkpoint after every batch, for the tests of `fastcov.store`."""

from __future__ import annotations

import os
from contextlib import nullcontext
from unittest import mock

import pytest
import torch

from fastcov import Checkpoint, bucket, collect_moments
from fastcov.batching import Span
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
def quick_disk(monkeypatch):
    """Hundreds of files in a second: whether they survive a power cut is not asked here."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def launches(rows):
    """Inside, kernels are given at least so many rows at once, on a CPU too; None changes nothing."""
    if rows is None:
        return nullcontext()
    return mock.patch.multiple("fastcov.collecting", LAUNCH_ROWS=rows, CPU_LAUNCH_ROWS=rows)


class Killed(Exception):
    """Stands in for the end of the process."""


def batches(documents=DOCUMENTS):
    spans = [Span(ids, min(2, len(ids) - 1)) if i % 3 == 0 else ids for i, ids in enumerate(documents)]
    return list(bucket(spans, 40, max_padding=0.3, window=8))


def run(path, *, kill_after=None, model=None, seconds=0.0, given=None, modules=MODULES, budget=None,
        identity=IDENTITY, launch_rows=None, told=None, quartic=True, **more):  # fmt: skip
    """Collect with a checkpoint after every batch; how many batches ran, and the moments."""
    model = Tiny(dtype=torch.float32) if model is None else model
    ran = []

    def progress(keys):
        ran.append(keys)
        if told is not None:
            told(keys)
        if len(ran) == kill_after:
            raise Killed

    model.seen.clear()
    checkpoint = None if path is None else Checkpoint(path, identity, seconds)
    try:
        with launches(launch_rows):
            found = collect_moments(model, modules, batches() if given is None else given, budget, quartic=quartic,
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
        assert (moment.quartic is None) == (other.quartic is None)
        assert moment.quartic is None or torch.equal(moment.quartic, other.quartic)
