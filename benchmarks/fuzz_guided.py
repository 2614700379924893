"""Coverage-guided fuzz of every reader and of what is done with files, in slices.

    pip install atheris
    nice -n 10 python benchmarks/fuzz_guided.py --runs 100000 --json guided.json

libFuzzer, by way of atheris, keeps the files that reach a line of the packages that none did before, and damages those
further: as bytes, or with what `fuzz_mutations` knows of their format.
Each reader is a slice in a process of its own.  `fuzz_workers` says what may come of a file; an
error that is none of this package's, a hang, a death and changed content under a checksum are
defects, are kept as files in --out, and end this program with 1.  Half of the files with a checksum
get one that fits.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import re
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "python", ROOT / "tests"):
    sys.path.insert(0, str(folder))

try:
    import atheris
except ModuleNotFoundError:  # --help is there without it
    atheris = None

with nullcontext() if atheris is None else atheris.instrument_imports(include=["fastcov", "fastmemit"]):
    import torch

    from benchmarks import fuzz_mutations, fuzz_workers
    from benchmarks.fuzz_readers import described, readers
    from fastcov.machine import versions

_SECONDS = 20  # for one file, before it counts as a hang
_DICTIONARY = (
    '"', "{", "}", "[", "]", ":", ",", "null", "true", "NaN", "Infinity", "-1", "1e999", '""', "[]",
    "{}", "\\\\ud800", "\\x1b[2J", "\\xe2\\x80\\xae", "__metadata__", "sha256", "provenance", "F32",
    "shape", "data_offsets", ":left", ":right", "sum", "\\x00",
)  # fmt: skip


def main() -> int:
    """Run the slices, and write what came of them."""
    args = _arguments()
    if atheris is None:
        print("error: The package atheris is not installed; pip install atheris.", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    fuzz_workers.valid_others(next(iter(readers().values())))  # made once, for every slice
    names = args.readers.split(",") if args.readers else list(readers())
    begun = time.monotonic()
    found: dict[str, Any] = {}
    args.out.mkdir(parents=True, exist_ok=True)
    for name in names:
        found[name] = _slice(name, -(-args.runs // len(names)), args)
        print(name, json.dumps(found[name]), flush=True)
        if args.json is not None:
            _save(args, found, time.monotonic() - begun)
    defects = sum(len(one["defects"]) for one in found.values())
    files = sum(sum(one["results"].values()) for one in found.values())
    print(f"{files} files in {time.monotonic() - begun:.0f} s, {defects} defects")
    return 1 if defects else 0


def _slice(name: str, runs: int, args: argparse.Namespace) -> dict[str, Any]:
    path = args.out / f"{name}.log"
    child = os.fork()  # everything is imported already
    if child == 0:
        log_file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log_file, 1)
        os.dup2(log_file, 2)
        try:
            _work(name, runs, args.seed, args.out)
        finally:
            traceback.print_exc()
            os._exit(3)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    log = path.read_text(encoding="utf-8", errors="replace")
    path = args.out / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    found = {"results": {}, "defects": [], **found}
    if code != 0:
        last = [line for line in log.splitlines() if "ERROR" in line or "Error" in line][-1:]
        found["defects"].append({"result": "died", "code": code, "said": last})
    covered = re.findall(r"cov: (\d+)", log)
    found["edges"] = [int(covered[0]), int(covered[-1])] if covered else None
    return found


def _work(name: str, runs: int, seed: int, out: Path) -> None:
    """Fuzz one reader; ends the process after so many files."""
    reader = readers()[name]
    others = fuzz_workers.valid_others(reader)
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    home = Path(tempfile.mkdtemp(dir=base))
    path = reader.make(home)  # what a reader writes beside it stays there, as with a user
    valid = path.read_bytes()
    content = described(reader.read(path))
    results: Counter[str] = Counter()
    defects: dict[str, dict[str, Any]] = {}

    def one(data: bytes) -> None:
        forged = reader.seal is not None and bool(zlib.crc32(data) & 1)
        if forged:
            data = fuzz_workers.sealed(reader, data)
        path.write_bytes(data)
        result: dict[str, Any] = {}
        # A damage that only the reader's own mutations know fits its checksums too.
        forged = forged or reader.damage is not None
        fuzz_workers.attempt(reader, path, content, forged, result)
        results[result["result"]] += 1
        outcome = fuzz_workers.Outcome(name, seed, results.total(), "guided", len(data), **result)
        if fuzz_workers.is_defect(reader, outcome):
            key = f"{outcome.result} {outcome.error} {_place(outcome.message)}"
            if key not in defects:
                kept = out / f"{name}-{len(defects)}.bin"
                kept.write_bytes(data)
                defects[key] = {"result": outcome.result, "error": outcome.error, "file": kept.name,
                                "message": outcome.message[-400:], "times": 0}  # fmt: skip
            defects[key]["times"] += 1
        if results.total() >= runs:
            said = {"results": dict(sorted(results.items())), "defects": list(defects.values())}
            (out / f"{name}.json").write_text(json.dumps(said) + "\n")
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    def mutate(data: bytes, most: int, number: int) -> bytes:
        draw = random.Random(number)
        if draw.random() < 0.3:
            return bytes(atheris.Mutate(data, most))
        try:
            if reader.family == "safetensors":
                return fuzz_mutations.damaged_header(draw, data)[1][:most]
            if reader.family in ("json", "lines"):
                lines = reader.family == "lines"
                return fuzz_mutations.damaged_json(draw, data, lines=lines)[1][:most]
            if reader.damage is not None:
                return reader.damage(draw, data)[1][:most]
        except Exception:  # damaged so far that its format is gone
            pass
        return fuzz_mutations.damaged_bytes(draw, data or b"x", others)[1][:most]

    corpus = Path(tempfile.mkdtemp(dir=base))
    (corpus / "valid").write_bytes(valid)
    words = Path(corpus.parent, f"{corpus.name}.dict")
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in _DICTIONARY), encoding="utf-8")
    options = [f"-seed={seed + 1}", f"-max_len={max(4096, 4 * len(valid))}", f"-dict={words}"]
    options += [f"-timeout={_SECONDS}", "-rss_limit_mb=6000", f"-artifact_prefix={out}/{name}-"]
    options += ["-mutate_depth=1"]  # more damages at once are refused for the first of them
    atheris.Setup([sys.argv[0], str(corpus), *options], one, custom_mutator=mutate)
    atheris.Fuzz()


def _place(message: str) -> str:
    """Where a traceback ends, so that each defect counts once."""
    found = re.findall(r'File "([^"]+)", line (\d+)', message)
    return ":".join(found[-1]) if found else message[:80]


def _escaped(word: str) -> str:
    return word.replace('"', '\\"')


def _save(args: argparse.Namespace, found: dict[str, Any], seconds: float) -> None:
    totals: Counter[str] = Counter()
    for one in found.values():
        totals.update(one["results"])
    content = {
        "files": totals.total(),
        "seed": args.seed,
        "results": dict(sorted(totals.items())),
        "defects": sum(len(one["defects"]) for one in found.values()),
        "seconds": round(seconds, 1),
        "versions": versions(),
        "slices": found,
    }
    args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=100_000, help="files of all readers together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readers", metavar="A,B", help="only these")
    parser.add_argument("--out", type=Path, default=Path("fuzz-guided"), help="logs and defects")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
