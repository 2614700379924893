"""``fastmemit evaluate``: CounterFact before and after, batch by batch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fastmemit.cli.options import (
    add_corpus,
    add_method,
    add_model,
    check_writable,
    ensure_statistics,
    make_editor,
)
from fastmemit.cli.table import score_table

HELP = "Edit and score CounterFact records in batches, each on the unedited model."
EPILOG = """examples:
  fastmemit evaluate --model smollm2 --method emmet --data counterfact.json --batch-size 16 \\
      --batches 4 --multiplier 10 --json out.json
  fastmemit evaluate --model gpt2-xl --method rome --data counterfact --batch-size 1 --batches 100
"""


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    verb.add_argument(
        "--data",
        required=True,
        help="a CounterFact file (full or flat), counterfact (from the hub), hub:NAME or builtin",
    )
    verb.add_argument("--skip-malformed", action="store_true", help="go on without bad records")
    verb.add_argument("--batch-size", type=int, default=16, help="records edited together")
    verb.add_argument("--batches", type=int, default=4, help="how many batches")
    verb.add_argument("--json", type=Path, metavar="FILE", help="write everything found here")
    add_model(verb)
    add_method(verb)
    add_corpus(verb, default=None)


def run(args: argparse.Namespace) -> None:
    """Evaluate, print the table, write the file."""
    from fastcov.store import atomic_file
    from fastmemit.data import batches, load_records
    from fastmemit.editors import parse_overrides
    from fastmemit.evaluation import evaluate

    check_writable(args.json)
    overrides = parse_overrides(args.overrides)
    records = load_records(args.data, skip_malformed=args.skip_malformed)
    chosen = batches(records, args.batch_size, args.batches, seed=args.seed)
    editor = make_editor(args)
    ensure_statistics(editor, editor.config(args.method, **overrides).layers, args)
    result = evaluate(editor, chosen, args.method, overrides, progress=not args.quiet)
    count = sum(map(len, chosen))
    print(f"{editor.name}, {args.method}, {count} records in {len(chosen)} batches")
    print(score_table({"before": result["before"], "after": result["after"]}))
    print(" ".join(f"{name} {value:.1f} s" for name, value in result["seconds"].items()))
    if args.json is not None:
        with atomic_file(args.json) as file:
            file.write((json.dumps(result, indent=1) + "\n").encode())
        print(f"written to {args.json}")
