"""``fastmemit demo``: the whole way on a real model, with nothing downloaded."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmemit.cli.options import add_method, add_model, check_writable, chosen_settings, make_editor
from fastmemit.cli.table import MEANING, interval_table
from fastmemit.errors import FastmemitError

if TYPE_CHECKING:
    from fastmemit.evaluation.perplexity import Perplexity, PerplexityText
    from fastmemit.evaluation.scores import RecordScore
    from fastmemit.experiments.intervals import Estimate

HELP = "Edit two dozen facts of SmolLM2-135M, score, save and undo; no network is needed."
EPILOG = """examples:
  fastmemit demo
  fastmemit demo --method emmet --corpus self
"""
SHOWN = 4
PROSE = 1024  # tokens that perplexity is measured on


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    add_model(verb, default="smollm2")
    add_method(verb)
    verb.add_argument("--corpus", default="builtin", help="builtin (default), self or a file")
    verb.add_argument("--multiplier", type=float, default=10.0)
    verb.add_argument("--save", type=Path, default=Path("fastmemit-demo.safetensors"), metavar="FILE")


def run(args: argparse.Namespace) -> None:
    """Precompute, edit, score, save, undo; raise if the weights do not come back bit for bit."""
    import torch

    from fastmemit.data import builtin_facts
    from fastmemit.evaluation.perplexity import before_and_after, edited_nll, perplexity
    from fastmemit.evaluation.scores import count_questions, score_records
    from fastmemit.outcomes import compare, verdict
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
    requests = [fact.request for fact in facts]
    prompts = [fact.generations[0] for fact in facts[:SHOWN] if fact.generations]
    text = _prose(editor.tokenizer)

    def score(what: str) -> list[RecordScore]:
        with bar(what, count_questions(facts), not args.quiet) as advance:
            return score_records(editor.adapter, editor.tokenizer, facts, progress=advance)

    before = score("unedited scores")
    spoke = perplexity(editor.adapter, text)
    answered = editor.ask(requests)
    said = editor.generate(prompts)
    clock.say(f"scored the unedited model on {len(facts)} facts")
    edit = editor.edit(requests, args.method, verify=False, **overrides)
    edit.save(args.save)  # before anything that may fail
    clock.say(f"edited all of them at once by {args.method}")
    after = score("edited scores")
    cost = before_and_after(spoke, [edited_nll(editor.adapter, text)])
    says = editor.generate(prompts)
    outcomes = compare(requests, answered, editor.ask(requests))
    clock.say("scored the edited model")

    print(f"\n{verdict(outcomes)}\n")
    print(interval_table(_columns(before, after, cost)))
    print(MEANING)
    print(f"Perplexity is that of {len(text.ids):,} tokens of the built-in prose: lower is better.")
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
    print(_next_steps(args))


def _prose(tokenizer: Any) -> PerplexityText:
    """The end of the built-in prose, as running text."""
    from fastmemit.data import load_corpus
    from fastmemit.evaluation.perplexity import PerplexityText
    from fastmemit.tokens import encode

    corpus = load_corpus("builtin")
    prose = "\n\n".join(corpus.documents())
    ids = tokenizer(prose, add_special_tokens=False, verbose=False)["input_ids"]
    lead = encode(tokenizer, "").ids
    return PerplexityText("builtin", corpus.fingerprint, tuple(ids[-PROSE:]), lead)


def _columns(
    before: Sequence[RecordScore], after: Sequence[RecordScore], cost: Perplexity
) -> dict[str, dict[str, Estimate | float | None]]:
    """Before, after and the change of every score, for `interval_table`."""
    from fastmemit.experiments.intervals import difference_intervals, score_intervals

    records = [
        {"case_id": old.case_id, "before": old.shares(), "after": new.shares()}
        for old, new in zip(before, after, strict=True)
    ]
    columns: dict[str, dict[str, Estimate | float | None]] = {
        "before": {**score_intervals(records, when="before")},
        "after": {**score_intervals(records)},
        "change": {**difference_intervals(records, records, whens=("after", "before"))},
    }
    columns["before"]["perplexity"], columns["after"]["perplexity"] = cost["before"], cost["after"]
    columns["change"]["perplexity"] = cost["after"] - cost["before"]
    return columns


def _next_steps(args: argparse.Namespace) -> str:
    """Commands that can be typed as they stand, with the edit that lies there now."""
    command = "fastmemit"
    if shutil.which(command) is None:  # as after `make demo`, whose environment is not active
        command = f"{os.path.relpath(sys.executable)} -m fastmemit"
    place = f" --model {shlex.quote(args.model)}"
    if args.cache is not None:
        place += f" --cache {shlex.quote(str(args.cache))}"
    return f"""
Next, with the edit in {args.save}, and with a fact of your own:
  {command} apply{place} --edit {shlex.quote(str(args.save))} \\
      --prompt "If you want to see the Eiffel Tower, travel to"
  {command} edit{place} --corpus builtin --save mine.safetensors \\
      --prompt "{{}} was written by" --subject "Moby-Dick" --target "Jane Austen"
"""


class _Clock:
    """Prints lines with the seconds since the start."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()

    def say(self, line: str) -> None:
        """Print a line."""
        print(f"[{time.perf_counter() - self._begun:6.1f} s] {line}", flush=True)
