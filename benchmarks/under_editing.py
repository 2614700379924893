"""Gains and costs of iterated editing and of preserved text, in one large batch with the same target vectors.

    python benchmarks/under_editing.py --model smollm2 --data counterfact_1400.json --corpus articles.jsonl \
        --text wikitext2_test.txt --cells emmet emmet,iterations=3 emmet,preserve=neighbours@1 --out lines.jsonl
    python benchmarks/under_editing.py --report lines.jsonl.xz

A cell is ``unedited``, or a method, settings, and what is preserved beside C, ``@`` the weight of each token:
``neighbours``, neighbours' prompts of other records of the same relations, or ``articles``, as many tokens of articles.
No prompt is preserved that shares a rare word, such as a name, with what is scored.

Records are those of `fastmemit.data.batches(records, 1, seed=0)` from --start on, scored on their facts, paraphrases
and first --neighbours neighbours. A killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "python", ROOT / "benchmarks"):
    sys.path.insert(0, str(folder))

import torch  # noqa: E402
from what_c_is_worth import by_cell, common_options, read_lines  # noqa: E402

from fastcov.machine import this_machine  # noqa: E402
from fastmemit import Editor, EditRequest  # noqa: E402
from fastmemit.data import Record, batches, load_corpus, load_records  # noqa: E402
from fastmemit.evaluation.perplexity import edited_nll, read_text  # noqa: E402
from fastmemit.evaluation.scores import SCORES, score_records  # noqa: E402
from fastmemit.experiments.intervals import difference_intervals, score_intervals  # noqa: E402
from fastmemit.methods import PreservedText, ReadCache, parse_overrides  # noqa: E402
from fastmemit.partial_forward import read_at_subject  # noqa: E402
from fastmemit.statistics import versions  # noqa: E402
from fastmemit.text import subject_row  # noqa: E402

#: A word of the records that so many neighbours' prompts have is the relation's, and not a name.
COMMON = 40


def others(records: Sequence[Record], scored: Sequence[Record], number: int) -> list[str]:
    """Neighbours' prompts of records that are not scored, of the same relations, with no word of what is scored."""
    words = Counter(word for one in records for prompt in one.neighbourhood for word in set(_words(prompt)))
    asked = [prompt for one in scored for prompt in (one.request.text, *one.paraphrases, *one.neighbourhood)]
    taboo = {word for prompt in asked for word in _words(prompt) if words[word] < COMMON}
    relations, cases = {one.relation_id for one in scored}, {one.case_id for one in scored}
    found: dict[str, None] = {}
    for turn in range(10):  # the first neighbour of each record, then the second
        for one in records:
            if one.case_id not in cases and one.relation_id in relations and turn < len(one.neighbourhood):
                prompt = one.neighbourhood[turn]
                if not taboo & set(_words(prompt)) and any(words[word] < COMMON for word in _words(prompt)):
                    found.setdefault(prompt)
    return list(found)[:number]


def _words(text: str) -> list[str]:
    return [word.strip(",.:;?!\"'()") for word in text.lower().split()]


def articles(path: str, tokenizer: Any, tokens: int) -> list[str]:
    """The beginnings of the last articles in a seed's order, so many tokens in all; C is of the first ones."""
    texts, left = list(load_corpus(path).documents(seed=0)), tokens
    found = []
    for text in reversed(texts):
        ids = tokenizer(text, truncation=True, max_length=min(left, 256))["input_ids"]
        found.append(tokenizer.decode(ids))
        left -= len(ids)
        if left <= 0:
            break
    return found


