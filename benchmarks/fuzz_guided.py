"""Coverage-guided fuzz of every reader and of what is done with files, in slices.

    pip install atheris
    nice -n 10 python benchmarks/fuzz_guided.py --runs 100000 --json benchmarks/results/fuzz-guided.json

libFuzzer, by way of atheris, keeps the files that reach a line of the packages that none did before,
and damages those further: as bytes, or with what `fuzz_mutations` knows of their format. Each reader
is a slice in a process of its own.  `fuzz_workers` says what may come of a file; an error that is
none of this package's, a hang, a death and changed content under a checksum are defects, are kept
as files in --out, and end this program with 1.  Half of the files with a checksum get one that fits.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "python", ROOT / "tests"):
    sys.path.insert(0, str(folder))

_SECONDS = 20  # for one file, before it counts as a hang
_SLOW = {"report": 0.05, "report-page": 0.05}  # of a share: they draw figures
_DICTIONARY = (
    '"', "{", "}", "[", "]", ":", ",", "null", "true", "NaN", "Infinity", "-1", "1e999", '""', "[]",
    "{}", "\\\\ud800", "\\x1b[2J", "\\xe2\\x80\\xae", "__metadata__", "sha256", "provenance", "F32",
    "shape", "data_offsets", ":left", ":right", "sum", "\\x00",
)  # fmt: skip


def main() -> int:
    """Run the slices, and write what came of them."""
    args = _arguments()
    if args.slice is not None:
        _work(args.slice, args.runs, args.seed, args.out)
        return 0
    names = args.readers.split(",") if args.readers else _names()
    shares = {name: _SLOW.get(name, 1.0) for name in names}
    begun = time.monotonic()
    found: dict[str, Any] = {}
    args.out.mkdir(parents=True, exist_ok=True)
    for name in names:
        runs = max(1, round(args.runs * shares[name] / sum(shares.values())))
        found[name] = _slice(name, runs, args)
        print(name, json.dumps(found[name]), flush=True)
        if args.json is not None:
            _save(args, found, time.monotonic() - begun)
    defects = sum(len(one["defects"]) for one in found.values())
    files = sum(sum(one["results"].values()) for one in found.values())
    print(f"{files} files in {time.monotonic() - begun:.0f} s, {defects} defects")
    return 1 if defects else 0


def _slice(name: str, runs: int, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--slice", name, "--runs", str(runs)]
    command += ["--seed", str(args.seed), "--out", str(args.out)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    log = done.stdout + done.stderr
    (args.out / f"{name}.log").write_text(log, encoding="utf-8")
    path = args.out / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    found = {"results": {}, "defects": [], **found}
    if done.returncode != 0:
        last = [line for line in log.splitlines() if "ERROR" in line or "Error" in line][-1:]
        found["defects"].append({"result": "died", "code": done.returncode, "said": last})
    covered = re.findall(r"cov: (\d+)", log)
    found["lines"] = [int(covered[0]), int(covered[-1])] if covered else None
    return found


def _work(name: str, runs: int, seed: int, out: Path) -> None:
    """Fuzz one reader; ends the process after so many files."""
    import atheris

    with atheris.instrument_imports(include=["fastcov", "fastmemit"]):
        import logging
        import warnings

        import torch

        from benchmarks import fuzz_mutations, fuzz_workers
        from benchmarks.fuzz_readers import described, readers

    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    reader = readers()[name]
    others = fuzz_workers.valid_files()
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    home = Path(tempfile.mkdtemp(dir=base))
    valid = reader.make(home).read_bytes()
    content = described(reader.read(reader.make(_fresh(home))))
    results: Counter[str] = Counter()
    defects: dict[str, dict[str, Any]] = {}

    def one(data: bytes) -> None:
        forged = reader.seal is not None and bool(zlib.crc32(data) & 1)
        if forged:
            data = fuzz_workers.sealed(reader, data)
        path = reader.make(_fresh(home))
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
        if draw.random() < 0.5:
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
    options += ["-print_final_stats=1", "-detect_leaks=0"]
    atheris.Setup([sys.argv[0], str(corpus), *options], one, custom_mutator=mutate)
    atheris.Fuzz()


def _fresh(home: Path) -> Path:
    """An empty folder of always the same name."""
    import shutil

    folder = home / "now"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _place(message: str) -> str:
    """Where a traceback ends, so that each defect counts once."""
    found = re.findall(r'File "([^"]+)", line (\d+)', message)
    return ":".join(found[-1]) if found else message[:80]


def _escaped(word: str) -> str:
    return word.replace('"', '\\"')


def _names() -> list[str]:
    from benchmarks.fuzz_readers import readers

    return list(readers())


def _save(args: argparse.Namespace, found: dict[str, Any], seconds: float) -> None:
    from fastcov.bench.machine import versions

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
    parser.add_argument("--slice", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
