"""One of two processes that collect together; see fastcov/test_parallel.py."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from fastcov import Checkpoint, FastcovError, Processes, bucket, collect_moments
from reference.tiny import Tiny, paths

DOCUMENTS = [
    torch.randint(1, 50, (int(n),), generator=torch.Generator().manual_seed(int(n))).tolist()
    for n in torch.randint(1, 30, (40,), generator=torch.Generator().manual_seed(5))
]
MODULES = paths(0, 2)
TOKENS = 64
#: Name -> budget, and how many of the documents there are.
SOUND = {
    "exact": (301, 40),
    "all": (None, 40),
    "each its own": ({MODULES[0]: 37, MODULES[1]: 200}, 40),
    "one batch": (20, 2),
}
FAILING = ("too short", "short in one", "other text in one", "nan in one")


def batches(documents):
    return bucket(documents, TOKENS, window=16)


def sums(moments):
    return {name: (moment.sum, moment.count, float(moment.quartic)) for name, moment in moments.items()}


def fails(case, rank, processes):
    model, documents = Tiny(dtype=torch.float32), [list(d) for d in DOCUMENTS]
    budget = 300
    if case == "too short":
        budget = 10_000
    if case == "short in one" and rank == 1:
        documents = documents[:5]
    if case == "other text in one" and rank == 1:
        documents[0][0] += 1
    if case == "nan in one" and rank == 1:
        with torch.no_grad():
            model.layers[0].up.weight[0, 0] = float("nan")
    try:
        collect_moments(model, MODULES, batches(documents), budget, quartic=True, processes=processes)
    except FastcovError as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


def interrupted(rank, folder, processes):
    """Killed at another batch in each process, and gone on with; the sums, and what ran then."""
    checkpoint = Checkpoint(folder / f"part{rank}", identity={"rank": rank}, seconds=0)

    def broken():
        for number, batch in enumerate(batches(DOCUMENTS)):
            if (rank, number) == (1, 6):
                raise OSError("the text broke off")
            yield batch

    model = Tiny(dtype=torch.float32)
    with contextlib.suppress(OSError, FastcovError):
        collect_moments(
            model, MODULES, broken(), 301, checkpoint=checkpoint, quartic=True, processes=processes("broken")
        )
    before = len(model.seen)
    moments = collect_moments(
        model, MODULES, batches(DOCUMENTS), 301, quartic=True, checkpoint=checkpoint, processes=processes("again")
    )
    return sums(moments), [before, len(model.seen) - before]


def main(rank, folder):
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=dist.PrefixStore("g", store), rank=rank, world_size=2)

    def processes(name):
        return Processes(dist.PrefixStore(name, store), rank, 2, timeout=60)

    found, steps = {}, []
    for name, (budget, n) in SOUND.items():
        model = Tiny(dtype=torch.float32)
        done = [] if name == "exact" else None
        moments = collect_moments(
            model, MODULES, batches(DOCUMENTS[:n]), budget, quartic=True, processes=processes(name),
            progress=None if done is None else done.append,
        )  # fmt: skip
        found[name] = sums(moments)
        if done is not None:
            steps = [sum(done), len(done), len(model.seen)]
    found["interrupted"], parts = interrupted(rank, folder, processes)
    torch.save(found, folder / f"sums{rank}.pt")
    said = {case: fails(case, rank, processes(case)) for case in FAILING}
    (folder / f"said{rank}.json").write_text(json.dumps({"steps": steps, "parts": parts, **said}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
