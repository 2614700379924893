"""What the covariance is worth: the same edits, with the same target vectors, solved with different C.

    python benchmarks/what_c_is_worth.py --model smollm2 --data counterfact_1400.json --corpus articles.jsonl \
        --text wikitext2_test.txt --out lines.jsonl
    python benchmarks/what_c_is_worth.py --report lines.jsonl.xz

The second moments that are compared:

    identity    the mean of the diagonal of C at multiplier 10 times I: no covariance at all
    diagonal    the diagonal of C at multiplier 10
    31          31 keys, with the ridge that edits add below the minimum
    shuffled    multiplier 10 of the same articles, the words of each in random order
    self        multiplier 10 of text that the model writes
    5, 10, ...  these multipliers, the defaults
    5@128       this multiplier, documents cut at so many tokens
    10+bfloat16 this multiplier, the model run in bfloat16 as keys are collected

A line is one record after one edit: model, method, batch size, C, its scores. A killed run goes on where it was.
Records are those of `fastmemit.data.batches(records, 1, seed=0)` from --start on.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import random
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "python"):
    sys.path.insert(0, str(folder))

import torch  # noqa: E402

import fastcov  # noqa: E402
from fastcov.machine import this_machine  # noqa: E402
from fastmemit import Editor  # noqa: E402
from fastmemit.data import batches, load_corpus, load_records  # noqa: E402
from fastmemit.data.corpora import corpus_from_texts  # noqa: E402
from fastmemit.evaluation.perplexity import edited_nll, read_text  # noqa: E402
from fastmemit.evaluation.scores import SCORES, score_records  # noqa: E402
from fastmemit.experiments.intervals import difference_intervals, score_intervals  # noqa: E402
from fastmemit.methods import parse_overrides  # noqa: E402
from fastmemit.statistics import Statistics, versions  # noqa: E402

PAIRED = ("s", "ea", "pa", "ns", "na")  # what is compared with ten widths, record by record
CS = ("10", "identity", "diagonal", "31", "1", "5@128", "10+bfloat16", "shuffled", "self", "100")


class Moments:
    """The second moments of one editor, collected or made once, by the name of the table."""

    def __init__(self, editor: Editor, corpus: str, layers: tuple[int, ...]) -> None:
        self._editor, self._corpus, self._layers = editor, corpus, layers
        self._found: dict[str, Statistics] = {}

    def use(self, name: str) -> None:
        """Let edits be solved with these from now on."""
        if name not in self._found:
            self._found[name] = self._make(name)
        self._editor.store.use(self._found[name])

    def _make(self, name: str) -> Statistics:
        collect = self._editor.precompute
        if name == "self":
            return collect("self", multiplier=10, layers=self._layers)
        if name == "shuffled":
            return collect(shuffled(self._corpus), multiplier=10, layers=self._layers)
        if name == "31":
            width = self._editor.adapter.d_k(self._layers[0])
            return collect(self._corpus, multiplier=31 / width, layers=self._layers)
        if name in ("identity", "diagonal"):
            return self._replaced(name)
        keys, _, forward = name.partition("+")
        multiplier, _, length = keys.partition("@")
        return collect(
            self._corpus,
            multiplier=float(multiplier),
            layers=self._layers,
            max_length=int(length) if length else None,
            forward=forward or None,
        )

    def _replaced(self, name: str) -> Statistics:
        """The collected moments with another matrix in the place of C, of the same trace and number of keys."""
        self.use("10")
        ten = self._found["10"]
        moments = {}
        for module in ten.paths:
            moment = ten.moment(module)
            diagonal = moment.lower.diagonal()
            new = torch.diag(diagonal if name == "diagonal" else torch.full_like(diagonal, float(diagonal.mean())))
            own = {"budget": moment.count, "keys": moment.count, "versions": versions()}
            moments[module] = (fastcov.SecondMoment.from_lower(new, moment.count), own)
        shared = {key: ten.provenance[key] for key in ("seed", "multiplier", "allow_fewer")}
        return self._editor.store.add({**shared, "corpus": {"name": name, "fingerprint": name}}, moments)


def shuffled(path: str) -> Any:
    """The articles of a file, the words of each in random order."""
    texts, order = [], random.Random(0)
    for text in load_corpus(path).documents(seed=0):
        words = text.split()
        order.shuffle(words)
        texts.append(" ".join(words))
    return corpus_from_texts("shuffled words", texts)


def main() -> None:
    """Run what is not in the file yet, or print the tables of one that is there."""
    args = arguments()
    if args.report:
        report([line for path in args.report for line in read_lines(path)])
        return
    editor = Editor.from_pretrained(args.model, device="cpu", dtype="float32", cache_dir=args.cache)
    records = [one[0] for one in batches(load_records(args.data), 1, seed=0)][args.start :]
    text = read_text(args.text, editor.tokenizer, tokens=2048) if args.text else None
    there = {tuple(line["cell"]) for line in (read_lines(args.out) if args.out.is_file() else [])}
    before: dict[int, dict[str, Any]] = {}
    with open(args.out, "a", encoding="utf-8") as out:
        for method, size, number in args.cells:
            config = editor.config(method, **parse_overrides(args.set, method))
            moments = Moments(editor, args.corpus, config.layers)
            dealt = [records[at : at + size] for at in range(0, size * number, size)]
            todo = [name for name in args.c if (editor.name, method, size, number, name, *args.set) not in there]
            if not todo:
                continue
            new = [one for batch in dealt for one in batch if one.case_id not in before]
            for score in score_records(editor.adapter, editor.tokenizer, new):
                before[score.case_id] = score.as_dict()
            editor.targets([one.request for batch in dealt for one in batch], config)
            for name in todo:
                moments.use(name)
                begun, lines, costs = time.process_time(), [], []
                for batch in dealt:
                    edit = editor.edit([one.request for one in batch], config, verify=False)
                    for score in score_records(editor.adapter, editor.tokenizer, batch):
                        lines.append((score.case_id, score.as_dict()))
                    if text is not None and len(costs) < args.text_batches:
                        costs.append(edited_nll(editor.adapter, text))
                    edit.undo()
                about = {"model": editor.name, "method": method, "batch": size, "C": name}
                here = this_machine(torch.device("cpu")).cpu
                cell = [editor.name, method, size, number, name, *args.set]
                took = round(time.process_time() - begun, 1)
                for case, after in lines:
                    out.write(json.dumps({**about, "cell": cell, "case_id": case, "before": before[case],
                                          "after": after}) + "\n")  # fmt: skip
                out.write(json.dumps({**about, "cell": cell, "nll": costs, "cpu_seconds": took,
                                      "cpu": here, "versions": versions()}) + "\n")  # fmt: skip
                out.flush()
                print(*cell, f"{took} s", file=sys.stderr)


def report(lines: Iterable[dict[str, Any]]) -> None:
    """Print a table for each model, method, settings and batch size; differences are to multiplier 10, paired."""
    cells: dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]] = {}
    costs: dict[tuple[Any, ...], list[Any]] = {}
    for line in lines:
        place = (line["model"], line["method"], line["batch"], *line["cell"][5:])
        if "case_id" in line:
            cells.setdefault(place, {}).setdefault(line["C"], []).append(line)
        else:
            costs[(*place, line["C"])] = line["nll"]
    for place, found in cells.items():
        settings, count = "".join(f", {setting}" for setting in place[3:]), len(next(iter(found.values())))
        print(f"\n{place[0]}, {place[1]}{settings}, batches of {place[2]}, {count} records\n")
        columns = [
            "C",
            *(score.upper() for score in SCORES),
            "perplexity",
            *(f"{one.upper()}, to 10" for one in PAIRED),
        ]
        print("|", " | ".join(columns), "|\n| --- |" + " ---: |" * (len(columns) - 1))
        for name in sorted(found, key=lambda each: CS.index(each) if each in CS else len(CS)):
            scores = score_intervals(found[name], names=SCORES)
            row = [f"{scores[each].value:.1f}" if scores[each] else "-" for each in SCORES]
            cost = costs.get((*place, name)) or []
            row.append(f"{math.exp(sum(cost) / len(cost)):.2f}" if cost else "-")
            other = difference_intervals(found[name], found["10"]) if name != "10" and "10" in found else {}
            for each in PAIRED:
                gap = other.get(each)
                row.append("" if gap is None else f"{gap.value:+.1f} ({gap.low:.1f}, {gap.high:.1f})")
            print(f"| {name} |", " | ".join(row), "|")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, compressed or not."""
    opened = lzma.open if path.suffix == ".xz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def by_cell(lines: Iterable[dict[str, Any]]) -> tuple[dict[str, list[dict[str, Any]]], dict[str, dict[str, Any]]]:
    """The records of each cell, and the line that says what the cell is."""
    cells: dict[str, list[dict[str, Any]]] = {}
    about: dict[str, dict[str, Any]] = {}
    for line in lines:
        if "case_id" in line:
            cells.setdefault(line["cell"], []).append(line)
        else:
            about[line["cell"]] = line
    return cells, about


def _cell(text: str) -> tuple[str, int, int]:
    method, size, number = text.split(":")
    return method, int(size), int(number)


def common_options(about: str) -> argparse.ArgumentParser:
    """The options that this has in common with under_editing.py."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", help="CounterFact records")
    parser.add_argument("--corpus", help="articles")
    parser.add_argument("--text", help="running text for perplexity, 2,048 tokens of it")
    parser.add_argument("--start", type=int, default=128, help="the first record's place in the order")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--report", type=Path, nargs="+", help="print the tables of these files")
    return parser


def arguments() -> argparse.Namespace:
    """The options."""
    parser = common_options(__doc__)
    parser.add_argument("--text-batches", type=int, default=2)
    parser.add_argument("--cells", type=_cell, nargs="+", default=["emmet:16:4"], metavar="METHOD:SIZE:NUMBER")
    parser.add_argument("--c", nargs="+", default=list(CS), help="names of the list above")
    about = "settings of all edits, such as optimiser=rotate"
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help=about)
    return parser.parse_args()


if __name__ == "__main__":
    main()
