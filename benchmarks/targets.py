"""Target vectors: requests side by side against one at a time, on SmolLM2-135M, in one run.

    python benchmarks/targets.py --data counterfact.json --json benchmarks/results/targets.json

The baseline is tests/reference/literal_targets.py: full forwards of the unmodified model, one
request at a time, as released implementations do it.  Each vector is compared before any time
counts: the same number of steps, a relative difference of at most 1e-4.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers

from fastcov.machine import this_machine

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "python", ROOT / "tests"):
    sys.path.insert(0, str(folder))

from fastmemit.data import batches, builtin_facts, load_records  # noqa: E402
from fastmemit.models import find_adapter, load_model  # noqa: E402
from fastmemit.targets import TargetSettings, optimise  # noqa: E402
from fastmemit.text import Contexts  # noqa: E402
from reference.literal_targets import literal_target  # noqa: E402

TOLERANCE = 1e-4


def main() -> None:
    """Run both, compare, print, write."""
    args = _arguments()
    model, tokenizer = load_model("smollm2", device="cpu", dtype="float32")
    adapter = find_adapter(model)
    records = load_records(args.data) if args.data else builtin_facts()
    requests = [r.request for r in batches(records, args.requests, 1, seed=args.seed)[0]]
    contexts = Contexts(model, tokenizer, args.seed).of("memit")
    settings = TargetSettings(layer=args.layer, steps=args.steps)

    ours: list[float] = []
    literal: list[float] = []
    worst = 0.0
    targets = []
    # The literal requests are spread over the rounds of ours, so that both see the same machine.
    shares = [list(range(i, len(requests), args.rounds)) for i in range(args.rounds)]
    for share in shares:
        begun = time.perf_counter()
        targets = optimise(adapter, tokenizer, requests, contexts, settings, batch_tokens=args.batch_tokens)
        ours.append(time.perf_counter() - begun)
        for index in share:
            begun = time.perf_counter()
            vector, _, losses = literal_target(
                model, tokenizer, adapter.block(args.layer), requests[index], contexts, settings
            )
            literal.append(time.perf_counter() - begun)
            target = targets[index]
            difference = float((target.vector - vector).norm() / vector.norm())
            worst = max(worst, difference)
            if difference > TOLERANCE or len(losses) != len(target.losses):
                sys.exit(
                    f"{requests[index].text!r} differs: {difference:.2g} relative, "
                    f"{len(target.losses)} steps against {len(losses)}."
                )
            print(f"  literal {literal[-1]:6.1f} s  {requests[index].text}", flush=True)
    batched, alone = statistics.median(ours), sum(literal)
    result = {
        "requests": len(requests),
        "contexts": len(contexts),
        "steps": [len(target.losses) for target in targets],
        "worst_relative_difference": worst,
        "batched_seconds": ours,
        "literal_seconds": literal,
        "batched_seconds_per_request": batched / len(requests),
        "literal_seconds_per_request": alone / len(requests),
        "speedup": alone / batched,
        "batch_tokens": args.batch_tokens,
        "threads": torch.get_num_threads(),
        "processor": this_machine(torch.device("cpu")).cpu,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(
        f"{len(requests)} requests, {result['threads']} threads, {result['processor']}\n"
        f"literal, one at a time  {alone:8.1f} s  {alone / len(requests):6.2f} s a request\n"
        f"side by side (median)   {batched:8.1f} s  {batched / len(requests):6.2f} s a request\n"
        f"speedup {alone / batched:.1f}x; largest relative difference of a vector {worst:.1e}"
    )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", help="CounterFact (default: the facts that the package ships)")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3, help="runs of the batched version")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--layer", type=int, default=8)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
