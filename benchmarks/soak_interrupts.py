"""Interrupts at random moments, and what they leave: ``python benchmarks/soak_interrupts.py``.

Each round runs one of precompute, edit, apply and undo, ``applied``, evaluate and sweep on a tiny model and stops it
once: by a signal (SIGINT, SIGTERM) at a random time, or by a KeyboardInterrupt or MemoryError raised at a random line
of the project's own code. Afterwards the weights must be those of the edits on record (the unedited ones where there is
none) bit for bit, no hook and no replaced forward may be left, the modes of modules and parameters and the random
states must be as before, an edit on record must come out again, and the next round must work.

A signal is answered as the command line answers it. Lines where CPython handles no signal (the line of a with statement
on the way out, of a try, a generator that goes on) are left out.
"""

from __future__ import annotations

import argparse
import collections
import inspect
import json
import linecache
import logging
import random
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "python", ROOT / "tests"):
    sys.path.insert(0, str(folder))

from fastcov.machine import versions  # noqa: E402
from fastmemit.edits import Edit  # noqa: E402
from fastmemit.evaluation import evaluate  # noqa: E402
from fastmemit.experiments.results import Inputs  # noqa: E402
from fastmemit.experiments.sweep import Grid, run_sweep  # noqa: E402
from tiny_editors import FACTS, QUICK, record, tiny_corpus, tiny_editor  # noqa: E402

KINDS = ("SIGINT", "SIGTERM", "KeyboardInterrupt at a line", "MemoryError at a line")


class At:
    """Raise at the n-th line of the project's code that runs inside."""

    def __init__(self, left: int, error: type[BaseException]) -> None:
        self.left, self.error = left, error

    def __call__(self, frame: Any, event: str, _: Any) -> Any:
        """What `sys.settrace` calls."""
        name = frame.f_code.co_filename
        ours = ("fastmemit" in name or "fastcov" in name) and "/tests/" not in name
        if not ours:
            return None
        if event in ("call", "line"):
            line = linecache.getline(name, frame.f_lineno).lstrip()
            going_on = event == "call" and frame.f_code.co_flags & inspect.CO_GENERATOR
            if not going_on and not line.startswith(("with ", "try:")):
                self.left -= 1
                if self.left == 0:
                    sys.settrace(None)
                    raise self.error("soak")
        return self


