"""What forward passes in bfloat16 save of a precompute and what they change: ``python benchmarks/bfloat_forward.py``.

Ten widths of layers 3 to 5 of SmolLM2-135M are collected from `wikipedia_en_sample.jsonl` (in the folder that
FASTMEMIT_DATA names) in float32 and with ``forward="bfloat16"``, in turns, each time into an empty cache: seconds on
the wall and of the processor, and the ratios of neighbouring runs. Then C is compared with that of float32, and so is
the delta of one MEMIT edit with the same target vectors: by the relative Frobenius norm of the difference, layer by
layer. Beside it stands what documents in another order change, in float32: nobody would choose between two orders.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from two_trees import clocks, compared

LAYERS = (3, 4, 5)
DATA = Path(os.environ.get("FASTMEMIT_DATA", Path(__file__).parents[2] / "shared" / "data"))
CORPUS = DATA / "wikipedia_en_sample.jsonl"


def difference(found: dict[str, Any], wanted: dict[str, Any]) -> list[float]:
    """The relative Frobenius norm of what two groups of matrices differ by, one after another."""
    return [round(float((found[n].double() - w.double()).norm() / w.double().norm()), 6) for n, w in wanted.items()]


def compare(
    editor: Any, facts: list[Any], edit: dict[str, Any], length: int, args: argparse.Namespace
) -> dict[str, Any]:
    """The turns with documents cut at a length, and what C and the edit's delta were."""
    from fastmemit import Editor

    kept: dict[str, dict[str, Any]] = {}

    def collect(name: str, **more: Any) -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as empty:
            fresh = Editor(editor.model, editor.tokenizer, cache_dir=empty)
            begun = clocks()
            found = fresh.precompute(CORPUS, multiplier=args.multiplier, layers=LAYERS, max_length=length, **more)
            ended = clocks()
            editor.store.use(found)
            made = editor.plan(facts, "memit", **edit)
            kept[name] = {
                "C": {path: found.second_moment(path) for path in found.paths},
                "delta": {path: left @ right.T for path, (left, right) in made.delta.factors.items()},
            }
        return ended[0] - begun[0], ended[1] - begun[1]

    ways: dict[str, dict[str, Any]] = {"float32": {}, "bfloat16": {"forward": "bfloat16"}}
    turns = []
    for turn in range(1 + args.rounds):
        seconds = {name: collect(name, **ways[name]) for name in sorted(ways, reverse=turn % 2 == 1)}
        turns.append([seconds[name] for name in ways])
        print(f"cut at {length}, turn {turn}: {seconds}", flush=True)
    collect("another order", seed=1)
    row: dict[str, Any] = {"cut_at": length, "multiplier": args.multiplier, "runs": args.rounds}
    for place, clock in enumerate(("wall", "processor")):
        row[clock] = compared([(before[place], after[place]) for before, after in turns[1:]])  # the first warms up
    for name in ("bfloat16", "another order"):
        row[name] = {what: difference(kept[name][what], kept["float32"][what]) for what in ("C", "delta")}
    return row


def main() -> int:
    """Print a line for each length."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default="2048,128", metavar="N,...", help="cut documents at so many tokens")
    parser.add_argument("--multiplier", type=float, default=10.0, metavar="M")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns, beside one that warms up")
    parser.add_argument("--facts", type=int, default=16, metavar="N", help="facts of the edit")
    parser.add_argument("--steps", type=int, default=25, metavar="N", help="steps of their target vectors")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()

    import torch

    from fastcov.machine import this_machine, versions
    from fastmemit import Editor
    from fastmemit.data import load_records

    with tempfile.TemporaryDirectory() as cache:
        editor = Editor.from_pretrained("smollm2", device="cpu", dtype="float32", cache_dir=cache)
        records = load_records(DATA / "counterfact_1400.json")[: args.facts]
        facts = [record.request for record in records]
        edit: dict[str, Any] = {"layers": LAYERS, "steps": args.steps}
        targets = editor.targets(facts, editor.config("memit", **edit))
        edit["targets"] = dict(zip(facts, targets, strict=True))
        rows, load = [], [os.getloadavg()[0]]
        for length in map(int, args.lengths.split(",")):
            rows.append(compare(editor, facts, edit, length, args))
            load.append(os.getloadavg()[0])
            print(json.dumps(rows[-1]), flush=True)
    if args.json:
        machine = {
            **vars(this_machine(torch.device("cpu"))),
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "load_average": round(statistics.median(load), 1),
        }
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
