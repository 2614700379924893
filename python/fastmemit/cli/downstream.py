"""``fastmemit downstream``: perplexity and tasks, before and after edits."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fastmemit.cli.options import above_zero, add_model, check_writable, make_editor
from fastmemit.errors import BadConfig, BadData

if TYPE_CHECKING:
    from fastmemit.evaluation.downstream import Downstream, State

HELP = "Perplexity on a text and lm-evaluation-harness's tasks, before and after saved edits."
EPILOG = """examples:
  fastmemit downstream --model smollm2 --edit edit.safetensors --text wiki.txt --tokens 20000
  fastmemit downstream --model gpt2-xl --edit edit.safetensors --text wiki.txt \\
      --tasks hellaswag,arc_easy --limit 200 --json downstream.json
  fastmemit downstream --model smollm2 --tasks my_task --include-path my_tasks/
"""


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    verb.add_argument(
        "--edit",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a saved edit; several are applied in their order (default: none, the model alone)",
    )
    verb.add_argument("--force", action="store_true", help="though made for another model")
    text = verb.add_argument_group("perplexity")
    text.add_argument("--text", type=Path, metavar="FILE", help="running text, UTF-8")
    text.add_argument("--tokens", type=above_zero, metavar="N", help="its first N (default all)")
    text.add_argument(
        "--context",
        type=above_zero,
        metavar="N",
        help="tokens in a window (default: what the model takes, at most 1024)",
    )
    text.add_argument(
        "--stride",
        type=above_zero,
        metavar="N",
        help="begin a window every N tokens, so that they overlap (default: they do not)",
    )
    tasks = verb.add_argument_group("lm-evaluation-harness")
    tasks.add_argument("--tasks", metavar="A,B", help="names of its tasks, such as hellaswag")
    tasks.add_argument("--include-path", type=Path, metavar="DIR", help="tasks of your own (YAML)")
    tasks.add_argument("--limit", type=above_zero, metavar="N", help="questions of each task")
    tasks.add_argument("--num-fewshot", type=_whole, metavar="N", help="examples before each")
    tasks.add_argument("--batch-size", default=1, type=_batch_size, metavar="N", help="or auto")
    verb.add_argument("--json", type=Path, metavar="FILE", help="write everything found here")
    add_model(verb)


def run(args: argparse.Namespace) -> None:
    """Check everything, score, apply, score again, undo; print and write both."""
    names = [name.strip() for name in (args.tasks or "").split(",") if name.strip()]
    if args.text is None and not names:
        raise BadConfig("There is nothing to score; give --text FILE, --tasks NAMES, or both.")
    check_writable(args.json)

    from fastcov.store import atomic_file
    from fastmemit.data.reading import check_file
    from fastmemit.evaluation.downstream import compare, find_tasks
    from fastmemit.evaluation.perplexity import read_text

    if args.text is not None:
        check_file(args.text, BadData)
    bars = not args.quiet and sys.stderr.isatty()
    tasks = find_tasks(names, include_path=args.include_path, progress=bars) if names else None
    editor = make_editor(args)
    edits = [editor.load(path, force=args.force) for path in args.edit]
    text = None
    if args.text is not None:
        text = read_text(args.text, editor.tokenizer, tokens=args.tokens, context=args.context, stride=args.stride)
    found = compare(
        editor,
        edits,
        text=text,
        tasks=tasks,
        limit=args.limit,
        num_fewshot=args.num_fewshot,
        batch_size=args.batch_size,
        progress=bars,
    )
    if args.json is not None:  # before it is shown, which may fail
        with atomic_file(args.json) as file:
            file.write((json.dumps(found, indent=1) + "\n").encode())
    facts = sum(edit["facts"] for edit in found["edits"])
    print(f"{editor.name}, {len(edits)} edits with {facts} facts")
    if found["text"] is not None:
        shape = found["text"]
        print(
            f"{shape['name']}: {shape['tokens']} tokens predicted in {shape['windows']} windows of {shape['context']}"
        )
    print(_table(found))
    if args.json is not None:
        print(f"written to {args.json}")


def _table(found: Downstream) -> str:
    """One line for each number, before and after; standard errors behind ±."""
    columns = {"before": dict(_lines(found["before"]))}
    if found["after"] is not None:
        columns["after"] = dict(_lines(found["after"]))
    names = list(columns["before"])
    width = max(map(len, names))
    lines = [" " * width + "".join(f"{column:>20}" for column in columns)]
    for name in names:
        lines.append(f"{name:<{width}}" + "".join(f"{c[name]:>20}" for c in columns.values()))
    return "\n".join(lines)


def _lines(state: State) -> Iterator[tuple[str, str]]:
    if state["perplexity"] is not None:
        yield "perplexity", f"{state['perplexity']:.4f}"
    if state["tasks"] is None:
        return
    for task, scores in state["tasks"]["scores"].items():
        for metric, value in scores.items():
            if "_stderr" in metric:
                continue
            name, *rest = metric.split(",")
            error = scores.get(",".join([f"{name}_stderr", *rest]))
            yield f"{task} {metric}", f"{value:.4f}" + (f" ± {error:.4f}" if error else "")


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 but is {text!r}")
    return int(text)


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else above_zero(text)
