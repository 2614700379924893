"""Damaged files for every reader: each must be read as it was written, or refused in a sentence.

    nice -n 10 python benchmarks/fuzz.py --files 4000 --json benchmarks/results/fuzz.json

Files of every kind that the packages read are damaged (bits, bytes and blocks, headers, values of JSON, forged
checksums) or replaced by what is no file at all, and read in processes with a limit
on memory and on time.  `fuzz_workers` says what may come of one; a crash, a hang, an allocation far
beyond the file's size, and changed content under a checksum are defects, and end this program
with 1.  One mutant again: --readers NAME --only NUMBER, with the same seed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "python", ROOT / "tests"):
    sys.path.insert(0, str(folder))

from benchmarks.fuzz_readers import readers  # noqa: E402
from benchmarks.fuzz_workers import Outcome, is_defect, run  # noqa: E402
from fastcov.machine import this_machine, versions  # noqa: E402
from fastmemit import statistics  # noqa: E402


def main() -> int:
    """Damage, read, count, write."""
    args = _arguments()
    chosen = [reader for name, reader in readers().items() if name in args.readers]
    each = -(-args.files // len(chosen))
    numbers = range(each) if args.only is None else [args.only]
    begun = time.monotonic()
    counts: dict[str, Counter[str]] = {}
    kinds: Counter[str] = Counter()
    defects: list[Outcome] = []
    peak = 0
    for reader in chosen:
        counted = counts[reader.name] = Counter[str]()
        for outcome in run(reader, numbers, args.seed):
            counted[outcome.result] += 1
            kinds[outcome.kind] += 1
            peak = max(peak, outcome.peak)
            if is_defect(reader, outcome):
                defects.append(outcome)
                print(f"DEFECT {_short(outcome)}", flush=True)
                if args.only is not None:
                    print(outcome.message)
            elif args.only is not None:
                print(_short(outcome), outcome.message)
        shown = ", ".join(f"{n} {name}" for name, n in counted.most_common())
        print(f"{reader.name:22} {counted.total():5}  {shown}", flush=True)
    total = sum(counted.total() for counted in counts.values())
    seconds = time.monotonic() - begun
    print(f"{total} files in {seconds:.0f} s, {len(defects)} defects, peak {peak >> 10} KiB")
    if args.json:
        content = {
            "files": total,
            "seed": args.seed,
            "readers": {name: dict(sorted(c.items())) for name, c in counts.items()},
            "kinds": dict(sorted(kinds.items())),
            "defects": [asdict(outcome) for outcome in defects],
            "largest_peak_bytes": peak,
            "seconds": round(seconds, 1),
            "processor": this_machine(torch.device("cpu")).cpu,
            "system": this_machine(torch.device("cpu")).system,
            "versions": {**versions(), **statistics.versions(), "safetensors": _version()},
        }
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 1 if defects else 0


def _short(outcome: Outcome) -> str:
    last = outcome.message.strip().splitlines()
    return (
        f"{outcome.reader} {outcome.number} ({outcome.kind}, {outcome.size} bytes): "
        f"{outcome.result} {outcome.error} {last[-1][:160] if last else ''}"
    )


def _version() -> str:
    import safetensors

    return str(safetensors.__version__)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", type=int, default=4000, help="mutants of all readers together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readers", type=lambda text: text.split(","), default=list(readers()), metavar="A,B")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="this mutant of each reader")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if unknown := set(args.readers) - set(readers()):
        parser.error(f"no such reader: {', '.join(sorted(unknown))}; {', '.join(readers())}")
    return args


if __name__ == "__main__":
    sys.exit(main())
