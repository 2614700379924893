"""Commands that a process started by torchrun runs one after the other; see test_parallel.py."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path

RANK = os.environ.get("RANK", "")


def commands(at: Path) -> dict[str, list[str]]:
    """Name -> arguments, in some of which the processes differ."""
    corpus, cache = ["--corpus", str(at / "corpus.jsonl")], ["--cache", str(at / "shared")]
    begin = ["precompute", "--model", str(at / "model")]
    four = ["--multiplier", "4"]
    other = corpus if RANK == "0" else ["--corpus", str(at / "other.jsonl")]
    absent = corpus if RANK == "0" else ["--corpus", str(at / "absent.jsonl")]
    return {
        "plain": [*begin, *corpus, *cache, *four, "--quartic"],
        "again": [*begin, *corpus, *cache, *four, "--quartic"],
        "own disks": [*begin, *corpus, "--cache", str(at / f"own{RANK}"), *four],
        "auto": [*begin, *corpus, *cache, "--multiplier", "auto", "--allow-fewer"],
        "too short": [*begin, *corpus, *cache, "--multiplier", "1000"],
        "another corpus": [*begin, *other, *cache, "--multiplier", "5"],
        "no corpus in one": [*begin, *absent, *cache, "--multiplier", "5"],
        "self": [*begin, "--corpus", "self", *cache, *four],
        "no model": ["precompute", "--model", str(at / "nothing"), *corpus],
        "not divided": ["experiment", "report", str(at)],
    }


def main(at: Path) -> None:
    """Run them all, and write down what each said."""
    from fastmemit.cli import main as command

    found = {}
    for name, arguments in commands(at).items():
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = command(arguments)
        found[name] = (code, out.getvalue(), err.getvalue())
    (at / f"said{RANK}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
