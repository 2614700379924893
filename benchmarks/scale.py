"""Rates that plans of large runs need beside those of `fastcov.bench`: text, files, processes.

    python benchmarks/scale.py --text articles.jsonl --json benchmarks/results/NAME.json

Each is the best of three: a plan asks what the machine can do. torch's own threads are left as set.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
for part in (ROOT, ROOT / "python"):
    sys.path.insert(0, str(part))

import fastcov  # noqa: E402
from fastcov.machine import this_machine, versions  # noqa: E402

WIDTH = 4096  # of the moment that is written, read and added up
WORKER = """
import sys, time, torch, torch.distributed as dist
from fastcov.distributed import add_up_lower
rank, d = int(sys.argv[1]), int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
matrix, times = torch.ones(d, d), []
for _ in range(4):
    dist.barrier()
    begun = time.perf_counter()
    add_up_lower(matrix)
    times.append(time.perf_counter() - begun)
if rank == 0:
    print(min(times))
dist.destroy_process_group()
"""


def best(work) -> float:
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)


def tokenising(folder: str, text: Path) -> float:
    """Tokens a second of one process, in the chunks and at the context of a collect."""
    from transformers import AutoTokenizer

    from fastmemit.data import load_corpus
    from fastmemit.data.corpora import _TOKENISED_TOGETHER
    from fastmemit.models.loading import _source

    tokenizer = AutoTokenizer.from_pretrained(str(_source(folder)))
    corpus = load_corpus(text)
    found = []

    def work() -> None:
        texts, found[:] = islice(corpus.documents(0), 160), []
        while chunk := list(islice(texts, _TOKENISED_TOGETHER)):
            ids = tokenizer(chunk, truncation=True, max_length=2048)["input_ids"]
            found.append(sum(map(len, ids)))

    seconds = best(work)
    return sum(found) / seconds


def files(folder: Path) -> tuple[float, float]:
    """Bytes a second of writing and of reading a moment."""
    moment = fastcov.SecondMoment(WIDTH).update(torch.randn(64, WIDTH))
    path = folder / "moment.safetensors"
    size = WIDTH * (WIDTH + 1) // 2 * 4
    write = best(lambda: fastcov.save_moment(path, moment, {"module": "m"}))
    return size / write, size / best(lambda: fastcov.load_moment(path))


def adding_up(folder: Path) -> float:
    """Bytes of a triangle that two gloo processes add up in a second."""
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(folder / "meeting"), str(WIDTH)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    said = [worker.communicate(timeout=300)[0] for worker in workers]
    return WIDTH * (WIDTH + 1) // 2 * 4 / float(said[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        writing, reading = files(Path(folder))
        found = {
            "tokens_per_second": tokenising(args.model, args.text),
            "write_bytes_per_second": writing,
            "read_bytes_per_second": reading,
            "add_up_bytes_per_second": adding_up(Path(folder)),
        }
    for name, rate in found.items():
        print(f"{name:26}{rate:16,.0f}")
    if args.json is not None:
        about = {
            "machine": dataclasses.asdict(this_machine(torch.device("cpu"))),
            "versions": versions(),
            "load": list(os.getloadavg()),  # what else kept the machine busy
            "threads": torch.get_num_threads(),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": f"python benchmarks/scale.py --model {args.model} --text {args.text.name}",
        }
        args.json.write_text(json.dumps({**about, "rates": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
