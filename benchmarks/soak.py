"""Long runs: hundreds of edits that come and go, and precomputes that are killed.

    python benchmarks/soak.py edits --edits 500 --json benchmarks/results/soak-edits.json python benchmarks/soak.py
    kills --cycles 100 --json benchmarks/results/soak-kills.json

`edits` applies and undoes one edit after the other, of all methods, of batches of every size, on every way there is:
applied at once, planned and then applied, saved, loaded and applied. No fact comes twice. After each undo every weight
must have the bits that it had. Memory is read after each: what the process has, and what Python's objects take
(tracemalloc). A line through the second half says how much an edit leaves behind, with the standard error of its slope.

`kills` is in soak_kills.py. Both leave with 1 where anything was lost.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
import tracemalloc
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "python", ROOT / "tests", ROOT / "benchmarks"):
    sys.path.insert(0, str(folder))

METHODS = ("rome", "emmet", "memit")
WAYS = ("edit", "plan", "file", "block")
_LARGEST = {"rome": 1, "emmet": 8, "memit": 8}  # facts of a batch


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the two, print, write."""
    args = _arguments(argv)
    begun = time.perf_counter()
    if args.mode == "edits":
        result = soak_edits(args.edits, model=args.model, facts=args.facts, seed=args.seed, say=_say)
    else:
        from soak_kills import soak_kills

        result = soak_kills(
            args.cycles, seconds=args.checkpoint_seconds, multiplier=args.multiplier,
            seed=args.seed, say=_say,
        )  # fmt: skip
    result = {"mode": args.mode, **result, "seconds": round(time.perf_counter() - begun, 1)}
    _say(json.dumps({k: v for k, v in result.items() if k != "samples"}, indent=1))
    if args.json:
        from fastcov.files import atomic_file

        with atomic_file(args.json) as file:
            file.write((json.dumps({**result, **_here()}, indent=1) + "\n").encode())
    return 0 if result["sound"] else 1


