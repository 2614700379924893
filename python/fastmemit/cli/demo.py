"""``fastmemit demo``: the whole way on a real model, with nothing downloaded."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from fastmemit.cli.options import (
    add_method,
    add_model,
    check_writable,
    chosen_settings,
    make_editor,
)
from fastmemit.cli.table import score_table
from fastmemit.errors import FastmemitError

if TYPE_CHECKING:
    from fastmemit.metrics.score import RecordScore

HELP = "Edit two dozen facts of SmolLM2-135M, score, save and undo; no network is needed."
EPILOG = """examples:
  fastmemit demo
  fastmemit demo --method emmet --corpus self
"""
SHOWN = 4


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    add_model(verb, default="smollm2")
    add_method(verb)
    verb.add_argument("--corpus", default="builtin", help="builtin (default), self or a file")
    verb.add_argument("--multiplier", type=float, default=10.0)
    verb.add_argument(
        "--save", type=Path, default=Path("fastmemit-demo.safetensors"), metavar="FILE"
    )


def run(args: argparse.Namespace) -> None:
    """Precompute, edit, score, save, undo; raise if the weights do not come back bit for bit."""
    import torch

    from fastmemit.data import builtin_facts
    from fastmemit.evaluation.counterfact import count_questions, score_records
    from fastmemit.metrics.score import summarise
    from fastmemit.progress import bar

    check_writable(args.save)
    overrides = chosen_settings(args)
    clock = _Clock()
    editor = make_editor(args)
    clock.say(f"loaded {editor.name}: {editor.adapter.n_layers} blocks, keys of width "
              f"{editor.adapter.d_k(editor.adapter.layers[0])}")  # fmt: skip
    weights = {name: tensor.clone() for name, tensor in editor.model.state_dict().items()}
    config = editor.config(args.method, **overrides)
    found = editor.precompute(args.corpus, multiplier=args.multiplier, layers=config.layers)
    clock.say(f"second moments of layers {', '.join(map(str, config.layers))}: {found.describe()}")

    facts = builtin_facts()
    prompts = [fact.generations[0] for fact in facts[:SHOWN] if fact.generations]

    def score(what: str) -> list[RecordScore]:
        with bar(what, count_questions(facts), not args.quiet) as advance:
            return score_records(editor.adapter, editor.tokenizer, facts, progress=advance)

    before = score("unedited scores")
    said = editor.generate(prompts)
    clock.say(f"scored the unedited model on {len(facts)} facts")
    edit = editor.edit([fact.request for fact in facts], args.method, **overrides)
    edit.save(args.save)  # before anything that may fail
    clock.say(f"edited all of them at once by {args.method}")
    after = score("edited scores")
    says = editor.generate(prompts)
    clock.say("scored the edited model")

    print()
    print(score_table({"before": summarise(before).as_dict(), "after": summarise(after).as_dict()}))
    for fact, prompt, old, new in zip(facts, prompts, said, says, strict=False):
        print(f"\n{prompt}   [{fact.request.target_true} -> {fact.request.target.strip()}]")
        print(f"  before: {' '.join(old.split())}\n  after:  {' '.join(new.split())}")
    print()
    clock.say(f"saved the edit as {args.save} ({args.save.stat().st_size / 1e6:.1f} MB)")
    edit.undo()
    now = editor.model.state_dict()
    changed = [n for n, tensor in weights.items() if not torch.equal(tensor, now[n])]
    if changed:
        raise FastmemitError(f"The undo left {len(changed)} weights changed, {changed[0]} first.")
    clock.say(f"undone: all {len(weights)} tensors are bit for bit the original")


class _Clock:
    """Prints lines with the seconds since the start."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()

    def say(self, line: str) -> None:
        """Print a line."""
        print(f"[{time.perf_counter() - self._begun:6.1f} s] {line}", flush=True)
