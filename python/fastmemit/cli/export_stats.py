"""``fastmemit export-stats``: second moments as files of other editing codebases."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fastmemit.cli.options import add_corpus, add_model, ensure_statistics, make_editor
from fastmemit.cli.stats_place import add_place, make_place
from fastmemit.errors import BadConfig

if TYPE_CHECKING:
    from fastmemit.editor import Editor
    from fastmemit.statistics import Statistics

HELP = "Write second moments where ROME, MEMIT, EasyEdit or AlphaEdit look for theirs."
EPILOG = """examples:
  fastmemit export-stats --model gpt2-xl --layout memit --stats-dir memit/data/stats
  fastmemit export-stats --model gpt2-xl --layout rome --layers 17 --corpus wikipedia \\
      --multiplier 10
  fastmemit export-stats --model meta-llama/Meta-Llama-3-8B --model-name Llama3-8B \\
      --layout alphaedit --stats-dir AlphaEdit/data/stats --relative-threshold 0.01

Without --corpus the newest kept statistics are written. The other codebase takes the files as its
own where its settings say the same mom2_dataset, mom2_n_samples and mom2_dtype.
"""
NULL_SPACE = "null_space_project.pt"


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    add_place(verb, required=True)
    verb.add_argument(
        "--layers",
        help="such as 4-8 or 4,6 (default: those that are kept, or with --corpus those of all methods' settings)",
    )
    verb.add_argument("--overwrite", action="store_true", help="replace files that are there")
    null = verb.add_argument_group("AlphaEdit's projectors")
    null.add_argument(
        "--null-space",
        type=Path,
        metavar="FILE",
        help=f"write them here (default with --layout alphaedit: {NULL_SPACE} in the folder that holds data/stats)",
    )
    null.add_argument("--no-null-space", action="store_true", help="do not write them")
    null.add_argument(
        "--threshold", type=float, metavar="X", help="eigenvalues of C below it count as zero (default 0.02)"
    )
    null.add_argument(
        "--relative-threshold", type=float, metavar="X", help="instead, a multiple of the mean of C's diagonal"
    )
    add_model(verb)
    add_corpus(verb, default=None)


def run(args: argparse.Namespace) -> None:
    """Find or collect, write, and say where the files are."""
    from fastmemit.compat.npz_files import check_new, export_null_space, export_statistics, layers_by_name
    from fastmemit.methods.config import parse_layers
    from fastmemit.progress import bar

    layers = None if args.layers is None else parse_layers(args.layers)
    null_space = _null_space(args)
    if null_space is not None and not args.overwrite:
        check_new(null_space)
    editor = make_editor(args)
    place = make_place(args, editor)
    found = _statistics(editor, args, layers)
    modules = list(found.paths)
    with bar("layers written", len(modules), not args.quiet) as written:
        paths = export_statistics(found, place, modules, overwrite=args.overwrite, progress=written)
    print(f"{editor.name}: second moments of {len(paths)} layers, {found.describe()}")
    for path in paths.values():
        print(f"  {path}")
    print(
        f"taken where mom2_dataset is {place.dataset}, mom2_n_samples {place.sample_size} and "
        f"mom2_dtype {place.precision}"
    )
    if null_space is None:
        return
    with bar("layers decomposed", len(modules), not args.quiet) as decomposed:
        ranks = export_null_space(
            found,
            null_space,
            modules,
            **({} if args.threshold is None else {"threshold": args.threshold}),
            relative=args.relative_threshold,
            overwrite=args.overwrite,
            progress=decomposed,
        )
    print(f"projectors onto the null spaces in {null_space}")
    layer_of = layers_by_name(editor.adapter)
    for name, rank in ranks.items():
        print(f"  {name}: {rank} of {editor.adapter.d_k(layer_of[name])} directions")


def _null_space(args: argparse.Namespace) -> Path | None:
    """Where AlphaEdit's projectors go, if they are to be written.

    Raises:
        BadConfig: Options that contradict each other, a threshold that is not above 0, or a folder for a file.
    """
    given = [args.threshold, args.relative_threshold]
    if None not in given:
        raise BadConfig("Give either --threshold or --relative-threshold.")
    for value in given:
        if value is not None and not 0 < value < float("inf"):
            raise BadConfig(f"A threshold must be a finite number above 0 but is {value:g}.")
    wanted = args.null_space is not None or args.layout == "alphaedit"
    if args.no_null_space or not wanted:
        if args.null_space is not None or given != [None, None]:
            raise BadConfig(
                "The projectors are not written, so --null-space and thresholds make no sense; "
                "pass --null-space FILE without --no-null-space."
            )
        return None
    if args.null_space is not None:
        if args.null_space.is_dir():
            raise BadConfig(f"{str(args.null_space)!r} is a folder; name a file (--null-space).")
        return Path(args.null_space)
    folder: Path = args.stats_dir
    inside = folder.absolute().parts[-2:] == ("data", "stats")
    return (folder.absolute().parent.parent if inside else folder) / NULL_SPACE


def _statistics(editor: Editor, args: argparse.Namespace, layers: tuple[int, ...] | None) -> Statistics:
    """The statistics to write: newly collected where a corpus is named, else kept ones.

    Raises:
        fastcov.StoreMissing: None are kept.
    """
    from fastcov import StoreMissing
    from fastmemit.methods import METHODS

    if args.corpus is not None or args.multiplier == "auto":
        every = sorted({layer for method in METHODS for layer in editor.config(method).layers})
        return ensure_statistics(editor, layers or every, args)
    found = editor.find_statistics(layers, args.multiplier)
    if found is not None:
        return found
    many = "" if args.multiplier is None else f" for the multiplier {args.multiplier:g}"
    which = "" if layers is None else f" of the layers {list(layers)}"
    raise StoreMissing(
        f"No second moments{which} of {editor.name} are kept{many}; name a --corpus "
        "to collect them from, or other --layers."
    )
