"""How the other codebases load their statistics, written to what is known of them.

A file is taken if every entry that the configuration asks for (here the sample size) is in it with the same value; else
the statistics are collected again, which here is an error to be seen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch


class Recompute(Exception):
    """The loader would spend its 36 hours now."""


class TheirMoment:
    """What ``stat.mom2`` is there."""

    def __init__(self, count: Any, mom2: Any) -> None:
        self.count, self.mom2 = int(count), torch.from_numpy(mom2)

    def moment(self) -> torch.Tensor:
        return self.mom2 / self.count


def load(path: Path, sample_size: int = 100000) -> TheirMoment:
    """The statistics in a file, as they come to ``get_cov``."""
    try:
        data = dict(np.load(path))  # pickles are refused, and every entry is read
    except FileNotFoundError:
        raise Recompute("there is no file") from None
    if "sample_size" not in data or data["sample_size"] != sample_size:
        raise Recompute(f"sample_size is {data.get('sample_size')}, not {sample_size}")
    own = {k.removeprefix("mom2."): v for k, v in data.items() if k.startswith("mom2.")}
    return TheirMoment(own["count"], own["mom2"])


def their_path(stats_dir: Path, model_dir: str, module: str, dataset: str = "wikipedia", n: int = 100000) -> Path:
    """Where it looks."""
    return stats_dir / model_dir / f"{dataset}_stats" / f"{module}_float32_mom2_{n}.npz"


def save(path: Path, total: Any, count: int, sample_size: int = 100000) -> Path:
    """A file as they write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        path,
        **{
            "mom2.constructor": "util.runningstats.SecondMoment()",
            "mom2.count": count,
            "mom2.mom2": np.asarray(total, dtype=np.float32),
            "sample_size": sample_size,
        },
    )
    return path
