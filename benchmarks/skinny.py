"""Products of few rows by our kernels and by torch, and what they make of one fact: ``python benchmarks/skinny.py``.

For each matrix and number of rows, milliseconds of torch's product and of ours, along (x W^T, a layer forwards) and
across (x W, the same backwards), and of adding up the matrix, which reads it once; the best of many in turns. With
``--models`` first, in seconds, one fact's target vector and 32 tokens of greedy text, by both in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "python"):
    sys.path.insert(0, str(folder))

import torch  # noqa: E402

from fastcov import hooks  # noqa: E402
from fastcov.machine import this_machine, versions  # noqa: E402

MATRICES = ((49152, 576), (1536, 576), (576, 1536), (2048, 640), (2560, 2560))
ROWS = (1, 2, 4, 8, 14, 16, 32, 64)
FACTS = (("The mother tongue of {} is", "Danielle Darrieux", "English"), ("{} is located in", "The Louvre", "Rome"))


def best(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """The least milliseconds of each call, in turns."""
    least = dict.fromkeys(calls, float("inf"))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, call in calls.items():
            call()  # warms the caches with its own matrix
            begun = time.perf_counter()
            call()
            least[name] = min(least[name], 1e3 * (time.perf_counter() - begun))
    return least


def products(seconds: float) -> list[dict[str, Any]]:
    """A line for each matrix and number of rows."""
    lines = []
    for n, k in MATRICES:
        weight = torch.randn(n, k)
        for m in ROWS:
            x, g = torch.randn(m, k), torch.randn(m, n)
            found = best({
                "torch_along": lambda: x @ weight.T, "ours_along": lambda: hooks.product(x, weight),  # noqa: B023
                "torch_across": lambda: g @ weight,  # noqa: B023
                "ours_across": lambda: hooks.product(g, weight, across=True),  # noqa: B023
                "sum": lambda: weight.sum(),  # noqa: B023
            }, seconds)  # fmt: skip
            print(f"({n}, {k}) by {m:2}: " + ", ".join(f"{name} {ms:.3f}" for name, ms in found.items()), flush=True)
            lines.append({"n": n, "k": k, "m": m, **found})
    return lines


def whole(name: str, rounds: int) -> dict[str, Any]:
    """Seconds of a target vector by each rule and of a text, with and without the kernels, on both clocks."""
    from fastmemit import Editor

    folder = tempfile.TemporaryDirectory()
    editor = Editor.from_pretrained(name, device="cpu", dtype="float32", cache_dir=folder.name)
    seconds: dict[str, list[tuple[float, float]]] = {}
    for turn in range(rounds + 1):  # the first warms up
        for fact in FACTS:
            for task in ("adam", "rotate", "text"):
                for ours in (False, True):
                    kernels = nullcontext() if ours else mock.patch.object(hooks, "skinny_kernel", lambda: None)
                    wall, processor = time.perf_counter(), time.process_time()
                    with kernels:
                        if task == "text":
                            editor.generate([fact[0].format(fact[1])], 32)
                        else:
                            config = editor.config("memit", optimiser=task)
                            editor.targets([fact], config, stored=False)
                    taken = time.perf_counter() - wall, time.process_time() - processor
                    if turn:
                        seconds.setdefault(f"{task}, {'ours' if ours else 'torch'}", []).append(taken)
    found = {task: [round(statistics.median(clock), 3) for clock in zip(*runs, strict=True)]
             for task, runs in seconds.items()}  # fmt: skip
    print(editor.name, found, flush=True)
    return {"model": editor.name, "seconds_wall_and_processor": found}


def main() -> None:
    """Print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.3, help="for each line of products")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    here = this_machine(torch.device("cpu"))
    found = {"cpu": here.cpu, "isa": list(here.isa), "threads": torch.get_num_threads(), "versions": versions(),
             "models": [whole(name, args.rounds) for name in args.models],
             "products_ms": products(args.seconds)}  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
