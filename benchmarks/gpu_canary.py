"""First contact with a GPU: kernel by kernel, each in a process of its own, which is ended when it hangs.

    python benchmarks/gpu_canary.py --out canary.jsonl
    python benchmarks/gpu_canary.py --device cpu --groups reference    # what it does, without a GPU

One line a case, written as soon as it is known: the error and the bias of the diagonal against float64, whether
anything above the diagonal changed, whether three runs give the same bits, and on a GPU the milliseconds of the median
of nine. A hang or an illegal access costs the rest of that kernel's cases and nothing else. "wgmma-whole" is the same
kernel with no tile divided: where it is the faster one, dividing the tail of the schedule costs more than it gains.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from fastcov import ops  # noqa: E402
from fastcov.bench.measure import expected_lower, failure, lower_error  # noqa: E402
from fastcov.kernels import cuda  # noqa: E402

Case = tuple[str, int, int, bool]  # dtype of the keys, n, d, whether a mask leaves out a tenth of them

_SMALL = ((64, 8), (100, 136), (1203, 400), (8192, 4464), (65536, 6400))
#: What runs in one process: the kernel and its route, in the order in which they are tried.
GROUPS: dict[str, list[Case]] = {
    "cuda:wgmma": [
        *((dtype, n, d, mask) for n, d in _SMALL for dtype in ("bfloat16", "float16") for mask in (False, True)),
        *(("bfloat16", 65536, d, False) for d in (11008, 16384)),
    ],
    "cuda:wgmma-whole": [("bfloat16", 65536, d, False) for d in (6400, 11008, 16384)],
    "cuda:mma": [
        (dtype, n, d, mask)
        for n, d in ((100, 133), (1203, 400), (8192, 4464))
        for dtype in ("bfloat16", "float32")
        for mask in (False, True)
    ],
    "triton": [
        (dtype, n, d, mask)
        for n, d in ((1203, 400), (8192, 4464), (65536, 6400))
        for dtype in ("bfloat16", "float32")
        for mask in (False, True)
    ],
    "panels": [("bfloat16", 65536, 6400, False), ("bfloat16", 65536, 16384, False)],
    "addmm": [("bfloat16", 65536, 6400, False), ("bfloat16", 65536, 16384, False)],
    "reference": [("float32", 100, 133, False), ("bfloat16", 1203, 400, True)],
}


def update(group: str, C: Tensor, X: Tensor, mask: Tensor | None) -> None:
    """One update of C (d, d) by keys X (n, d), by a kernel of `GROUPS`."""
    kernel, _, route = group.partition(":")
    if kernel == "cuda":
        cuda.update(C, X, mask, 1.0, route.removesuffix("-whole"))
    elif kernel == "addmm":
        C.copy_(torch.addmm(C, X.mT, X, out_dtype=torch.float32))
    else:
        ops.rank_k_update(C, X, mask=mask, kernel=kernel)


def tried(group: str, case: Case, device: torch.device) -> dict[str, Any]:
    """What one case gives."""
    name, n, d, masked = case
    generator = torch.Generator(device).manual_seed(n + d)
    X = torch.randn(n, d, generator=generator, device=device).to(getattr(torch, name))
    C = torch.randn(d, d, generator=generator, device=device)
    C.diagonal().abs_().add_(n)
    below = torch.ones(d, d, dtype=torch.bool, device=device).tril_()
    whole = group == "addmm"  # the one that reads and writes both triangles
    if not whole:
        C.masked_fill_(~below, float("nan"))
    mask, kept = None, X
    if masked:
        mask = torch.rand(n, generator=generator, device=device) < 0.9
        kept = X[mask].clone()
        X[~mask] = float("nan")
    wanted = expected_lower(C, kept)

    def run() -> Tensor:
        new = C.clone()
        update(group, new, X, mask)
        return new

    first = run()
    error, bias = lower_error(first, wanted)
    found: dict[str, Any] = {
        "group": group,
        "dtype": name,
        "n": n,
        "d": d,
        "mask": masked,
        "error": error,
        "bias": bias,
    }
    found["upper_unchanged"] = whole or bool(first[~below].isnan().all())
    found["same_bits"] = all(torch.equal(first[below], run()[below]) for _ in range(2))
    if device.type == "cuda":
        found |= timed(group, C, X, mask)
    good = failure(device, C.dtype, error, bias) is None
    found["ok"] = good and found["upper_unchanged"] and found["same_bits"]
    return found


def timed(group: str, C: Tensor, X: Tensor, mask: Tensor | None) -> dict[str, float]:
    """Milliseconds of an update, the median of nine, and useful TFLOP/s."""
    times = []
    for _ in range(9):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        update(group, C, X, mask)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    middle = sorted(times)[4]
    n, d = X.shape
    return {"ms": round(middle, 4), "useful_tflops": round(n * d * (d + 1.0) / middle / 1e9, 1)}


def child(group: str, cases: Sequence[Case], device: torch.device) -> None:
    """Try the cases of one group, a line each."""
    if group.endswith("-whole"):
        cuda._TURNS = 0  # too few to divide a tile among workers
    for case in cases:
        print(json.dumps(tried(group, tuple(case), device)), flush=True)


def watch(group: str, cases: Sequence[Case], device: str, quiet: float) -> list[dict[str, Any]]:
    """Run a group in a process of its own, which is killed after `quiet` seconds without a line; its lines.

    The last line says what went wrong, if anything did.
    """
    command = [sys.executable, __file__, "--child", group, json.dumps(cases), "--device", device]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    found: list[dict[str, Any]] = []
    said: list[str] = []
    hung = False
    while True:
        try:
            line = lines.get(timeout=quiet)
        except queue.Empty:
            hung = True
            process.kill()
            break
        if line is None:
            break
        if line.startswith("{"):
            found.append(json.loads(line))
        else:
            said = [*said[-5:], line.strip()]
    process.wait()
    if len(found) < len(cases):
        failure = f"no line for {quiet:g} s" if hung else f"exit status {process.returncode}: {' | '.join(said)}"
        found.append({"group": group, "case": list(cases[len(found)]), "failed": failure, "ok": False})
    return found


def main() -> int:
    """0 where every case is right, 1 where not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="write the lines here too, each as soon as its group has ended")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, help="default: all but the reference")
    parser.add_argument("--quiet", type=float, default=60.0, help="seconds without a line that count as a hang")
    parser.add_argument("--child", nargs=2, metavar=("GROUP", "CASES"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], json.loads(args.child[1]), torch.device(args.device))
        return 0
    begun, wrong = time.monotonic(), 0
    environment = os.environ.setdefault("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment]).rstrip(os.pathsep)
    for group in args.groups or [name for name in GROUPS if name != "reference"]:
        for line in watch(group, GROUPS[group], args.device, args.quiet):
            wrong += not line["ok"]
            print(json.dumps(line), flush=True)
            if args.out is not None:
                with open(args.out, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
    print(f"{wrong} wrong, {time.monotonic() - begun:.0f} s", file=sys.stderr)
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
