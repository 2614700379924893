"""CounterFact scores: many records at once against one at a time, on SmolLM2-135M, in one run.

    python benchmarks/evaluation.py --data counterfact.json \
        --json benchmarks/results/evaluation.json

The baseline is tests/reference/literal_evaluation.py: the unmodified model, one record at a time, one padded batch of
its prompts with both answers, logits at every position, as released
implementations do it.  All costs, successes and exact matches are compared before any time counts.
Both take turns, so that both see the same machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from fastcov.machine import this_machine

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "python", ROOT / "tests"):
    sys.path.insert(0, str(folder))

from fastmemit.data import batches, builtin_facts, load_records  # noqa: E402
from fastmemit.evaluation import score_records  # noqa: E402
from fastmemit.evaluation.scores import RecordScore  # noqa: E402
from fastmemit.models import find_adapter, load_model  # noqa: E402
from reference.literal_evaluation import literal_record  # noqa: E402

TOLERANCE = 1e-4  # nats per token


def main() -> None:
    """Compare, run both in turns, print, write."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_model("smollm2", device="cpu", dtype="float32")
    adapter = find_adapter(model)
    records = load_records(args.data) if args.data else builtin_facts()
    records = batches(records, min(args.records, len(records)), 1, seed=args.seed)[0]

    def ours() -> list[RecordScore]:
        return score_records(adapter, tokenizer, records, batch_tokens=args.batch_tokens)

    def literal() -> list[Any]:
        return [literal_record(model, tokenizer, record) for record in records]

    worst = _compare(ours(), literal())  # and both are warm
    print(f"same scores; largest difference of a cost {worst:.1e} nats per token", flush=True)
    seconds: dict[str, list[float]] = {"together": [], "literal": []}
    processor_seconds: dict[str, list[float]] = {"together": [], "literal": []}
    for number in range(args.rounds):
        for name, run in (("together", ours), ("literal", literal)):
            wall, processor = _timed(run)
            seconds[name].append(wall)
            processor_seconds[name].append(processor)
        print(f"round {number}: " + ", ".join(f"{n} {s[-1]:.2f} s" for n, s in seconds.items()),
              flush=True)  # fmt: skip
    together, alone = (statistics.median(seconds[name]) for name in ("together", "literal"))
    ratios = [b / a for a, b in zip(seconds["together"], seconds["literal"], strict=True)]
    result = {
        "records": len(records),
        "worst_difference": worst,
        "seconds": seconds,
        "processor_seconds": processor_seconds,  # of all threads; waiting ones count too
        "speedup": alone / together,
        "speedup_of_each_round": ratios,
        "batch_tokens": args.batch_tokens,
        "threads": torch.get_num_threads(),
        "processor": this_machine(torch.device("cpu")).cpu,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(
        f"{len(records)} records, {result['threads']} threads, {result['processor']}\n"
        f"one record at a time (median) {alone:8.2f} s\n"
        f"together (median)             {together:8.2f} s\n"
        f"speedup {alone / together:.2f}x (rounds: {', '.join(f'{r:.2f}' for r in ratios)})"
    )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Wall time, and processor time of all threads."""
    begun, spent = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - begun, time.process_time() - spent


def _compare(ours: list[RecordScore], literal: list[Any]) -> float:
    """The largest difference of a cost; leave with a message if anything is not the same."""
    worst = 0.0
    for score, parts in zip(ours, literal, strict=True):
        mine = ((score.rewrite,), score.paraphrases, score.neighbourhood)
        for pairs, others in zip(mine, parts, strict=True):
            for pair, ((new, _), (true, _)) in zip(pairs, others, strict=True):
                worst = max(worst, abs(pair.new - new), abs(pair.true - true))
                if worst > TOLERANCE:
                    sys.exit(f"Case {score.case_id}: {pair} against {(new, true)}.")
        rewrite, paraphrases, neighbourhood = (
            [(new[0] < true[0], true[0] < new[0], new[1], true[1]) for new, true in part] for part in parts
        )
        exact = tuple(tuple(pair.exact for pair in pairs) for pairs in mine)
        expected = (
            float(rewrite[0][0]),
            sum(new for new, *_ in paraphrases) / len(paraphrases) if paraphrases else None,
            sum(row[1] for row in neighbourhood) / len(neighbourhood) if neighbourhood else None,
            ((rewrite[0][2],), tuple(r[2] for r in paraphrases), tuple(r[3] for r in neighbourhood)),
        )
        if (score.es, score.ps, score.ns, exact) != expected:
            sys.exit(f"Case {score.case_id}: {score} against {expected}.")
    return worst


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", help="CounterFact (default: the facts that the package ships)")
    parser.add_argument("--records", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, help="of a forward (default: ours)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
