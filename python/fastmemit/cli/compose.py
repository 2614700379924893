"""``fastmemit compose``: several saved edits as one file, or one of them taken out again."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastmemit.cli.options import above_zero, check_writable
from fastmemit.errors import BadConfig

HELP = "Put several saved edits of one model into one file, or take one out of it."
EPILOG = """examples:
  fastmemit compose --edit a.safetensors --edit b.safetensors --save both.safetensors
  fastmemit compose --edit both.safetensors --remove 3f7c1a9be2d4 --save a.safetensors
  fastmemit compose --edit a.safetensors --edit b.safetensors --rank 64 --save small.safetensors
"""


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    verb.add_argument(
        "--edit",
        type=Path,
        action="append",
        required=True,
        metavar="FILE",
        help="a saved edit; several in the order in which they count as applied",
    )
    verb.add_argument("--save", type=Path, required=True, metavar="FILE", help="the new edit")
    verb.add_argument(
        "--remove",
        action="append",
        default=[],
        metavar="DIGEST",
        help="leave out the part with this digest, or its first 8 digits or more",
    )
    verb.add_argument("--allow-conflicts", action="store_true", help="though two edits write the same fact")
    verb.add_argument(
        "--compress",
        action="store_true",
        help="drop columns that the change does not need; parts can then not be removed",
    )
    verb.add_argument("--rank", type=above_zero, metavar="N", help="compress to rank N at most, with loss")


def run(args: argparse.Namespace) -> None:
    """Compose, say what is in it, save."""
    from fastcov.printable import printable
    from fastmemit.delta import Delta
    from fastmemit.sharing import compose, compressed, parts, remove

    check_writable(args.save)
    if args.remove and len(args.edit) > 1:
        raise BadConfig("--remove takes a part out of one composition; pass one --edit with it.")
    deltas = [Delta.load(path) for path in args.edit]
    if args.remove:
        whole = deltas[0]
        for digest in args.remove:
            whole = remove(whole, digest)
    else:
        whole = compose(deltas, allow_conflicts=args.allow_conflicts)
    found = parts(whole)
    if args.compress or args.rank is not None:
        whole = compressed(whole, rank=args.rank)
    whole.save(args.save)
    for part in found:
        method = part.provenance.get("method", "unknown")
        facts = f"{len(part.requests)} facts by {printable(str(method)):.20}"
        print(f"  {part.digest():.12}  {facts}")
    for name, done in (whole.provenance.get("compression") or {}).items():
        print(f"  {printable(name)}: rank {done['from']} -> {done['to']}, relative error {done['relative_error']:.1e}")
    print(f"{len(found)} edits on {len(whole.factors)} weights saved to {args.save}")