def soak_edits(
    edits: int,
    *,
    model: str = "tiny",
    facts: str | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Edits that come and go on one model.

    Args:
        edits: How many.
        model: ``"tiny"`` (random weights), or a name that `fastmemit.models.load_model` takes.
        facts: A file of CounterFact records; None takes the facts that the package ships.
        seed: Of the facts, methods, sizes and ways.
        say: Called with a line now and then.

    Returns:
        JSON values; `samples` are bytes after each edit.
    """
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        editor, settings = _editor(model, Path(name), facts)
        requests = _requests(facts, draw)
        before = {name: _bits(tensor) for name, tensor in editor.model.state_dict().items()}
        broken: list[int] = []
        counts: dict[str, int] = {}
        # Of a fixed size: a list that grows would be measured as well.
        rss, traced = array("q", bytes(8 * edits)), array("q", bytes(8 * edits))
        gc.freeze()  # what is there already needs no look after each edit
        tracemalloc.start()
        try:
            for number in range(edits):
                method, way = METHODS[number % 3], WAYS[number // 3 % 4]
                some = list(islice(requests, draw.randint(1, _LARGEST[method])))
                _come_and_go(editor, some, method, way, Path(name) / "edit", settings[method])
                counts[f"{method}, {way}"] = counts.get(f"{method}, {way}", 0) + 1
                now = {name: _bits(tensor) for name, tensor in editor.model.state_dict().items()}
                if now != before or editor.edits:
                    broken.append(number)
                del now
                gc.collect()
                rss[number] = _resident()
                traced[number] = tracemalloc.get_traced_memory()[0]
                if (number + 1) % 50 == 0:
                    say(f"{number + 1} edits, {rss[-1] / 2**20:.1f} MiB")
        finally:
            tracemalloc.stop()
            gc.unfreeze()
    return {
        "model": model,
        "edits": edits,
        "undone_to_other_bits": broken,
        "edits_of_each_kind": counts,
        "resident_bytes": {"first": rss[0], "half": rss[edits // 2], "last": rss[-1]},
        "resident_bytes_per_edit": slope(rss[edits // 2 :]),
        "python_bytes_per_edit": slope(traced[edits // 2 :]),
        "sound": not broken,
        "seed": seed,
        "samples": {"resident": list(rss), "python": list(traced)},
    }


def slope(values: Sequence[float]) -> dict[str, float]:
    """How much values rise from one to the next: of the line of least squares.

    Returns:
        ``bytes`` and ``standard_error``, by the usual formula for independent residuals.
    """
    n = len(values)
    fit = statistics.linear_regression(range(n), values)
    residual = sum((y - fit.intercept - fit.slope * x) ** 2 for x, y in enumerate(values))
    spread = n * (n * n - 1) / 12  # the sum of (x - mean)^2 over 0 .. n - 1
    error = math.sqrt(residual / max(n - 2, 1) / spread)
    return {"bytes": round(fit.slope, 1), "standard_error": round(error, 1)}


def _come_and_go(editor: Any, requests: list[Any], method: str, way: str, path: Path, settings: dict[str, Any]) -> None:
    """One edit in one of `WAYS`, in the weights and out of them again."""
    if way == "plan":
        edit = editor.plan(requests, method, **settings).apply()
        edit.undo()
        edit.apply().undo()
    elif way == "block":
        edit = editor.edit(requests, method, verify=False, **settings)
        with edit:
            pass
    else:
        edit = editor.edit(requests, method, verify=False, **settings)
        if way == "file":
            edit.save(path)
        edit.undo()
        if way == "file":
            editor.load(path).apply().undo()


def _editor(model: str, folder: Path, facts: str | None) -> tuple[Any, dict[str, dict[str, Any]]]:
    """An editor with statistics, and the settings of each method."""
    from fastmemit.editor import Editor

    if model == "tiny":
        from tiny_editors import tiny_editor

        quick: dict[str, Any] = {"steps": 3}
        return tiny_editor(folder), {
            "rome": {**quick, "layers": (0,)},
            "emmet": {**quick, "layers": (0,)},
            "memit": {**quick, "layers": (0, 1)},
        }
    editor = Editor.from_pretrained(model, device="cpu", dtype="float32", cache_dir=folder)
    editor.precompute("builtin", multiplier=3)
    return editor, {method: {"steps": 5} for method in METHODS}


def _requests(facts: str | None, draw: random.Random) -> Iterator[Any]:
    """Facts without end, in rounds; from the second on their subjects have a number."""
    from fastmemit.data import builtin_facts, load_records

    records = load_records(facts) if facts else builtin_facts()
    known = [record.request for record in records]
    for number in count(1):
        draw.shuffle(known)
        for fact in known:
            subject = fact.subject if number == 1 else f"{fact.subject} {number}"
            yield dataclasses.replace(fact, subject=subject)


def _bits(tensor: Any) -> str:
    from fastmemit.models import checksum

    return checksum(tensor)


def _resident() -> int:
    """Bytes of memory that the process has now, without what malloc keeps of what was freed."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:  # of glibc alone
        trim(0)
    try:
        import psutil
    except ImportError:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return int(psutil.Process().memory_info().rss)


def _here() -> dict[str, Any]:
    """The machine and the versions."""
    import torch
    import transformers

    from fastcov.machine import this_machine, versions

    found = dataclasses.asdict(this_machine(torch.device("cpu")))
    return {
        "machine": {name: value for name, value in found.items() if value is not None},
        "versions": {**versions(), "transformers": transformers.__version__},
        "threads": torch.get_num_threads(),
        "command": " ".join(["python", "benchmarks/soak.py", *sys.argv[1:]]),
    }


def _say(line: str) -> None:
    print(line, flush=True)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    modes = parser.add_subparsers(dest="mode", required=True)
    edits = modes.add_parser("edits", help="edits that come and go")
    edits.add_argument("--edits", type=int, default=500)
    edits.add_argument("--model", default="tiny", help="tiny, smollm2, a name on the hub, a folder")
    edits.add_argument("--facts", help="CounterFact records (default: those of the package)")
    kills = modes.add_parser("kills", help="precomputes that are killed")
    kills.add_argument("--cycles", type=int, default=100)
    kills.add_argument("--checkpoint-seconds", type=float, nargs="+", default=[0, 0.05, 0.4])
    kills.add_argument("--multiplier", type=float, default=300)
    for mode in (edits, kills):
        mode.add_argument("--seed", type=int, default=0)
        mode.add_argument("--json", type=Path)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
