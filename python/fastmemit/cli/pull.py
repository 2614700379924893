"""``fastmemit pull``: an edit to a file, or statistics into the cache, from the hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastmemit.cli.options import add_model, check_writable, make_editor, quiet_libraries

HELP = "Fetch an edit or second moments from the hub, verified."
EPILOG = """examples:
  fastmemit pull --repo me/rome-edit --save edit.safetensors
  fastmemit pull --repo me/rome-edit --revision v1 --model gpt2-xl --save edit.safetensors
  fastmemit pull --repo me/gpt2-xl-moments

With --save an edit is fetched, without it second moments, which go where edits of their model find
them. With --model they are refused if they are not of this very model.
"""


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    verb.add_argument("--repo", required=True, metavar="USER/NAME")
    verb.add_argument("--revision", metavar="R", help="a branch, a tag or a commit")
    verb.add_argument("--save", type=Path, metavar="FILE", help="write the edit here")
    add_model(verb, default="")


def run(args: argparse.Namespace) -> None:
    """Fetch, verify, and say what came."""
    from fastmemit.models import tokenizer_fingerprint
    from fastmemit.sharing import pull_edit, pull_statistics

    check_writable(args.save)
    quiet_libraries()
    editor = make_editor(args) if args.model else None
    model = editor.fingerprint if editor is not None else None
    if args.save is not None:
        delta = pull_edit(args.repo, revision=args.revision, model=model)
        if editor is not None:
            delta.check(editor.model)
        delta.save(args.save)
        print(f"edit with {len(delta.requests)} facts of {args.repo} saved to {args.save}")
        return
    tokenizer = tokenizer_fingerprint(editor.tokenizer) if editor is not None else None
    found = pull_statistics(args.repo, revision=args.revision, model=model, tokenizer=tokenizer, cache=args.cache)
    print(f"second moments of {len(found.paths)} layers: {found.describe()}")
    for path in found.paths.values():
        print(f"  {path}")