class Soak:
    """A tiny model, its editor, and what they must be after each round."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.draw, self.folder, self.number = random.Random(seed), folder, 0
        self.editor = tiny_editor(folder / "cache")
        self.model = self.editor.model
        self.records = [record(i, fact) for i, fact in enumerate(FACTS)]
        self.edit = self.editor.edit(FACTS[:2], "memit", verify=False, **QUICK)
        self.edited = self._weights()
        self.edit.undo()
        self.unedited = self._weights()
        self.work: dict[str, Callable[[], object]] = {
            "precompute": self._precompute,
            "edit": self._edit,
            "apply and undo": self._apply,
            "applied": self._applied,
            "evaluate": lambda: evaluate(self.editor, [self.records[:2], self.records[2:]], "memit", dict(QUICK)),
            "sweep": self._sweep,
        }

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    def _precompute(self) -> None:
        corpus = tiny_corpus(60, self.draw.randrange(10**9))
        self.editor.precompute(corpus, multiplier=4, layers=(0, 1))

    def _edit(self) -> None:
        self.editor.edit(FACTS[: self.draw.randint(1, 3)], "memit", **QUICK).undo()

    def _apply(self) -> None:
        edit = Edit(self.edit.delta, self.editor._stack)
        edit.apply()
        edit.undo()

    def _applied(self) -> None:
        edit = Edit(self.edit.delta, self.editor._stack)
        with edit, edit:
            self.editor.generate(["The capital of France is"], 1)

    def _sweep(self) -> None:
        self.number += 1
        grid = Grid(methods=("memit",), batches={2: 1}, multipliers=(2.0,), variants=(dict(QUICK),))
        corpus = tiny_corpus()
        folder = self.folder / f"sweep{self.number}"
        run_sweep(self.editor, grid, self.records, Inputs(corpus, folder, {"name": "tiny"}))

    def posture(self) -> dict[str, object]:
        """What must be as it was, but for weights."""
        modules = list(self.model.modules())
        return {
            "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules),
            "forwards": sum("forward" in m.__dict__ for m in modules),
            "training": [m.training for m in modules],
            "requires_grad": [p.requires_grad for p in self.model.parameters()],
            "grad": [p.grad is None for p in self.model.parameters()],
            "grad mode": torch.is_grad_enabled(),
            "default dtype": torch.get_default_dtype(),
            "random state of torch": torch.get_rng_state().tolist(),
            "random state of Python": random.getstate(),
        }

    def wrong(self) -> list[str]:
        """What is not right about the weights, after one more look at the record."""
        now = self.model.state_dict()
        edits = self.editor.edits

        def differ(wanted: dict[str, torch.Tensor]) -> bool:
            return any(not torch.equal(now[name], wanted[name]) for name in wanted)

        found = []
        if not edits and differ(self.unedited):
            found.append("weights changed, no edit on record")
        known = len(edits) == 1 and edits[0].delta is self.edit.delta
        if known and differ(self.edited):
            found.append("edit on record, other weights")
        for edit in reversed(edits):
            edit.undo()
        if differ(self.unedited):
            found.append("not the unedited weights after undoing what was on record")
        if self.editor._stack.lock._is_owned():
            found.append("lock")
        return found


def run(rounds: int, seed: int, folder: Path) -> dict[str, Any]:
    """Run so many interrupts.

    Returns:
        Counts, and every defect.
    """
    soak = Soak(folder, seed)
    spent: dict[str, float] = {}
    lines: dict[str, int] = {}
    for name, work in soak.work.items():
        work()
        begun = time.perf_counter()
        work()
        spent[name] = time.perf_counter() - begun
        counting = At(-1, KeyboardInterrupt)
        sys.settrace(counting)
        work()
        sys.settrace(None)
        lines[name] = -counting.left - 1

    class Terminated(KeyboardInterrupt):
        pass

    def terminated(*_: object) -> None:
        raise Terminated

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in its background without it
    signal.signal(signal.SIGTERM, terminated)
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(chosen))
    tally: collections.Counter[str] = collections.Counter()
    defects: list[str] = []
    chosen = signal.SIGINT
    while tally["interrupts"] < rounds:
        name = soak.draw.choice(list(soak.work))
        kind = soak.draw.choice(KINDS)
        before = soak.posture()
        error = ""
        try:
            try:
                if kind.startswith("SIG"):
                    chosen = getattr(signal, kind)
                    signal.setitimer(signal.ITIMER_REAL, soak.draw.uniform(1e-5, spent[name]))
                else:
                    raised = MemoryError if kind.startswith("Memory") else KeyboardInterrupt
                    sys.settrace(At(soak.draw.randint(1, lines[name]), raised))
                soak.work[name]()
            finally:
                sys.settrace(None)
                signal.setitimer(signal.ITIMER_REAL, 0)
        except (KeyboardInterrupt, MemoryError) as caught:
            error = type(caught).__name__
        except Exception as caught:  # a library made another error of the signal that came inside of it
            error = type(caught).__name__
            tally[f"came out as {error}"] += 1
        if not error:
            tally["finished before it came"] += 1
            continue
        tally["interrupts"] += 1
        tally[f"{name}: {kind}"] += 1
        tally["an edit on record afterwards"] += bool(soak.editor.edits)
        after = soak.posture()
        wrong = [what for what in before if before[what] != after[what]] + soak.wrong()
        for what in wrong:
            defects.append(f"{name}, {kind}: {what}")
            print(defects[-1], flush=True)
    for work in soak.work.values():
        work()
    return {"counts": dict(sorted(tally.items())), "defects": defects}


def main() -> int:
    """Run the soak and print its counts as JSON; 1 for a defect."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--interrupts", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = run(args.interrupts, args.seed, Path(folder))
    found |= {"seed": args.seed, "seconds": round(time.monotonic() - begun, 1), "versions": versions()}
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))
    return bool(found["defects"])


if __name__ == "__main__":
    sys.exit(main())
