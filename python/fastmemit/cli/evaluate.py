"""``fastmemit evaluate``: CounterFact or zsRE before and after, batch by batch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmemit.cli.options import (
    above_zero,
    add_corpus,
    add_method,
    add_model,
    check_writable,
    chosen_settings,
    ensure_statistics,
    make_editor,
)
from fastmemit.cli.table import MEANING, SCORES, interval_table
from fastmemit.errors import BadConfig, BadData

if TYPE_CHECKING:
    from fastmemit.evaluation import Result
    from fastmemit.experiments.intervals import Estimate

HELP = "Edit and score CounterFact or zsRE records in batches, each on the unedited model."
EPILOG = """examples:
  fastmemit evaluate --model smollm2 --method emmet --data counterfact.json --batch-size 16 \\
      --batches 4 --multiplier 10 --json out.json
  fastmemit evaluate --model gpt2-xl --method rome --data counterfact --batch-size 1 --batches 100
  fastmemit evaluate --model gpt2-xl --data zsre:zsre_mend_eval.json
  fastmemit evaluate --model smollm2 --data counterfact.json --metrics score,magnitude,generation \\
      --references texts.jsonl
  fastmemit evaluate --model smollm2 --data counterfact.json --perplexity text.txt
"""
# What each metric shows, CounterFact's; zsRE has its accuracies. No score stands without the exact
# matches: a coin has an S of 50.
COLUMNS = {
    "score": SCORES,
    "magnitude": ("em", "pm", "nm"),
    "accuracy": ("ea", "pa", "na"),
    "attributes": ("as",),
    "generation": ("ge", "rs"),
}
ZSRE_COLUMNS = ("ea", "pa", "na", "a")
ZSRE_MEANING = """\
EA, PA, NA: the share of the answer's tokens that the model says, for the question, in other words,
and for an unrelated one. A: their harmonic mean. In percent; in brackets the 95 % interval over
records, paired in "change"."""


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
        help=f"rows of the table, of {', '.join(COLUMNS)}; the last two take time of their own "
        "(default: score, which has the accuracies beside it; zsRE shows its own)",
    )
    verb.add_argument("--perplexity", type=Path, metavar="FILE", help="text to measure it on, before and after")
    verb.add_argument(
        "--perplexity-tokens",
        type=above_zero,
        default=4096,
        metavar="N",
        help="of that text, from its beginning (default %(default)s)",
    )
    verb.add_argument(
        "--perplexity-batches",
        type=above_zero,
        default=1,
        metavar="N",
        help="after how many of the batches, at most (default %(default)s)",
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
    from fastmemit.data.reading import check_file
    from fastmemit.data.zsre import is_zsre, load_zsre
    from fastmemit.evaluation import evaluate, load_references
    from fastmemit.evaluation.perplexity import read_text
    from fastmemit.evaluation.runner import Measures
    from fastmemit.experiments.results import unbounded_as_text

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
    if args.perplexity is not None:
        check_file(args.perplexity, BadData)
    editor = make_editor(args)
    text = None
    if args.perplexity is not None:
        text = read_text(args.perplexity, editor.tokenizer, tokens=args.perplexity_tokens)
    ensure_statistics(editor, editor.config(args.method, **overrides).layers, args)
    result = evaluate(
        editor,
        chosen,
        args.method,
        overrides,
        metrics=args.metrics,
        references=references,
        text=text,
        perplexity_batches=args.perplexity_batches,
        progress=not args.quiet,
    )
    if args.json is not None:  # before it is shown, which may fail
        with atomic_file(args.json) as file:
            content = json.dumps(unbounded_as_text(result), indent=1, allow_nan=False)
            file.write(f"{content}\n".encode())
    count = sum(map(len, chosen))
    print(f"{editor.name}, {args.method}, {count} records in {len(chosen)} batches")
    names = ZSRE_COLUMNS if zsre else [name for m in args.metrics for name in COLUMNS[m]]
    print(interval_table(measured_columns(result, list(dict.fromkeys(names)))))
    print(MEANING if not zsre else ZSRE_MEANING)
    print(" ".join(f"{name} {value:.1f} s" for name, value in result["seconds"].items()))
    if args.json is not None:
        print(f"written to {args.json}")


def measured_columns(result: Result, names: Sequence[str]) -> dict[str, dict[str, Estimate | float | None]]:
    """What is shown of a result: before, after and the paired change of every score."""
    from fastmemit.experiments.intervals import HARMONIC, SHARES, difference_intervals, score_intervals

    records: Any = result["records"]
    sure = [name for name in names if name in SHARES or name in HARMONIC]
    before: dict[str, Any] = {name: result["before"][name] for name in names}
    after: dict[str, Any] = {name: result["after"][name] for name in names}
    change: dict[str, Any] = {
        name: None if before[name] is None or after[name] is None else after[name] - before[name] for name in names
    }
    before |= score_intervals(records, when="before", names=sure)
    after |= score_intervals(records, names=sure)
    change |= difference_intervals(records, records, whens=("after", "before"), names=sure)
    if result["perplexity"] is not None:
        found = result["perplexity"]
        before["perplexity"], after["perplexity"] = found["before"], found["after"]
        change["perplexity"] = found["after"] - found["before"]
    return {"before": before, "after": after, "change": change}


def _metrics(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in COLUMNS:
            raise argparse.ArgumentTypeError(f"there is no metric {name!r}; choose from {', '.join(COLUMNS)}")
    if not names:
        raise argparse.ArgumentTypeError(f"name one or more of {', '.join(COLUMNS)}")
    return names
