"""``fastmemit import-stats``: another codebase's second moments for our edits."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastmemit.cli.options import add_model, make_editor
from fastmemit.cli.stats_place import add_place, make_place
from fastmemit.errors import BadConfig

HELP = "Take over second moments that ROME, MEMIT, EasyEdit or AlphaEdit collected."
EPILOG = """examples:
  fastmemit import-stats --model gpt2-xl --layout memit --stats-dir memit/data/stats
  fastmemit import-stats --model EleutherAI/gpt-j-6B --layout rome --layers 3-8
  fastmemit import-stats --model gpt2-xl \\
      --file transformer.h.17.mlp.c_proj_float32_mom2_100000.npz

Edits use what was imported or precomputed last. Import with the --dtype that you edit with: the
same weights in another dtype are another model.
"""


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    verb.add_argument(
        "--file",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a file as they name it, MODULE_float32_mom2_100000.npz, instead of --layout",
    )
    verb.add_argument("--layers", help="such as 4-8 or 4,6 (default: all that are there)")
    verb.add_argument("--no-check", action="store_true", help="do not compare them with the model's own keys")
    add_place(verb, required=False)
    add_model(verb)


def run(args: argparse.Namespace) -> None:
    """Read, check, keep, and say where."""
    from fastmemit.compat import files_of, import_statistics
    from fastmemit.methods.config import parse_layers

    if bool(args.file) == (args.layout is not None):
        raise BadConfig("Name the files either by --layout and --stats-dir or by --file.")
    layers = None if args.layers is None else parse_layers(args.layers)
    if args.file and layers is not None:
        raise BadConfig("The names of files say which layers they are of; leave --layers out.")
    editor = make_editor(args)
    files = args.file or files_of(editor, make_place(args, editor), layers)
    found = import_statistics(editor, files, check=not args.no_check)
    dtype = str(editor.model.dtype).removeprefix("torch.")
    print(f"{editor.name} in {dtype}: second moments of {len(found.paths)} layers taken over, {found.describe()}")
    for path in found.paths.values():
        print(f"  {path}")
