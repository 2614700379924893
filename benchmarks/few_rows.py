"""Updates by few rows, beside reading and writing the sum once: ``OMP_NUM_THREADS=1 python benchmarks/few_rows.py``.

A rank-k update by n rows reads and writes a triangle, whatever n is, so few rows are limited by memory and many by
arithmetic. Printed are, for each width and number of rows, the least processor's time of many calls in one thread and
its GFLOP/s; and what adding a number to as many entries of one piece of memory takes. Two builds are compared by
running this in both checkouts in turns: ``PYTHONPATH=CHECKOUT python benchmarks/few_rows.py``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable


def least(call: Callable[[], object], seconds: float) -> float:
    """The least processor's time of a call among those that fit, two at least."""
    best, spent, calls = float("inf"), 0.0, 0
    while spent < seconds or calls < 2:
        begun = time.thread_time()
        call()
        took = time.thread_time() - begun
        best, spent, calls = min(best, took), spent + took, calls + 1
    return best


def main() -> int:
    """Print a line for each width."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", default="1536,3072,6144", metavar="D,...")
    parser.add_argument("--rows", default="8,16,32,64,128,256", metavar="N,...")
    parser.add_argument("--kernel", default="avx512f", metavar="NAME")
    parser.add_argument("--dtype", default="float32", metavar="NAME", help="of the keys: float32, bfloat16 or float16")
    parser.add_argument("--seconds", type=float, default=0.2, metavar="S", help="processor's time for each number")
    args = parser.parse_args()

    import torch

    from fastcov import rank_k_update

    torch.set_num_threads(1)
    for d in map(int, args.widths.split(",")):
        C = torch.zeros(d, d)
        triangle = C.view(-1)[: d * (d + 1) // 2]
        row: dict[str, object] = {
            "d": d,
            "sum alone_ms": round(1e3 * least(lambda x=triangle: x.add_(1), args.seconds), 2),
        }
        for n in map(int, args.rows.split(",")):
            X = torch.ones(n, d, dtype=getattr(torch, args.dtype))
            took = least(lambda C=C, X=X: rank_k_update(C, X, kernel=args.kernel), args.seconds)
            row[f"n {n}"] = {"ms": round(1e3 * took, 2), "gflops": round(n * d * (d + 1) / took / 1e9, 1)}
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
