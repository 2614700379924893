"""One small edit beside busy loops, by how OpenMP's threads wait: ``python benchmarks/busy_machine.py --json FILE``.

One process for each way to wait loads SmolLM2-135M and stands by. They take turns at computing the same edit (one
fact, MEMIT, its target vector optimised anew), beside none and beside two loops that keep a core busy each. An edit
that has two cores to itself and then shares them with two loops has half of its time left, so twice the seconds are
its share; what is above that is lost to waiting. The processor's time says where it goes: a thread that waits for
another one that does not run spins, and spinning counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from two_trees import clocks

#: What the environment says of OpenMP, by name; the command line says the third where nothing is said.
WAYS: dict[str, dict[str, str]] = {
    "libgomp's own": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "spin 1000": {"GOMP_SPINCOUNT": "1000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
SAID = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
FACT = ("The Eiffel Tower is located in the city of", "Eiffel Tower", "Rome")
STEPS = 4


def serve(cache: str) -> None:
    """Compute the edit for each line of stdin; answer with its seconds, on the wall and of the processor."""
    out, sys.stdout = sys.stdout, sys.stderr
    from fastmemit import Editor
    from fastmemit.targets import TargetStore

    editor = Editor.from_pretrained("smollm2", device="cpu", dtype="float32", cache_dir=cache)
    editor.precompute("builtin", multiplier=1, method="memit", allow_fewer=True)
    editor.contexts("memit")
    print("ready", file=out, flush=True)
    for _ in sys.stdin:
        editor.workspace.stored_targets = TargetStore(None)
        begun = clocks()
        editor.plan([FACT], "memit", steps=STEPS)
        ended = clocks()
        print(json.dumps([ended[0] - begun[0], ended[1] - begun[1]]), file=out, flush=True)


class Worker:
    """A process whose threads wait in one way."""

    def __init__(self, settings: dict[str, str], cache: str) -> None:
        kept = {name: value for name, value in os.environ.items() if name not in SAID}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", cache],
            env={**kept, **settings, "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.answer()

    def answer(self) -> str:
        """What it writes next."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def __call__(self) -> tuple[float, float]:
        """The seconds of one edit, on the wall and of the processor."""
        assert self.process.stdin is not None
        self.process.stdin.write("edit\n")
        self.process.stdin.flush()
        wall, processor = json.loads(self.answer())
        return wall, processor


@contextmanager
def loops(number: int) -> Iterator[None]:
    """So many processes that compute all the time."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        time.sleep(0.1)
        yield
    finally:
        for each in busy:
            each.kill()
            each.wait()


def measured(ways: list[str], beside: list[int], rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each number of loops and way to wait."""
    # Caches are filled by the first; the others find what it stored.
    cache = tempfile.mkdtemp()
    workers = {way: Worker(WAYS[way], cache) for way in ways}
    for worker in workers.values():
        worker()  # warms up
    for number in beside:
        runs: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        load = os.getloadavg()[0]
        for turn in range(rounds):
            for way in ways if turn % 2 else ways[::-1]:
                with loops(number):
                    runs[way].append(workers[way]())
        for way in ways:
            wall, processor = zip(*runs[way], strict=True)
            ratios = [run[0] / base[0] for run, base in zip(runs[way], runs[ways[0]], strict=True)]
            yield {
                "loops": number,
                "waiting": way,
                "wall_s": [round(each, 2) for each in wall],
                "processor_s": [round(each, 2) for each in processor],
                "wall_median_s": round(statistics.median(wall), 2),
                "processor_median_s": round(statistics.median(processor), 2),
                "wall_ratio": round(statistics.median(ratios), 3),
                "load_average": [round(load, 1), round(os.getloadavg()[0], 1)],
            }


def main() -> int:
    """Print a line for each number of loops and way to wait."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", metavar="CACHE", help=argparse.SUPPRESS)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--loops", nargs="*", type=int, default=[0, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
        return 0
    rows: list[dict[str, Any]] = []
    for row in measured(args.ways, args.loops, args.rounds):
        rows.append(row)
        print(row, flush=True)
        if args.json:
            import torch
            import transformers

            from fastcov.machine import this_machine

            machine = {
                "processor": this_machine(torch.device("cpu")).cpu,
                "cores": os.cpu_count(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            }
            args.json.write_text(json.dumps({"machine": machine, "steps": STEPS, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
