"""``fastmemit sweep``: the paper's protocol over multipliers, methods and batch sizes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmemit.cli.options import above_zero, add_model, make_editor
from fastmemit.errors import BadConfig

if TYPE_CHECKING:
    from fastmemit.experiments.schema import Cell

HELP = "Score edits for every multiplier, method and batch size; goes on where it was killed."
EPILOG = """examples:
  fastmemit sweep --model gpt2-xl --data counterfact --corpus wikipedia --out sweep-gpt2-xl
  fastmemit sweep --model smollm2 --methods emmet,memit --multipliers 1,2,3,4,10,full \\
      --batches 1:64,16:4,64:1 --data counterfact.json --corpus text.jsonl --out DIR
  fastmemit sweep --model gpt2-xl --data counterfact --out DIR --shard 1/2

A sweep that was killed goes on with the same command. When all shards are done, the command without
--shard puts their results into one file. The grid may change between two runs into the same folder.
"""


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    grid = verb.add_argument_group("grid")
    grid.add_argument("--methods", default="emmet,memit,rome", help="default: %(default)s")
    grid.add_argument(
        "--multipliers",
        default="1,2,3,4,10,full",
        help="of the key width; full is the full precompute (default: %(default)s)",
    )
    grid.add_argument(
        "--snapshots",
        metavar="MULTIPLIERS",
        help="store sums at these as well, so that sweeps with other multipliers share the pass",
    )
    grid.add_argument("--batch-sizes", metavar="SIZES", help="default: those of --batches")
    grid.add_argument(
        "--batches",
        metavar="SIZE:NUMBER,...",
        help="how many batches of each size (default: Table 1's, 1:1000,16:10,64:5,256:5,1024:3)",
    )
    grid.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="NAME=VALUE[,...]",
        help="more cells with these settings, such as relative_ridge=1e-3; may be repeated",
    )
    grid.add_argument("--only-varied", action="store_true", help="leave out the cells without --vary's settings")
    grid.add_argument("--seeds", default="0", help="of the order of the corpus, such as 0,1,2")
    grid.add_argument(
        "--bos",
        choices=("with", "without", "both"),
        default="with",
        help="the first position of each document among the preserved keys (default: with)",
    )
    data = verb.add_argument_group("data")
    data.add_argument("--data", required=True, help="CounterFact records, as in evaluate")
    data.add_argument("--skip-malformed", action="store_true", help="go on without bad records")
    data.add_argument(
        "--corpus",
        default="wikipedia",
        help="wikipedia (from the hub), builtin, a .txt, .json or .jsonl file, or hub:NAME",
    )
    data.add_argument("--field", default="text", help="the text's field in a JSON corpus")
    data.add_argument("--max-length", type=above_zero, metavar="N", help="cut documents at N tokens")
    data.add_argument(
        "--full-keys",
        type=above_zero,
        metavar="N",
        help="keys of the full precompute, or all that the corpus has (default 44,000,000)",
    )
    data.add_argument("--perplexity", type=Path, metavar="FILE", help="text to measure it on")
    data.add_argument("--perplexity-tokens", type=above_zero, default=4096, metavar="N")
    data.add_argument(
        "--perplexity-batches",
        type=above_zero,
        default=1,
        metavar="N",
        help="after how many batches of a cell, at most (default 1)",
    )
    verb.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results go")
    verb.add_argument("--shard", metavar="I/N", help="run every N-th cell, from the I-th on")
    add_model(verb)


def run(args: argparse.Namespace) -> None:
    """Run what is left of the sweep, and print a line a cell."""
    from fastmemit.cli.table import SCORES, score_table
    from fastmemit.data import load_corpus, load_records
    from fastmemit.evaluation.perplexity import read_text
    from fastmemit.experiments import grid as grids
    from fastmemit.experiments.cell import SweepInputs
    from fastmemit.experiments.header import file_identity, make_header
    from fastmemit.experiments.statistics import FULL_KEYS
    from fastmemit.experiments.sweep import run_sweep

    methods = grids.parse_methods(args.methods)
    grid = grids.Grid(
        methods=methods,
        batches=grids.parse_batches(args.batch_sizes, args.batches),
        multipliers=grids.parse_multipliers(args.multipliers),
        variants=_variants(args.vary, args.only_varied, methods),
        bos={"with": (True,), "without": (False,), "both": (True, False)}[args.bos],
        seeds=grids.parse_seeds(args.seeds),
        snapshots=grids.parse_multipliers(args.snapshots) if args.snapshots else (),
    )
    shard = grids.parse_shard(args.shard)
    if args.out.exists() and not args.out.is_dir():
        raise BadConfig(f"{str(args.out)!r} is a file; name a folder for the results.")
    records = load_records(args.data, skip_malformed=args.skip_malformed)
    if args.corpus == "self":
        raise BadConfig("A sweep reads its corpus many times; give a file, builtin or wikipedia.")
    corpus = load_corpus(args.corpus, field=args.field)
    editor = make_editor(args)
    for method in methods:  # refused here, not after hours
        for variant in grid.variants:
            editor.config(method, **variant)
    text = None
    if args.perplexity is not None:
        text = read_text(args.perplexity, editor.tokenizer, tokens=args.perplexity_tokens)
    inputs = SweepInputs(
        records,
        corpus,
        args.out,
        make_header(
            editor,
            file_identity(args.data),
            corpus,
            methods,
            max_length=args.max_length,
            full_keys=args.full_keys or FULL_KEYS,
            perplexity=None
            if text is None
            else {
                **file_identity(args.perplexity),
                "tokens": args.perplexity_tokens,
                "batches": args.perplexity_batches,
            },
        ),
        full_keys=args.full_keys or FULL_KEYS,
        max_length=args.max_length,
        text=text,
        perplexity_batches=args.perplexity_batches,
    )
    cells = run_sweep(editor, grid, inputs, shard=shard, progress=not args.quiet)
    print(score_table({cell["key"]: _row(cell) for cell in cells}, (*SCORES, "perplexity")))
    number, of = shard
    if of == 1:
        print(f"{len(cells)} cells in {args.out}; fastmemit report {args.out} draws them")
    else:
        print(f"shard {number} of {of} is done: {len(cells)} of {len(grid.places())} cells so far")


def _row(cell: Cell) -> dict[str, Any]:
    from fastmemit.experiments.cell import table_of

    found = cell["perplexity"]
    scores = table_of([record["after"] for record in cell["records"]])
    return {**scores, "perplexity": None if found is None else found["after"]}


def _variants(vary: list[str], only: bool, methods: Sequence[str]) -> tuple[dict[str, Any], ...]:
    from fastmemit.methods import parse_overrides

    try:
        varied = [parse_overrides(_settings(text), methods) for text in vary]
    except BadConfig as error:
        if len(methods) == 1:
            raise
        raise BadConfig(
            f"{error} A setting that not all of {', '.join(methods)} have is varied with --methods "
            "for those that have it, into the same --out."
        ) from error
    if only and not varied:
        raise BadConfig("--only-varied leaves no cell; give --vary, such as relative_ridge=1e-3.")
    found: list[dict[str, Any]] = [] if only else [{}]
    for settings in varied:
        if settings in found:
            raise BadConfig(f"The settings {settings} are there twice; give each --vary once.")
        found.append(settings)
    return tuple(found)


def _settings(text: str) -> list[str]:
    """``"a=1,b=2"`` as two settings; a part without ``=`` belongs to the one before (layers)."""
    parts: list[str] = []
    for part in text.split(","):
        if "=" in part or not parts:
            parts.append(part)
        else:
            parts[-1] += f",{part}"
    return parts
