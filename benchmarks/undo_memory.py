"""Many edits on one model: memory, bits and time: ``python benchmarks/undo_memory.py``.

1,000 edits of rank 1 on weights of SmolLM2-135M's shape (576 x 1,536, each edit on two of six layers), then 500 undone
at random places among those that the order allows. The weights must have, bit for bit, what they had when the edits
below were on top. At 10, 30, 100, 300 and 1,000 edits two sizes are printed: what the process holds in memory, which
includes what the C library keeps for reuse, and what its tensors hold, the deltas (17 kB an edit) among them.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import nn

from fastcov.machine import versions
from fastmemit.delta import Delta
from fastmemit.edits import Edit, EditStack
from fastmemit.models import checksum

ROWS, COLUMNS, LAYERS = 576, 1536, 6


class _Config:
    def to_dict(self) -> dict[str, object]:
        return {}


class _Model(nn.Module):
    config = _Config()

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(COLUMNS, ROWS, bias=False) for _ in range(LAYERS))


def resident() -> int:
    """MB that the process holds in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 // 10**6


def in_tensors() -> int:
    """MB in all tensors that Python has, each storage once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        storages = [each.untyped_storage() for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()) // 10**6


def main() -> int:
    """Print what was measured as JSON; 1 where bits were not right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--edits", type=int, default=1000)
    args = parser.parse_args()
    torch.manual_seed(0)
    draw = random.Random(0)
    model = _Model()
    stack = EditStack.of(model)
    names = [f"layers.{layer}.weight" for layer in range(LAYERS)]
    below = {name: [checksum(model.get_parameter(name))] for name in names}
    edits: list[Edit] = []
    found: dict[str, object] = {"MB without an edit": resident()}
    begun = time.process_time()
    for number in range(1, args.edits + 1):
        chosen = draw.sample(names, 2)
        factors = {name: (torch.randn(ROWS, 1), torch.randn(COLUMNS, 1)) for name in chosen}
        edits.append(Edit(Delta(factors, {}), stack).apply())
        for name in chosen:
            below[name].append(checksum(model.get_parameter(name)))
        if number in (10, 30, 100, 300, 1000):
            found[f"MB at {number} edits"] = resident()
            found[f"MB in tensors at {number} edits"] = in_tensors()
    found["CPU ms an edit"] = round(1e3 * (time.process_time() - begun) / args.edits, 1)
    begun = time.process_time()
    wrong = 0
    for _ in range(args.edits // 2):
        allowed = [edit for edit in edits[-40:] if not stack._above(edit)]
        edit = draw.choice(allowed)
        edit.undo()
        edits.remove(edit)
        for name in edit.delta.factors:
            below[name].pop()
            wrong += checksum(model.get_parameter(name)) != below[name][-1]
    found["CPU ms an undo"] = round(1e3 * (time.process_time() - begun) / (args.edits // 2), 1)
    found["undone"], found["weights with other bits"] = args.edits // 2, wrong
    found["MB afterwards"], found["versions"] = resident(), versions()
    print(json.dumps(found, indent=1))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
