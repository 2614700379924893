"""Files that interrupted work goes on from: checkpoints, and the folder of sequences."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import torch

from benchmarks import fuzz_samples as samples
from benchmarks.fuzz_mutations import damaged_header
from benchmarks.fuzz_readers import Absent, Reader
from fastcov import SecondMoment
from fastcov.checkpoint import Taken, read_checkpoint, write_checkpoint
from fastmemit.experiments.results import check_header
from fastmemit.experiments.sequential import STEPS, read_sequences
from fastmemit.experiments.tables import sequence_table

_BATCHES = 2
_DIGEST = 32  # bytes, the last ones of a checkpoint


def resumed_readers() -> list[Reader]:
    """The readers of what an earlier run of the same left behind."""
    return [
        Reader("checkpoint", "checkpoint", _checkpoint, read_checkpoint, True, damage=_damaged_inside),
        Reader("sequential-header", "json", _header, _read_header),
        Reader("sequential-steps", "lines", _steps, _read_steps),
    ]


def _checkpoint(folder: Path) -> Path:
    draw = torch.Generator().manual_seed(0)
    keys = torch.randn(20, 5, generator=draw)
    taken = {
        "down.0": Taken(SecondMoment(5).update(keys), 30, 20, None, -1, torch.device("cpu")),
        "down.1": Taken(SecondMoment(5).update(keys[:15]), 30, 20, keys[15:], 3, torch.device("cpu")),
    }
    state = {
        "identity": {"model": "f" * 64, "seed": 3},
        "sums": {"dtype": "torch.float32", "launch_rows": 8192},
        "machine": {"threads": 1, "kernels": ["avx2"]},
        "batches": 4,
        "stream": "ab" * 32,
    }
    path = folder / "sums.checkpoint"
    with path.open("wb") as file:
        write_checkpoint(file, state, taken)
    return path


def _damaged_inside(draw: random.Random, data: bytes) -> tuple[str, bytes]:
    """Another header or state, under a digest that fits."""
    kind, made = damaged_header(draw, data)
    kept = made[:-_DIGEST]
    return f"{kind}, sealed", kept + hashlib.sha256(kept).digest()


_SEQUENCE = {**samples.HEADER, "batches": [[1, 2], [3]], "score_every": 1}


def _header(folder: Path) -> Path:
    path = folder / "sequential.json"
    check_header(path, _SEQUENCE, "sequences")
    return path


def _read_header(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(path)  # a header would be written, and none was read
    check_header(path, _SEQUENCE, "sequences")
    return json.loads(path.read_text(encoding="utf-8"))


def _steps(folder: Path) -> Path:
    path = folder / STEPS
    scores = {"es": 90.0, "ps": 80.0, "ns": None, "s": 79.5}
    lines = [
        {
            "key": f"memit/b2x2/{name}/plain/{edits}",
            "method": "memit",
            "batch_size": 2,
            "multiplier": multiplier,
            "preserve": False,
            "keys": 128,
            "edits": edits,
            "facts": 2 * edits,
            "failed": 0,
            "scores": scores,
            "before": scores,
            "by_batch": [scores] * edits,
            "perplexity": 36.5,
        }
        for name, multiplier in (("x2", 2.0), ("full", None))
        for edits in range(1, _BATCHES + 1)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def _read_steps(path: Path) -> Any:
    found = read_sequences(path, _BATCHES)
    if not found:
        raise Absent
    return found, sequence_table([line for lines in found.values() for line in lines])
