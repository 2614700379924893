"""``fastmemit apply``: put saved edits into a model and look at what it says."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastmemit.cli.options import above_zero, add_model, check_free, make_editor

HELP = "Apply saved edits to the model that they were made for."
EPILOG = """examples:
  fastmemit apply --model smollm2 --edit edit.safetensors --prompt "The Eiffel Tower is in"
  fastmemit apply --model gpt2-xl --edit a.safetensors --edit b.safetensors --save-model out/
"""


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    verb.add_argument(
        "--edit",
        type=Path,
        action="append",
        required=True,
        metavar="FILE",
        help="a saved edit; several are applied in their order",
    )
    verb.add_argument(
        "--prompt", action="append", default=[], help="continue this text before and after"
    )
    verb.add_argument("--tokens", type=above_zero, default=20, help="how far (default 20)")
    verb.add_argument("--force", action="store_true", help="though made for another model")
    verb.add_argument("--save-model", type=Path, metavar="DIR", help="write the edited model here")
    add_model(verb)


def run(args: argparse.Namespace) -> None:
    """Apply all edits or none, and show the prompts before and after."""
    check_free(args.save_model)
    editor = make_editor(args)
    edits = [editor.load(path, force=args.force) for path in args.edit]
    before = editor.generate(args.prompt, args.tokens) if args.prompt else []
    for edit in edits:
        edit.apply()
    if args.save_model is not None:  # before anything that may fail
        editor.save_model(args.save_model)
    after = editor.generate(args.prompt, args.tokens) if args.prompt else []
    facts = sum(len(edit.delta.requests) for edit in edits)
    print(f"{len(edits)} edits with {facts} facts applied to {editor.name}")
    for prompt, old, new in zip(args.prompt, before, after, strict=True):
        print(f"\n{prompt}\n  before: {_line(old)}\n  after:  {_line(new)}")
    if args.save_model is not None:
        print(f"edited model saved to {args.save_model}")


def _line(text: str) -> str:
    return " ".join(text.split())
