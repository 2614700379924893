"""One batch of many facts: what the edit itself takes, beside its target vectors, by step.

    python benchmarks/many_facts.py --facts 1000 --json FILE
    python benchmarks/many_facts.py --facts 1000 --shape --json FILE
    python benchmarks/many_facts.py --facts 1000 --each --json FILE

A MEMIT edit of SmolLM2-135M's layers 4 to 8, or, with ``--shape``, of both of two blocks with random weights and
Llama-2-7B's widths (d 4,096, d_k 11,008; SmolLM2's tokenizer, short prompts). Target vectors are drawn at random and
given, since they cost the same a fact in a batch of any size (benchmarks/targets.py); so nothing is said of scores.
Seconds are of the processor and of the wall. The peak is what the process held at most beyond what it held before the
edit. With ``--each`` every fact is an edit of its own upon the former ones, all of which are undone at the end: its
target vector is the block's output moved by a tenth of its length, so that a thousand of them break no weight. Beside
what the process holds stands what malloc has handed out, and what is held once malloc has given back what is free.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from two_trees import clocks

import fastcov.closed_form
from fastcov.machine import this_machine
from fastmemit import Editor, EditRequest
from fastmemit.capacity import MACHINES, SHAPES, Shape, plan_edit
from fastmemit.data import load_records
from fastmemit.methods.base import Draft, Subjects
from fastmemit.models import load_model
from fastmemit.partial_forward import read_at_subject
from fastmemit.statistics import StatisticsStore
from fastmemit.targets import Target, TargetStore
from fastmemit.text import subject_row

DATA = Path(os.environ.get("FASTMEMIT_DATA", Path(__file__).parents[2] / "shared" / "data"))


class Given(TargetStore):
    """Has a vector for every fact."""

    def __init__(self, d: int) -> None:
        super().__init__(None)
        self._d, self._draw = d, torch.Generator().manual_seed(0)

    def get(self, key: Any) -> Target:
        """A random one."""
        vector = torch.randn(self._d, generator=self._draw)
        return Target(vector, torch.zeros(self._d), (1.0, 0.01))


def together(editor: Editor, facts: list[EditRequest], layers: tuple[int, ...]) -> dict[str, Any]:
    """One edit of all."""
    before, begun = memory("VmRSS"), clocks()
    edit = editor.plan(facts, "memit", layers=layers)
    ended, peak = clocks(), memory("VmHWM")
    with tempfile.TemporaryDirectory() as folder:
        edit.save(Path(folder) / "edit.safetensors")
        size = (Path(folder) / "edit.safetensors").stat().st_size
    return {
        "processor_s": round(ended[1] - begun[1], 2),
        "wall_s": round(ended[0] - begun[0], 2),
        "peak_bytes": peak - before,
        "file_bytes": size,
        "columns": {name: left.shape[1] for name, (left, _) in edit.delta.factors.items()},
    }


def one_by_one(editor: Editor, facts: list[EditRequest], layers: tuple[int, ...]) -> dict[str, Any]:
    """Edit on edit, then undo them: after how many, what is held beyond what was before, and seconds."""
    rows = [subject_row(editor.tokenizer, "", fact) for fact in facts]
    outputs = read_at_subject(editor.adapter, rows, outputs=[editor.adapter.block(layers[-1])])[1][0].float()
    drawn = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0))
    goals = outputs + 0.1 * outputs.norm(dim=1, keepdim=True) * torch.nn.functional.normalize(drawn, dim=1)
    targets = {fact: Target(goal, start, (1.0, 0.01)) for fact, goal, start in zip(facts, goals, outputs, strict=True)}
    unedited = [editor.adapter.weight(layer).clone() for layer in layers]
    before, asked, begun, held = memory("VmRSS"), allocated(), clocks(), []
    for number, fact in enumerate(facts, 1):
        editor.edit([fact], "memit", layers=layers, targets=targets, verify=False)
        if number in (10, 30, 100, 300, len(facts)):
            wall, processor = (round(now - then, 2) for now, then in zip(clocks(), begun, strict=True))
            sizes = {"bytes": memory("VmRSS") - before, "allocated_bytes": allocated() - asked}
            held.append({"edits": number, **sizes, "processor_s": processor, "wall_s": wall})
    ctypes.CDLL(None).malloc_trim(0)
    trimmed, peak, begun = memory("VmRSS") - before, memory("VmHWM") - before, clocks()
    for edit in reversed(editor.edits):
        edit.undo()
    assert all(torch.equal(editor.adapter.weight(at), one) for at, one in zip(layers, unedited, strict=True))
    return {
        "held": held,
        "trimmed_bytes": trimmed,
        "peak_bytes": peak,
        "undo_processor_s": round(clocks()[1] - begun[1], 2),
    }


class Steps:
    """Seconds by step, while the functions that do them are wrapped."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = {}

    def wrap(self, place: Any, function: str, step: str) -> None:
        """Count a function's time as that of a step."""
        real: Callable[..., Any] = getattr(place, function)
        spent = self.spent.setdefault(step, [0.0, 0.0])

        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = clocks()
            try:
                return real(*args, **kwargs)
            finally:
                for number, (one, other) in enumerate(zip(clocks(), begun, strict=True)):
                    spent[number] += one - other

        setattr(place, function, timed)


