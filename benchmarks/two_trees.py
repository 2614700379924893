"""The same work by two checkouts, in turns: ``python benchmarks/two_trees.py BEFORE AFTER``.

One process for each checkout loads SmolLM2-135M and stands by; the tasks alternate between the two,
so that what else the machine does falls on both. Printed and written with ``--json`` are the
medians in seconds and the median of the ratios of neighbouring runs, with the quarter of them that
lies lowest and highest; and the same of the processor's time, which other work disturbs less.

Tasks: the model's fingerprint; a precompute (three layers, multiplier 1, into an empty cache), on a
model that was measured before and on one that was not; an edit of 16 facts whose target vectors are
stored, without and with the questions before and after, these where the unedited model was asked
before and where it was not; the evaluation of 16 records whose target vectors are stored; rank-k
updates of 32 and of 2,048 keys.  A checkout that measures or asks nothing does the same in both.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

REPEATS = {
    "fingerprint": 15,
    "precompute": 7,
    "precompute, model unknown": 5,
    "edit": 9,
    "edit, asked": 9,
    "edit, asked for the first time": 5,
    "evaluate": 3,
}
DATA = Path(os.environ.get("FASTMEMIT_DATA", Path(__file__).parents[2] / "shared" / "data"))


def tasks() -> dict[str, Callable[[], object]]:
    """What a checkout is asked to do, by name."""
    import torch

    from fastcov import rank_k_update
    from fastmemit import Editor
    from fastmemit.data import load_records
    from fastmemit.evaluation import evaluate
    from fastmemit.models import fingerprint, load_model

    model, tokenizer = load_model("smollm2", device="cpu", dtype="float32")
    cache = tempfile.mkdtemp()
    # The argument's name was another one before the first release.
    where = "cache_dir" if "cache_dir" in inspect.signature(Editor).parameters else "cache"
    editor = Editor(model, tokenizer, **{where: cache})
    collect = {"multiplier": 1, "layers": editor.config("memit").layers, "allow_fewer": True}
    editor.precompute("builtin", **collect)
    records = load_records(DATA / "counterfact_1400.json")[:16]
    facts = [record.request for record in records]

    def edit(**settings: Any) -> tuple[float, float]:
        begun = clocks()
        made = editor.edit(facts, "memit", **settings)
        ended = clocks()
        made.undo()
        return ended[0] - begun[0], ended[1] - begun[1]

    def precompute() -> None:
        Editor(model, tokenizer, **{where: tempfile.mkdtemp()}).precompute("builtin", **collect)

    def rank_k(n: int, d: int) -> Callable[[], None]:
        c, x = torch.zeros(d, d), torch.randn(n, d, generator=torch.Generator().manual_seed(0))
        times = 2_000_000_000 // (n * d * d) + 1
        return lambda: [rank_k_update(c, x) for _ in range(times)] and None

    def forget() -> None:
        """As in a new process, where nothing was measured or asked yet."""
        getattr(sys.modules.get("fastmemit.models.running"), "_found", {}).clear()
        getattr(getattr(editor, "sources", editor), "_replies", ("", {}))[1].clear()

    def anew(task: Callable[[], object]) -> Callable[[], object]:
        return lambda: [forget(), task()][1]

    quiet: dict[str, Any] = {"verify": False}
    try:
        edit(**quiet)
    except Exception:  # a checkout from before the question
        quiet = {}
        edit()
    edit()
    return {
        "fingerprint": lambda: fingerprint(model),
        "precompute": precompute,
        "precompute, model unknown": anew(precompute),
        "edit": lambda: edit(**quiet),
        "edit, asked": edit,
        "edit, asked for the first time": anew(edit),
        "evaluate": lambda: evaluate(editor, [records], "memit"),
        "rank-k, 32 x 64": rank_k(32, 64),
        "rank-k, 2048 x 1536": rank_k(2048, 1536),
    }


def clocks() -> tuple[float, float]:
    """Seconds on the wall and of the processor."""
    return time.perf_counter(), time.process_time()


def serve() -> None:
    """Do what each line of stdin names; answer with its seconds, on the wall and of the processor."""
    out, sys.stdout = sys.stdout, sys.stderr
    known = tasks()
    print(json.dumps(list(known)), file=out, flush=True)
    for line in sys.stdin:
        begun = clocks()
        own = known[line.strip()]()
        ended = clocks()
        seconds = own if isinstance(own, tuple) else (ended[0] - begun[0], ended[1] - begun[1])
        print(json.dumps(seconds), file=out, flush=True)


class Worker:
    """A process that works with one checkout."""

    def __init__(self, tree: Path) -> None:
        paths = os.pathsep.join([str(tree), str(tree / "python")])
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def answer(self) -> Any:
        """What it writes next."""
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def __call__(self, task: str) -> tuple[float, float]:
        """The seconds of one turn of a task, on the wall and of the processor."""
        assert self.process.stdin is not None
        self.process.stdin.write(task + "\n")
        self.process.stdin.flush()
        wall, processor = self.answer()
        return wall, processor


def compared(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Medians before and after, and the ratios of neighbouring runs."""
    ratios = sorted(after / before for before, after in pairs)
    before, after = zip(*pairs, strict=True)
    quarter = len(ratios) // 4
    return {
        "before_s": round(statistics.median(before), 4),
        "after_s": round(statistics.median(after), 4),
        "ratio": round(statistics.median(ratios), 3),
        "quartiles": [round(ratios[quarter], 3), round(ratios[-1 - quarter], 3)],
        "least": round(min(after) / min(before), 3),
    }


def main() -> int:
    """Print a line for each task."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trees", nargs="*", type=Path, metavar="CHECKOUT")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--tasks", nargs="*", metavar="NAME", help="only these")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.serve:
        serve()
        return 0
    workers = [Worker(tree.resolve()) for tree in args.trees]
    names, *_ = [worker.answer() for worker in workers]
    rows: list[dict[str, Any]] = []
    load = [os.getloadavg()[0]]
    for name in args.tasks or names:
        turns = []
        for turn in range(1 + REPEATS.get(name, 9)):
            order = workers if turn % 2 else workers[::-1]
            seconds = {id(worker): worker(name) for worker in order}
            turns.append([seconds[id(worker)] for worker in workers])
        row: dict[str, Any] = {"task": name, "runs": len(turns) - 1}
        for place, clock in enumerate(("wall", "processor")):
            row[clock] = compared([(before[place], after[place]) for before, after in turns[1:]])  # the first warms up
        rows.append(row)
        load.append(os.getloadavg()[0])
        print(row, flush=True)
    if args.json:
        import torch

        machine = {
            "processor": platform.processor(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "load_averages": load,
        }
        args.json.write_text(json.dumps({"machine": machine, "tasks": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
