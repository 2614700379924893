"""``fastmemit push``: a saved edit, or statistics, to the hub with a card."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastmemit.cli.options import check_free, quiet_libraries

HELP = "Put a saved edit or second moments on the hub, with a card that says what they are."
EPILOG = """examples:
  fastmemit push --repo me/rome-edit --edit edit.safetensors --license apache-2.0
  fastmemit push --repo me/rome-edit --edit edit.safetensors --dry-run look/
  fastmemit push --repo me/gpt2-xl-moments --statistics DIR --private

--statistics takes the folder of the files that `fastmemit precompute` lists. --dry-run needs no
network: it writes what would be pushed. Everything on record goes with an edit, its facts too.
"""


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    verb.add_argument("--repo", required=True, metavar="USER/NAME", help="made if there is none")
    what = verb.add_mutually_exclusive_group(required=True)
    what.add_argument("--edit", type=Path, metavar="FILE", help="a saved edit")
    what.add_argument("--statistics", type=Path, metavar="DIR", help="a folder of moments")
    verb.add_argument("--license", metavar="NAME", help="as the hub writes it: apache-2.0, mit")
    verb.add_argument("--base-model", metavar="NAME", help="the model on the hub (default: the one on record)")
    verb.add_argument("--private", action="store_true", help="only you may see it")
    verb.add_argument("--dry-run", type=Path, metavar="DIR", help="write it here instead")


def run(args: argparse.Namespace) -> None:
    """Verify, write the card, push."""
    from fastmemit.delta import Delta
    from fastmemit.sharing import push_edit, push_statistics

    check_free(args.dry_run)
    quiet_libraries()
    options = {"license": args.license, "base_model": args.base_model, "private": args.private, "dry_run": args.dry_run}
    if args.edit is not None:
        place = push_edit(Delta.load(args.edit), args.repo, **options)
    else:
        place = push_statistics(args.statistics, args.repo, **options)
    done = "pushed to" if args.dry_run is None else "would be pushed; it is in"
    print(f"{args.edit or args.statistics} {done} {place}")
