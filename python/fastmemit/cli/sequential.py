"""``fastmemit sequential``: batch on batch into the same weights, nothing given back in between."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastmemit.cli.options import above_zero, add_method, add_model, chosen_settings, make_editor
from fastmemit.errors import BadConfig

HELP = "Write batches on top of each other and score all facts so far; goes on where it was killed."
EPILOG = """examples:
  fastmemit sequential --model smollm2 --method memit --data counterfact.json --batch-size 16 \\
      --batches 10 --score-every 2 --multipliers 1,2,10,full --preserve both --corpus text.jsonl \\
      --perplexity text.txt --tokens 4096 --out DIR
  fastmemit sequential --model gpt2-xl --data counterfact --batch-size 100 --batches 20 --out DIR

DIR gets sequential.jsonl, a line a step, and of all that is in it sequential.md, .svg and .png. A
sequence that was killed begins again at its first batch; those that were finished stay.
"""
PRESERVE = {"both": (True, False), "yes": (True,), "no": (False,)}


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    group = verb.add_argument_group("sequences")
    group.add_argument("--data", required=True, help="CounterFact records, as in evaluate")
    group.add_argument("--skip-malformed", action="store_true", help="go on without bad records")
    group.add_argument("--batch-size", type=above_zero, default=16, help="records edited together")
    group.add_argument("--batches", type=above_zero, default=10, help="how many, one on the other")
    group.add_argument("--score-every", type=above_zero, default=1, metavar="K", help="after each K-th batch")
    group.add_argument(
        "--multipliers", default="10", help="of the key width; full is the full precompute (default: %(default)s)"
    )
    group.add_argument(
        "--preserve",
        choices=tuple(PRESERVE),
        default="both",
        help="the keys of earlier edits too, whatever the method: yes, no, or one sequence of each (default: both)",
    )
    group.add_argument("--perplexity", type=Path, metavar="FILE", help="text to measure it on")
    group.add_argument(
        "--tokens",
        type=above_zero,
        metavar="N",
        default=4096,
        help="of that text, from its beginning (default %(default)s)",
    )
    group.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results go")
    corpus = verb.add_argument_group("statistics")
    corpus.add_argument(
        "--corpus",
        default="wikipedia",
        help="wikipedia (from the hub), builtin, a .txt, .json or .jsonl file, or hub:NAME",
    )
    corpus.add_argument("--field", default="text", help="the text's field in a JSON corpus")
    corpus.add_argument("--max-length", type=above_zero, metavar="N", help="cut documents at N tokens")
    corpus.add_argument(
        "--full-keys",
        type=above_zero,
        metavar="N",
        help="keys of the full precompute, or all that the corpus has (default 44,000,000)",
    )
    add_model(verb)
    add_method(verb)


def run(args: argparse.Namespace) -> None:
    """Run what is left, write table and figure, print the last step of each sequence."""
    from fastcov.store import atomic_file
    from fastmemit.cli.table import SCORES, score_table
    from fastmemit.data import batches, load_corpus, load_records
    from fastmemit.evaluation.perplexity import read_text
    from fastmemit.experiments.drawing import check_matplotlib
    from fastmemit.experiments.grid import parse_multipliers
    from fastmemit.experiments.header import file_identity
    from fastmemit.experiments.layout import method_title
    from fastmemit.experiments.sequential_report import figure, markdown
    from fastmemit.experiments.sequential_runs import Inputs, Plan, run_sequences
    from fastmemit.experiments.statistics import FULL_KEYS

    check_matplotlib()
    multipliers = parse_multipliers(args.multipliers)
    overrides = chosen_settings(args)
    if args.out.exists() and not args.out.is_dir():
        raise BadConfig(f"{str(args.out)!r} is a file; name a folder for the results.")
    if args.corpus == "self":
        raise BadConfig("The corpus is read many times; give a file, builtin or wikipedia.")
    records = load_records(args.data, skip_malformed=args.skip_malformed)
    chosen = batches(records, args.batch_size, args.batches, seed=args.seed)
    corpus = load_corpus(args.corpus, field=args.field)
    editor = make_editor(args)
    editor.config(args.method, **overrides)  # refused before the text is read
    plan = Plan(chosen, args.method, overrides, multipliers, PRESERVE[args.preserve], args.score_every)
    text = None
    if args.perplexity is not None:
        text = read_text(args.perplexity, editor.tokenizer, tokens=args.tokens)
    inputs = Inputs(
        corpus,
        args.out,
        file_identity(args.data),
        full_keys=args.full_keys or FULL_KEYS,
        max_length=args.max_length,
        text=text,
    )
    lines = run_sequences(editor, plan, inputs, progress=not args.quiet)
    title = f"{editor.name}: {method_title(args.method)}, batches of {args.batch_size} in sequence"
    svg, png = figure(lines, title)
    written = {".md": markdown(lines).encode(), ".svg": svg, ".png": png}
    for ending, content in written.items():
        with atomic_file(args.out / f"sequential{ending}") as file:
            file.write(content)
    last = [line for line in lines if line["edits"] == len(chosen)]
    facts = sum(map(len, chosen))
    print(f"{editor.name}, {args.method}, {facts} facts in {len(chosen)} batches, all of them kept")
    rows = {line["key"].rpartition("/")[0]: {**line["scores"], "perplexity": line["perplexity"]} for line in last}
    print(score_table({"unedited": last[0]["before"], **rows}, (*SCORES, "perplexity")))
    print(f"{len(rows)} sequences in {args.out}: sequential.jsonl, .md (with intervals), .svg, .png")
