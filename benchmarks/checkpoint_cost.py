"""What a checkpoint costs: writing it, reading it, and the digest of a batch.

    python benchmarks/checkpoint_cost.py --modules 5 --width 6400 --json out.json

The default is GPT2-XL, five layers. A batch of 4,096 tokens is digested, as on a CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fastcov import SecondMoment, bucket  # noqa: E402
from fastcov.batching import chained  # noqa: E402
from fastcov.collecting import Accumulator  # noqa: E402
from fastcov.files import atomic_file  # noqa: E402
from fastcov.machine import this_machine  # noqa: E402
from fastcov.store import SHARE, Checkpoint, Taken, read_checkpoint  # noqa: E402


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--modules", type=int, default=5)
    parser.add_argument("--width", type=int, default=6400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk that is to be measured")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    names = [f"module.{number}" for number in range(args.modules)]
    sums = Accumulator(torch.nn.Linear(1, 1), dict.fromkeys(names), torch.float32)
    taken = {}
    for name in names:
        moment = SecondMoment.from_lower(torch.randn(args.width, args.width).tril_(), 1000, 1.0)
        taken[name] = Taken(moment, None, 1000, None, -1, torch.device("cpu"))
    sums.resume(1, taken)
    (batch,) = bucket([[7] * 512] * 8, 4096)
    writes, reads, digests = [], [], []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "checkpoint"
        checkpoint = Checkpoint(path, {}, 0)
        for _ in range(args.rounds):
            writes.append(_timed(lambda: checkpoint.write(sums)))
            reads.append(_timed(lambda: read_checkpoint(path)))
            digests.append(_timed(lambda: chained(b"", batch)))
        size = path.stat().st_size
    write = statistics.median(writes)
    result = {
        "modules": args.modules,
        "width": args.width,
        "bytes": size,
        "write_seconds": writes,
        "read_seconds": reads,
        "digest_seconds": digests,
        "interval_by_default": max(300.0, write / SHARE),
        "processor": this_machine(torch.device("cpu")).cpu,
        "torch": torch.__version__,
    }
    print(
        f"{args.modules} modules of width {args.width}: {size / 1e6:.0f} MB, written in "
        f"{write:.2f} s, read in {statistics.median(reads):.2f} s; every "
        f"{result['interval_by_default']:.0f} s that is "
        f"{100 * write / result['interval_by_default']:.2f} %; digest of a batch "
        f"{1e3 * statistics.median(digests):.2f} ms"
    )
    if args.json:
        with atomic_file(args.json) as file:
            file.write((json.dumps(result, indent=1) + "\n").encode())


def _timed(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
