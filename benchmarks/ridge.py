"""Which ridge few keys need: how well ``C + r m I`` fits keys that it was not made of, and what an edit by it disturbs.

    python benchmarks/ridge.py --model smollm2 --corpus articles.jsonl --layers 5 --json FILE

C is the mean over the first d_m widths of keys, m the mean of its diagonal, r the relative ridge. For each d_m and r:

    likelihood  mean log likelihood of the keys behind those, up to --fresh widths, under a Gaussian with this second
                moment, by dimension; the larger the better (Hoffbeck and Landgrebe, 1996, leave single samples out)
    excess      what an edit of B facts without a loss disturbs of other text, over the least that it can: with keys K
                (d_k, B), A = C + r m I, M = K^T A^-1 K and F of all keys, trace(M^-1 K^T A^-1 F A^-1 K M^-1) over
                the same with A = F; K is drawn from a Gaussian with F

The second needs no model and no facts, the first nothing but a few keys more: both tell which ridge is right before any
edit is made. Everything in float64.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "python"):
    sys.path.insert(0, str(folder))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import fastcov  # noqa: E402
from fastcov.machine import this_machine  # noqa: E402
from fastmemit import Editor  # noqa: E402
from fastmemit.statistics import versions  # noqa: E402

RIDGES = (0.0, 0.001, 0.01, 0.03, 0.1, 0.3, 1.0)
BATCHES = (1, 16, 64, 256, 1024)


def fit(R: Tensor, fresh: Tensor) -> float:
    """Mean log likelihood by dimension, but for a constant, of keys with second moment `fresh` (d, d); A = R R^T."""
    return -float(2 * R.diagonal().log().sum() + torch.cholesky_solve(fresh, R).trace()) / (2 * len(R))


def disturbed(R: Tensor, F: Tensor, K: Tensor) -> float:
    """``trace(M^-1 K^T A^-1 F A^-1 K M^-1)`` of A = R R^T (d, d); K is (batches, d, B)."""
    X = torch.cholesky_solve(K, R)
    inverse = torch.linalg.inv(K.mT @ X)
    return float((inverse @ (X.mT @ F @ X) @ inverse).diagonal(dim1=1, dim2=2).sum())


def rows(moments: dict[float, fastcov.SecondMoment]) -> list[dict[str, Any]]:
    """A row for each multiplier and ridge; the largest multiplier is that of all keys."""
    *few, most = sorted(moments)
    F = moments[most].second_moment.double()
    d, everything = len(F), moments[most].count
    root = torch.linalg.cholesky(F)
    draw = torch.Generator().manual_seed(0)
    keys = {
        size: root @ torch.randn(max(1, 64 // size), d, size, generator=draw, dtype=torch.float64)
        for size in BATCHES
        if size < d
    }
    least = {size: disturbed(root, F, K) for size, K in keys.items()}
    found = []
    for multiplier in few:
        C, count = moments[multiplier].second_moment.double(), moments[multiplier].count
        fresh = (F * everything - C * count) / (everything - count)
        for ridge in RIDGES:
            added = ridge * C.diagonal().mean() * torch.eye(d, dtype=torch.float64)
            R, failed = torch.linalg.cholesky_ex(C + added)
            if failed or (count <= d and not ridge):
                continue  # as many keys as dimensions leave nothing to solve with
            excess = {size: round(disturbed(R, F, K) / least[size], 3) for size, K in keys.items()}
            found.append({"d_m": multiplier, "ridge": ridge, "likelihood": round(fit(R, fresh), 4), "excess": excess})
    return found


def main() -> None:
    """Print a table for each layer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--layers", type=int, nargs="+", required=True)
    parser.add_argument("--multipliers", type=float, nargs="+", default=[1, 2, 5, 10])
    parser.add_argument("--fresh", type=float, default=50, help="widths of keys in all")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    editor = Editor.from_pretrained(args.model, device="cpu", dtype="float32", cache_dir=args.cache)
    wanted = [*args.multipliers, args.fresh]
    stored = {each: editor.precompute(args.corpus, multiplier=each, layers=args.layers) for each in wanted}
    tables = {}
    for layer in args.layers:
        module = editor.adapter.projection_name(layer)
        tables[layer] = rows({each: one.moment(module) for each, one in stored.items()})
        print(f"\n{editor.name}, layer {layer}, all keys: {args.fresh:g} widths\n")
        sizes = list(tables[layer][0]["excess"])
        columns = ["d_m", "r", "likelihood", *(f"excess, {size}" for size in sizes)]
        print("|", " | ".join(columns), "|\n|" + " ---: |" * len(columns))
        for row in tables[layer]:
            numbers = [f"{row['d_m']:g}", f"{row['ridge']:g}", f"{row['likelihood']:.3f}"]
            print("|", " | ".join(numbers + [f"{row['excess'][size]:.2f}" for size in sizes]), "|", flush=True)
    if args.json:
        about = {"model": editor.name, "corpus": Path(args.corpus).name, "fresh": args.fresh, "versions": versions()}
        machine = this_machine(torch.device("cpu")).cpu
        args.json.write_text(json.dumps({**about, "machine": machine, "layers": tables}, indent=1) + "\n")


if __name__ == "__main__":
    main()