def main() -> None:
    """Run what is not in the file yet, or print the tables of one that is there."""
    args = arguments()
    if args.report:
        report([line for path in args.report for line in read_lines(path)])
        return
    editor = Editor.from_pretrained(args.model, device="cpu", dtype="float32", cache_dir=args.cache)
    every = [one[0] for one in batches(load_records(args.data), 1, seed=0)]
    batch = every[args.start : args.start + args.size]
    asked = [
        dataclasses.replace(one, neighbourhood=one.neighbourhood[: args.neighbours]) for one in batch[: args.scored]
    ]
    text = read_text(args.text, editor.tokenizer, tokens=2048)
    there = {line["cell"] for line in (read_lines(args.out) if args.out.is_file() else [])}
    prompts = others(every, batch, args.prompts)
    count = sum(len(editor.tokenizer(prompt)["input_ids"]) for prompt in prompts)
    texts = {"neighbours": prompts, "articles": articles(args.corpus, editor.tokenizer, count)}
    reads = ReadCache()
    with open(args.out, "a", encoding="utf-8") as out:

        def write(cell: str, scores: Iterable[Any], **about: Any) -> None:
            here = this_machine(torch.device("cpu")).cpu
            for score in scores:
                out.write(json.dumps({"cell": cell, "case_id": score.case_id, "after": score.shares()}) + "\n")
            out.write(json.dumps({"cell": cell, **about, "cpu": here, "versions": versions()}) + "\n")
            out.flush()
            print(cell, about, file=sys.stderr)

        for cell in [cell for cell in args.cells if cell not in there]:
            if cell == "unedited":
                scores = score_records(editor.adapter, editor.tokenizer, asked)
                write(cell, scores, nll=edited_nll(editor.adapter, text))
                continue
            method, *settings = cell.split(",")
            kept = [each.partition("=")[2] for each in settings if each.startswith("preserve=")]
            settings = [each for each in settings if not each.startswith("preserve=")]
            config = editor.config(method, **parse_overrides(settings, method))
            editor.precompute(args.corpus, multiplier=10, layers=config.layers)
            named, _, weight = (kept[0] if kept else "").partition("@")
            preserve = PreservedText.from_text(texts[named], float(weight) if weight else None) if named else None
            requests = [one.request for one in batch]
            goal = torch.stack([target.vector for target in editor.targets(requests, config)])
            asked_for = torch.linalg.vector_norm(goal - block_output(editor, config, requests))
            begun = time.process_time()
            edit = editor.edit(requests, config, verify=False, reads=reads, preserve=preserve)
            took = time.process_time() - begun
            left = float(torch.linalg.vector_norm(goal - block_output(editor, config, requests)) / asked_for)
            scores = score_records(editor.adapter, editor.tokenizer, asked)
            seconds = {"edit_cpu_seconds": round(took, 1), "cpu_seconds": round(time.process_time() - begun, 1)}
            about = edit.delta.provenance.get("preserved_text")
            write(cell, scores, nll=edited_nll(editor.adapter, text), left=left, preserved=about, **seconds)
            edit.undo()


def block_output(editor: Editor, config: Any, requests: Sequence[EditRequest]) -> torch.Tensor:
    """What the last edited block puts out at the bare prompts' subjects, (B, d)."""
    rows = [subject_row(editor.tokenizer, "", request) for request in requests]
    return read_at_subject(editor.adapter, rows, outputs=[editor.adapter.block(config.layers[-1])])[1][0]


def report(lines: Iterable[dict[str, Any]]) -> None:
    """Print a table; differences are to the method as published, paired by record."""
    cells, about = by_cell(lines)
    names = [name for name in SCORES if name not in ("es", "s")]
    upper = [name.upper() for name in names]
    heads = ["cell", *upper, "PM", "perplexity", "left", *(f"{name}, to 1" for name in upper)]
    print("|", " | ".join(heads), "|\n| --- |" + " ---: |" * (len(heads) - 1))
    for cell, found in cells.items():
        scores = score_intervals(found, names=SCORES)
        row = [f"{scores[name].value:.1f}" if scores[name] else "-" for name in names]
        said = about[cell]
        row.append(f"{100 * sum(one['after']['pm'] for one in found) / len(found):.1f}")
        row.append(f"{math.exp(said['nll']):.2f}")
        row.append(f"{said['left']:.1%}" if "left" in said else "")
        base = cells.get(cell.split(",")[0])
        if base is None or base is found:
            row += [""] * len(names)
        else:
            gaps = difference_intervals(found, base)
            row += [f"{g.value:+.1f} ({g.low:.1f}, {g.high:.1f})" for g in (gaps[name] for name in names)]
        print(f"| `{cell}` |", " | ".join(row), "|")


def arguments() -> argparse.Namespace:
    """The options."""
    parser = common_options(__doc__)
    parser.add_argument("--cells", nargs="+", default=["emmet", "emmet,iterations=3"], metavar="METHOD[,NAME=VALUE]")
    parser.add_argument("--size", type=int, default=256, help="records in the batch")
    parser.add_argument("--scored", type=int, help="how many of them are scored (default: all)")
    parser.add_argument("--neighbours", type=int, default=10, help="of each record that are scored")
    parser.add_argument("--prompts", type=int, default=1024, help="neighbours' prompts that are preserved")
    return parser.parse_args()


if __name__ == "__main__":
    main()
