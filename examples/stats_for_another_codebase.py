"""Statistics for another editing codebase: collected here in seconds, in the files that it loads.

Run it in the folder of the other codebase, or name its folder of statistics:

    python examples/stats_for_another_codebase.py
    python examples/stats_for_another_codebase.py --model gpt2-xl --stats-dir ../memit/data/stats

Then run that codebase as ever: it finds the files, and computes no statistics of its own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from fastmemit import Editor
from fastmemit.compat import LAYOUTS, StatsPlace, export_statistics


def main() -> None:
    """Collect, write, and look at a file as the other codebase will."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="a hub name, a folder, or smollm2")
    parser.add_argument("--corpus", default="builtin", help="builtin, self, wikipedia or a file")
    parser.add_argument("--multiplier", type=float, default=10, help="keys per dimension")
    parser.add_argument("--layout", choices=LAYOUTS, default="memit", help="whose files")
    parser.add_argument("--stats-dir", default="data/stats", help="its folder of statistics")
    parser.add_argument("--model-name", help="what it calls the model (default: --model)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    args = parser.parse_args()

    editor = Editor.from_pretrained(args.model, progress=True)
    found = editor.precompute(args.corpus, multiplier=args.multiplier)
    print(found.describe())

    name = args.model if Path(args.model).is_dir() else editor.name  # theirs go by the path of a local folder
    place = StatsPlace(args.stats_dir, args.layout, args.model_name or name)
    paths = export_statistics(found, place, overwrite=args.overwrite)
    for path in paths.values():
        with np.load(path) as data:
            total, count = data["mom2.mom2"], int(data["mom2.count"])
        print(f"{path}: {count} keys of width {len(total)}, mean square {total.trace() / count:.3g}")
    print(f"set mom2_n_samples to {place.sample_size} there, as it is in every released setting")


if __name__ == "__main__":
    main()
