"""``fastmemit evaluate``: CounterFact or zsRE before and after, batch by batch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fastmemit.cli.options import (
    add_corpus,
    add_method,
    add_model,
    check_writable,
    chosen_settings,
    ensure_statistics,
    make_editor,
)
from fastmemit.cli.table import SCORES, score_table
from fastmemit.errors import BadConfig

HELP = "Edit and score CounterFact or zsRE records in batches, each on the unedited model."
EPILOG = """examples:
  fastmemit evaluate --model smollm2 --method emmet --data counterfact.json --batch-size 16 \\
      --batches 4 --multiplier 10 --json out.json
  fastmemit evaluate --model gpt2-xl --method rome --data counterfact --batch-size 1 --batches 100
  fastmemit evaluate --model gpt2-xl --data zsre:zsre_mend_eval.json
  fastmemit evaluate --model smollm2 --data counterfact.json --metrics score,magnitude,generation \\
      --references texts.jsonl
"""
# The columns of each metric, CounterFact's; zsRE has its accuracies.
COLUMNS = {
    "score": SCORES,
    "magnitude": ("em", "pm", "nm"),
    "accuracy": ("ea", "pa", "na"),
    "attributes": ("as",),
    "generation": ("ge", "rs"),
}
ZSRE_COLUMNS = ("ea", "pa", "na", "a")


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    verb.add_argument(
        "--data",
        required=True,
        help="a CounterFact file (full or flat), a zsRE file (MEND's format, told by its fields or "
        "as zsre:FILE), counterfact (from the hub), hub:NAME[@SPLIT] or builtin",
    )
    verb.add_argument(
        "--metrics",
        type=_metrics,
        default=("score",),
        metavar="NAME,...",
        help=f"columns of the table, of {', '.join(COLUMNS)}; the last two take time of their own "
        "(default: score; zsRE shows its accuracies)",
    )
    verb.add_argument(
        "--references",
        type=Path,
        metavar="FILE",
        help="texts to compare generated ones with: JSON of relation_id, target_new and text",
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
    from fastmemit.data.zsre import is_zsre, load_zsre
    from fastmemit.evaluation import evaluate, load_references
    from fastmemit.evaluation.measures import Measures

    check_writable(args.json)
    overrides = chosen_settings(args)
    zsre = is_zsre(args.data)
    if zsre and tuple(args.metrics) != ("score",):
        raise BadConfig("zsRE has metrics of its own, which are always shown; leave out --metrics.")
    references = None if args.references is None else load_references(args.references)
    measures = Measures.of(args.metrics, references)
    load = load_zsre if zsre else load_records
    records = load(args.data, skip_malformed=args.skip_malformed)
    chosen = batches(records, args.batch_size, args.batches, seed=args.seed)
    measures.check([record for batch in chosen for record in batch])
    editor = make_editor(args)
    ensure_statistics(editor, editor.config(args.method, **overrides).layers, args)
    result = evaluate(
        editor,
        chosen,
        args.method,
        overrides,
        metrics=args.metrics,
        references=references,
        progress=not args.quiet,
    )
    if args.json is not None:  # before it is shown, which may fail
        with atomic_file(args.json) as file:
            file.write((json.dumps(result, indent=1) + "\n").encode())
    count = sum(map(len, chosen))
    print(f"{editor.name}, {args.method}, {count} records in {len(chosen)} batches")
    columns = ZSRE_COLUMNS if zsre else [name for m in args.metrics for name in COLUMNS[m]]
    print(score_table({"before": result["before"], "after": result["after"]}, columns))
    print(" ".join(f"{name} {value:.1f} s" for name, value in result["seconds"].items()))
    if args.json is not None:
        print(f"written to {args.json}")


def _metrics(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in COLUMNS:
            raise argparse.ArgumentTypeError(
                f"there is no metric {name!r}; choose from {', '.join(COLUMNS)}"
            )
    if not names:
        raise argparse.ArgumentTypeError(f"name one or more of {', '.join(COLUMNS)}")
    return names