class _Mallinfo(ctypes.Structure):
    _names = ("arena", "blocks", "small", "maps", "mapped", "none", "kept", "used", "free", "top")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


def allocated() -> int:
    """Bytes that malloc has handed out and not got back, of all arenas and maps (glibc 2.33 or newer)."""
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = _Mallinfo
    found = library.mallinfo2()
    return int(found.used + found.mapped)


def memory(name: str) -> int:
    """Bytes of VmRSS or VmHWM."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def large(tokenizer: Any) -> Any:
    """Two blocks of a 7B model's widths."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=2,
        num_attention_heads=32,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def main() -> int:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--facts", type=int, default=1000)
    parser.add_argument("--shape", action="store_true", help="two random blocks of Llama-2-7B's widths")
    parser.add_argument("--contexts", action="store_true", help="read keys in six contexts, not in the prompts alone")
    parser.add_argument("--each", action="store_true", help="an edit for each fact, on top of one another")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    model, tokenizer = load_model("smollm2", device="cpu", dtype="float32")
    if args.shape:
        model = large(tokenizer)
    editor = Editor(model, tokenizer, cache_dir=tempfile.mkdtemp(), name="large" if args.shape else None)
    layers = (0, 1) if args.shape else (4, 5, 6, 7, 8)
    # A tenth of the keys' width is enough for what is measured here: a few keys get a ridge.
    editor.precompute("builtin", multiplier=0.1, layers=layers, allow_fewer=True)
    editor.workspace.stored_targets = Given(editor.adapter.d)
    facts: list[EditRequest]
    if args.shape:
        facts = [EditRequest("{} is", f"T{number}", "Rome") for number in range(args.facts)]
    else:
        records = load_records(DATA / "counterfact_1400.json")
        facts = list({(r.request.prompt, r.request.subject): r.request for r in records}.values())
    if not args.contexts:
        editor.workspace.contexts_of = lambda method: ("",)  # type: ignore[method-assign]  # this workspace alone has none
    editor.plan(facts[:2], "memit", layers=layers[-1:])  # what is measured once in a process
    editor.store._held.clear()
    steps = Steps()
    for place, function, step in (
        (StatisticsStore, "factor", "factors"),
        (Subjects, "read", "reading keys"),
        (fastcov.closed_form, "memit", "solving"),
        (Draft, "write", "writing"),
    ):
        steps.wrap(place, function, step)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    found = {
        "model": "two blocks of Llama-2-7B's widths" if args.shape else "SmolLM2-135M",
        "layers": list(layers),
        "facts": args.facts,
        "contexts": 6 if args.contexts else 1,
        **(one_by_one if args.each else together)(editor, facts[: args.facts], layers),
    }
    if not args.each:
        shape = Shape(2, 4096, 11008, 32, 32, 128, len(tokenizer), True, True) if args.shape else SHAPES["smollm2"]
        rows = 6 if args.contexts else 1
        found["planned_bytes"] = plan_edit(shape, MACHINES["2-core"], layers, args.facts, rows=rows).memory
    found |= {
        "steps_processor_s": {step: round(spent[1], 2) for step, spent in steps.spent.items()},
        "threads": torch.get_num_threads(),
        "processor": this_machine(torch.device("cpu")).cpu,
        "torch": torch.__version__,
        "load_average": round(os.getloadavg()[0], 1),
    }
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
