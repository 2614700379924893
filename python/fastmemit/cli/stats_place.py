"""Options that say where another codebase keeps its statistics, shared by both directions."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fastmemit.cli.options import above_zero

if TYPE_CHECKING:
    from fastmemit.compat import StatsPlace
    from fastmemit.editor import Editor

LAYOUT_NAMES = ("rome", "memit", "easyedit", "alphaedit")


def add_place(verb: argparse.ArgumentParser, *, required: bool) -> None:
    """``--layout``, ``--stats-dir`` and the parts of a file's name."""
    group = verb.add_argument_group("the other codebase")
    group.add_argument("--layout", choices=LAYOUT_NAMES, required=required, help="whose files")
    group.add_argument(
        "--stats-dir",
        type=Path,
        default=Path("data/stats"),
        metavar="DIR",
        help="its folder of statistics (default data/stats)",
    )
    group.add_argument("--model-name", help="what it calls the model (default: the name that --model gives)")
    group.add_argument("--dataset", default="wikipedia", help="its mom2_dataset (wikipedia)")
    group.add_argument(
        "--precision", choices=("float32", "float64"), default="float32", help="its mom2_dtype (float32)"
    )
    group.add_argument(
        "--sample-size",
        type=above_zero,
        default=100_000,
        metavar="N",
        help="its mom2_n_samples (100000), by which it knows its file; not a number of keys",
    )


def make_place(args: argparse.Namespace, editor: Editor) -> StatsPlace:
    """The place that the options name, for a model."""
    from fastmemit.compat import StatsPlace

    return StatsPlace(
        args.stats_dir,
        args.layout,
        args.model_name or editor.name,
        dataset=args.dataset,
        precision=args.precision,
        sample_size=args.sample_size,
    )
