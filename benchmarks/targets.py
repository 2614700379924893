"""What a target vector costs: the literal procedure, Adam side by side, and rotate, on SmolLM2-135M, in one run.

    python benchmarks/targets.py --data counterfact.json --json benchmarks/results/targets.json

The baseline is tests/reference/literal_targets.py: full forwards of the unmodified model, one
request at a time, as released implementations do it; tests/fastmemit/methods/test_golden.py holds
it to what they compute.  Each of Adam's vectors is compared with it before any time counts: the
same number of steps, a relative difference of at most 1e-4.  All three take turns, and seconds are
those of the processor as well as the clock's, for a machine that has other work.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

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
    order = [batch[0] for batch in batches(records, 1, seed=args.seed)]
    requests = [record.request for record in order[args.first : args.first + args.requests]]
    contexts = Contexts(model, tokenizer, args.seed).of("memit")
    adam = TargetSettings(layer=args.layer, steps=args.steps)
    rotate = TargetSettings(layer=args.layer, optimiser="rotate", steps=args.rotate_steps)

    spent: dict[str, list[tuple[float, float]]] = {"literal": [], "adam": [], "rotate": []}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        clock, processor = time.perf_counter(), time.process_time()
        found = work()
        spent[name].append((time.perf_counter() - clock, time.process_time() - processor))
        print(f"  {name:8} {spent[name][-1][0]:7.1f} s, of the processor {spent[name][-1][1]:7.1f} s", flush=True)
        return found

    worst, made = 0.0, {}
    # The literal requests are spread over the rounds of ours, so that all see the same machine.
    literal = requests[:: max(1, len(requests) // args.literal)][: args.literal]
    for turn in range(args.rounds):
        for name, settings in (("adam", adam), ("rotate", rotate)):
            tokens = args.batch_tokens if name == "adam" else args.rotate_batch_tokens
            made[name] = timed(
                name, partial(optimise, adapter, tokenizer, requests, contexts, settings, batch_tokens=tokens)
            )
        for request in literal[turn :: args.rounds]:
            block = adapter.block(args.layer)
            vector, _, losses = timed(
                "literal", partial(literal_target, model, tokenizer, block, request, contexts, adam)
            )
            target = made["adam"][requests.index(request)]
            difference = float((target.vector - vector).norm() / vector.norm())
            worst = max(worst, difference)
            if difference > TOLERANCE or len(losses) != len(target.losses):
                sys.exit(
                    f"{request.text!r} differs: {difference:.2g} relative, "
                    f"{len(target.losses)} steps against {len(losses)}."
                )
    facts = {"literal": 1, "adam": len(requests), "rotate": len(requests)}
    each = {
        name: {
            unit: statistics.median(run[place] for run in runs) / facts[name]
            for place, unit in enumerate(("seconds", "processor_seconds"))
        }
        for name, runs in spent.items()
    }
    result = {
        "requests": len(requests),
        "first": args.first,
        "literal_requests": len(literal),
        "contexts": len(contexts),
        "layer": args.layer,
        "steps": {name: [len(target.losses) for target in targets] for name, targets in made.items()},
        "worst_relative_difference": worst,
        "a_fact": each,
        "runs": spent,
        "batch_tokens": {"adam": args.batch_tokens, "rotate": args.rotate_batch_tokens},
        "threads": torch.get_num_threads(),
        "processor": this_machine(torch.device("cpu")).cpu,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(f"{len(requests)} requests, {len(literal)} of them literally, {result['threads']} threads")
    for name, cost in each.items():
        seconds, processor = cost["seconds"], cost["processor_seconds"]
        ratio = each["literal"]["processor_seconds"] / processor
        print(f"{name:8} {seconds:7.2f} s a fact, of the processor {processor:7.2f} s: a {ratio:.1f}th")
    print(f"largest relative difference of one of Adam's vectors {worst:.1e}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", help="CounterFact (default: the facts that the package ships)")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--first", type=int, default=0, help="position of the first record (docs/guide/evaluation.md)")
    parser.add_argument("--literal", type=int, default=6, help="how many of them are computed literally too")
    parser.add_argument("--rounds", type=int, default=3, help="runs of all three")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rotate-steps", type=int, default=14)
    parser.add_argument("--layer", type=int, default=5)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--rotate-batch-tokens", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
