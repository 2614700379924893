"""Folders as a sweep leaves them, with scores that are drawn and not measured."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastmemit.evaluation.scores import SHARES, score_means
from fastmemit.experiments.results import Cell

#: How many prompts of each kind a record has.
PROMPTS = np.array([1, 2, 10])

#: What tells one variant of the settings from another, and how much it spares of the collapse.
VARIANTS: tuple[tuple[dict[str, Any], float], ...] = (
    ({}, 0.0),
    ({"relative_ridge": 0.01}, 0.8),
    ({"shrinkage": "oas"}, 0.9),
)
SWEEP: dict[str, Any] = {
    "format": 1,
    "model": "tiny-model",
    "fingerprint": "f" * 64,
    "tokenizer": "t" * 64,
    "dtype": "float32",
    "data": {"name": "records.json", "sha256": "d" * 64},
    "corpus": {"name": "corpus.jsonl", "fingerprint": "c" * 64},
    "seed": 0,
    "max_length": None,
    "perplexity": None,
    "methods": {"memit": {"layers": [3, 4, 5], "clamp": 1.0}, "emmet": {"layers": [5]}},
}


def cell(
    method: str = "memit",
    multiplier: float | None = 2.0,
    size: tuple[int, int] = (4, 10),
    *,
    settings: Mapping[str, Any] | None = None,
    spared: float = 0.0,
    bos: bool = True,
    seed: int = 0,
    perplexity: bool = False,
) -> Cell:
    """A cell whose scores fall towards the multiplier 1, less so where `spared` is near 1."""
    batch_size, batches = size
    distance = 10.0 if multiplier is None else abs(math.log(multiplier)) + 0.02
    loss = (1 - spared) * math.exp(-3 * distance)
    name = json.dumps([method, multiplier, size, settings, bos, seed])
    generator = np.random.default_rng(list(name.encode()))
    records = []
    for case in range(batch_size * batches):
        chances = np.array([0.99, 0.95, 0.77]) - loss * np.array([0.5, 0.5, 0.27])
        after = generator.binomial([1, 2, 10], chances) / [1, 2, 10]
        before = np.random.default_rng(case).binomial([1, 2, 10], [0.1, 0.1, 0.8]) / [1, 2, 10]
        exact = generator.binomial([1, 2, 10], [0.95 - 0.9 * loss, 0.6 - 0.6 * loss, 0.1]) / PROMPTS
        known = np.random.default_rng(case).binomial([1, 2, 10], [0.0, 0.01, 0.1]) / PROMPTS
        records.append({
            "case_id": 100 + case,
            "batch": case // batch_size,
            "before": dict(zip(SHARES, map(float, (*before, *known)), strict=True)),
            "after": dict(zip(SHARES, map(float, (*after, *exact)), strict=True)),
        })  # fmt: skip
    return made(method, multiplier, size, records, settings, bos, seed, perplexity * (1 + loss))


def made(
    method: str,
    multiplier: float | None,
    size: tuple[int, int],
    records: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any] | None = None,
    bos: bool = True,
    seed: int = 0,
    worse: float = 0.0,
) -> Cell:
    """A cell of given records; `worse` is perplexity after over before, 0 for not measured."""
    name = "full" if multiplier is None else f"x{multiplier:g}"
    key = f"{method}/b{size[0]}x{size[1]}/{name}"
    key += "".join(f"+{setting}={value}" for setting, value in (settings or {}).items())
    key += ("" if bos else "-bos") + (f"/seed{seed}" if seed else "")
    perplexity = {"before": 36.5, "after": 36.5 * worse, "batches": size[1], "tokens": 5000}
    return {  # type: ignore[return-value]  # a Cell without what no table reads
        "key": key,
        "method": method,
        "batch_size": size[0],
        "batches": size[1],
        "multiplier": multiplier,
        "settings": dict(settings or {}),
        "bos": bos,
        "seed": seed,
        "keys": 67_000 if multiplier is None else round(1536 * multiplier),
        "scores": percent(record["after"] for record in records),
        "before": percent(record["before"] for record in records),
        "records": list(records),
        "perplexity": perplexity if worse else None,
        "jitter": {"3": 0.0},
    }


def percent(shares: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    return score_means(list(shares))


def record(
    case: int, es: float, ps: float | None = 1.0, ns: float | None = 1.0, **exact: float | None
) -> dict[str, Any]:
    """A record with these shares after the edit; before it, all are 0.5 where they exist.

    Without `exact` (ea, pa, na) it is one of the time before exact matches were recorded.
    """
    after = {"es": es, "ps": ps, "ns": ns, **exact}
    before = {name: None if share is None else 0.5 for name, share in after.items()}
    return {"case_id": case, "batch": 0, "before": before, "after": after}


def grid() -> list[Cell]:
    """The paper's grid in small: two methods, three sizes, six multipliers."""
    multipliers = (1.0, 2.0, 3.0, 4.0, 10.0, None)
    sizes = ((1, 40), (4, 10), (16, 5))
    return [cell(m, d, size) for m in ("emmet", "memit") for size in sizes for d in multipliers]


def study() -> list[Cell]:
    """Below the minimum: one size, many multipliers, variants of the settings, and perplexity."""
    multipliers = (0.02, 0.1, 0.5, 0.8, 1.0, 1.2, 1.5, 2.0, 4.0, 10.0, None)
    return [
        cell("memit", d, (16, 2), settings=s, spared=kept, bos=bos, perplexity=True)
        for s, kept in VARIANTS
        for bos in (True, False)
        for d in multipliers
    ]


def write(folder: Path, cells: Iterable[Cell], *, shards: int = 1, **sweep: Any) -> Path:
    """The folder of a sweep with these cells; `sweep` replaces fields of ``sweep.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps(SWEEP | sweep))
    lines = [json.dumps(found) + "\n" for found in cells]
    names = [f"results-{i + 1}of{shards}.jsonl" for i in range(shards)]
    for index, name in enumerate(names if shards > 1 else ["results.jsonl"]):
        (folder / name).write_text("".join(lines[index::shards]))
    timings = [
        {
            "key": json.loads(line)["key"],
            "seconds": {"plan": 1.5, "apply": 0.25, "evaluate": 8.0, "undo": 0.25},
            "hardware": "2 cores of a test",
            "versions": {"torch": "2.13.0", "fastmemit": "0.1.0"},
            "finished": "2026-01-01T00:00:00+00:00",
        }
        for line in lines
    ]
    (folder / "timings.jsonl").write_text("".join(json.dumps(t) + "\n" for t in timings))
    return folder


def sequences(folder: Path, settings: dict[str, Any], **more: Any) -> Path:
    """A folder of one sequence of two facts in one batch."""
    folder.mkdir()
    scores = {"es": 50.0, "ps": None, "ns": None, "s": None}
    line = {
        "key": "memit/b2x1/x2/plain/1", "method": "memit", "multiplier": 2.0, "preserve": False, "edits": 1, "facts": 2,
        "failed": 0, "scores": scores, "before": scores, "by_batch": [scores], "perplexity": None,
    }  # fmt: skip
    header = {**SWEEP, "methods": {"memit": settings}, "batches": [[1, 2]], "score_every": 1}
    (folder / "sequential.json").write_text(json.dumps(header))
    (folder / "sequential.jsonl").write_text(json.dumps({**line, **more}) + "\n")
    timing = {"key": "memit/b2x1/x2/plain", "seconds": 1.5, "hardware": "a CPU", "versions": {}}
    (folder / "sequential-timings.jsonl").write_text(json.dumps(timing) + "\n")
    return folder
