"""What an edit costs: seconds and memory a fact, by model, method, optimiser and batch.

    python benchmarks/edit_cost.py --models smollm2 gemma-3-270m-q4_k_m.gguf --data counterfact_1400.json --json FILE

Each cell runs in a process of its own, on 16 records of positions 1,040 on (`fastmemit.data.batches`), whose target
vectors are computed anew. Statistics of ten widths of the built-in prose, or of all of it, are collected by the first
cell of a model and read by the others. Seconds are of the wall and of the processor; memory is what the process held at
most beyond what it held with the model loaded and asked once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "python"):
    sys.path.insert(0, str(folder))

import torch  # noqa: E402

from fastcov.bench.measure import peak_beyond  # noqa: E402
from fastcov.machine import this_machine, versions  # noqa: E402
from fastmemit import Editor  # noqa: E402
from fastmemit.data import batches, load_records  # noqa: E402

# Method, optimiser or "none" where there are no target vectors, facts in a batch, batches.
CELLS = [(method, optimiser, size, 16 // size if size > 1 else 4)
         for method in ("memit", "emmet") for optimiser in ("adam", "rotate") for size in (1, 16)]  # fmt: skip
CELLS += [("rome", "adam", 1, 4), ("rome", "rotate", 1, 4), ("alphaedit", "adam", 16, 1),
          ("ultraedit", "none", 1, 4), ("ultraedit", "none", 16, 1)]  # fmt: skip
FIRST = 1040


def clocks() -> tuple[float, float]:
    """Seconds of the wall and of the processor."""
    return time.perf_counter(), time.process_time()


def measure(model: str, data: str, cache: str, method: str, optimiser: str, size: int, number: int) -> dict[str, Any]:
    """One cell, in this process."""
    editor = Editor.from_pretrained(model, device="cpu", dtype="float32", cache_dir=cache)
    records = [one[0] for one in batches(load_records(data), 1, seed=0)][FIRST : FIRST + size * number]
    config = editor.config(method, **({} if optimiser == "none" else {"optimiser": optimiser}))
    begun = clocks()
    if config.needs_statistics:
        editor.precompute("builtin", multiplier=10, layers=config.layers, allow_fewer=True)
    collected = [after - before for before, after in zip(begun, clocks(), strict=True)]
    editor.ask([record.request for record in records[:2]])
    spent = {step: (0.0, 0.0) for step in ("targets", "edit")}

    def write() -> None:
        for at in range(0, len(records), size):
            requests = [record.request for record in records[at : at + size]]
            for step in spent:
                wall, processor = clocks()
                if step == "targets":
                    editor.targets(requests, config)
                else:
                    edit = editor.edit(requests, config, verify=False)
                ended = clocks()
                spent[step] = (spent[step][0] + ended[0] - wall, spent[step][1] + ended[1] - processor)
            edit.undo()

    peak = peak_beyond(write, torch.device("cpu"))
    facts = {step: [round(seconds / len(records), 3) for seconds in both] for step, both in spent.items()}
    return {"model": editor.name, "method": method, "optimiser": optimiser, "batch": size, "facts": len(records),
            "layers": list(config.layers), "statistics_s": [round(each, 2) for each in collected],
            "a_fact_s": facts, "peak_bytes": peak, "threads": torch.get_num_threads(),
            "load_average": os.getloadavg()[0]}  # fmt: skip


def main() -> None:
    """Print a table, a line as each cell ends, and write the raw figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["smollm2"])
    parser.add_argument("--data", required=True, help="CounterFact records")
    parser.add_argument("--methods", nargs="+", help="only the cells of these (default: all)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cell", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        method, optimiser, size, number = *args.cell[1:3], *map(int, args.cell[3:])
        print(json.dumps(measure(args.cell[0], args.data, args.cache, method, optimiser, size, number)))
        return
    here = this_machine(torch.device("cpu"))
    found: dict[str, Any] = {"cpu": here.cpu, "isa": list(here.isa), "cores": here.cores, "versions": versions(),
                             "seconds": "of the wall, of the processor", "cells": []}  # fmt: skip
    print("| model | method | targets | batch | targets, s | the rest, s | MB |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: |")
    for model in args.models:
        with tempfile.TemporaryDirectory() as cache:
            for cell in [cell for cell in CELLS if args.methods is None or cell[0] in args.methods]:
                shutil.rmtree(Path(cache) / "targets", ignore_errors=True)
                words = [sys.executable, __file__, "--data", args.data, "--cache", cache, "--cell", model]
                ran = subprocess.run([*words, *map(str, cell)], stdout=subprocess.PIPE, text=True, check=True)
                line = json.loads(ran.stdout.splitlines()[-1])
                found["cells"].append(line)
                seconds = line["a_fact_s"]
                print(f"| {line['model']} | {cell[0]} | {cell[1]} | {cell[2]} | {seconds['targets'][0]:.2f} "
                      f"| {seconds['edit'][0]:.2f} | {(line['peak_bytes'] or 0) / 1e6:.0f} |", flush=True)  # fmt: skip
                if args.json:
                    args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
