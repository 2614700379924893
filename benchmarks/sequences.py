"""Sequences of several methods side by side: the table, the oldest facts, the paired differences and the figure.

    python benchmarks/sequences.py MEMIT=DIR RLSEdit=DIR ... --figure FILE.svg

reads the steps that `fastmemit experiment sequential` wrote into each folder, or one file of steps (``.jsonl`` or
``.jsonl.xz``) with the runs' own names in place of NAME=DIR; ``--gather FILE.jsonl.xz`` writes that file.
"""

from __future__ import annotations

import argparse
import json
import lzma
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "python"):
    sys.path.insert(0, str(folder))

from fastmemit.experiments.intervals import PERPLEXITY, Estimate, difference_intervals, score_intervals  # noqa: E402
from fastmemit.experiments.plots import Drawing, Line, render  # noqa: E402
from fastmemit.experiments.results import read_lines  # noqa: E402
from fastmemit.experiments.sequential import STEPS  # noqa: E402

SHOWN = ("s", "ea", "pa", "na")
DRAWN = ("ea", "pa", "na")

Steps = list[dict[str, Any]]


def read(places: list[str]) -> dict[str, Steps]:
    """The steps of each run by its name, in the order given."""
    found: dict[str, Steps] = {}
    for place in places:
        name, _, folder = place.rpartition("=")
        path = Path(folder)
        for line in read_lines(path / STEPS if path.is_dir() else path):
            found.setdefault(name or line["run"], []).append(line)
    return found


def table(runs: dict[str, Steps]) -> str:
    """A row for each step of each run, in percent with 95 % intervals over records."""
    first = next(iter(runs.values()))[-1]
    before = score_intervals(first["records"], when="before")
    rows = [
        "| | facts | S | EA | PA | NA | perplexity |",
        "| --- | ---: | --- | --- | --- | --- | ---: |",
        f"| unedited | | {' | '.join(_text(before[name], '.0f') for name in SHOWN)} | |",
    ]
    for name, steps in runs.items():
        for step in steps:
            sure = score_intervals(step["records"])
            scores = " | ".join(_text(sure[score], ".0f") for score in SHOWN)
            rows.append(f"| {name} | {step['facts']} | {scores} | {step['perplexity']:.1f} |")
    return "\n".join(rows)


def differences(runs: dict[str, Steps]) -> str:
    """What each run has beyond the first where both were scored last; in points, paired by record."""
    names = list(runs)
    rows = [f"| beyond {names[0]} | facts | S | EA | PA | NA |", "| --- | ---: | --- | --- | --- | --- |"]
    first = {step["facts"]: step["records"] for step in runs[names[0]]}
    for name in names[1:]:
        for step in [step for step in runs[name] if step["facts"] in first][-1:]:
            found = difference_intervals(step["records"], first[step["facts"]])
            scores = " | ".join(_text(found[score], "+.1f") for score in SHOWN)
            rows.append(f"| {name} | {step['facts']} | {scores} |")
    return "\n".join(rows)


def ages(runs: dict[str, Steps]) -> str:
    """EA of each batch at the end, the oldest first, and of the first batch at every step."""
    rows = []
    for name, steps in runs.items():
        newest = " ".join(f"{batch['ea']:3.0f}" for batch in steps[-1]["by_batch"])
        oldest = ", ".join(f"{step['by_batch'][0]['ea']:.0f}" for step in steps)
        rows.append(f"    {name:<24}{newest}    the first batch over time: {oldest}")
    return "\n".join(rows)


def figure(runs: dict[str, Steps], title: str) -> bytes:
    """Scores and perplexity against facts written, as SVG."""
    lines = []
    for colour, (name, steps) in enumerate(runs.items()):
        points: dict[float | None, dict[str, Estimate | None]] = {}
        for step in steps:
            cost = step["perplexity"]
            scores = score_intervals(step["records"], names=DRAWN)
            points[step["facts"]] = {**scores, PERPLEXITY: Estimate(cost, cost, cost)}
        before = score_intervals(steps[-1]["records"], when="before", names=DRAWN)
        points[steps[-1]["facts"]] |= {f"unedited {score}": value for score, value in before.items()}
        lines.append(Line(name, points, colour))
    return render(Drawing(title, tuple(lines), facts=True))["svg"]


def _text(found: Estimate | None, form: str) -> str:
    return "" if found is None else f"{found.value:{form}} ({found.low:{form}} to {found.high:{form}})"


def main() -> None:
    """Print the tables; write the figure and the gathered steps where they are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--title", default="Facts written in sequence")
    parser.add_argument("--gather", type=Path)
    args = parser.parse_args()
    runs = read(args.runs)
    print(table(runs), differences(runs), ages(runs), sep="\n\n")
    if args.figure:
        args.figure.write_bytes(figure({name: steps for name, steps in runs.items() if len(steps) > 1}, args.title))
    if args.gather:
        with lzma.open(args.gather, "wt", preset=9 | lzma.PRESET_EXTREME) as file:
            file.writelines(json.dumps({"run": name, **step}) + "\n" for name, steps in runs.items() for step in steps)


if __name__ == "__main__":
    main()
