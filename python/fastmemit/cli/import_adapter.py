"""``fastmemit import-adapter``: a LoRA adapter as an edit file."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastmemit.cli.options import add_model, check_writable, make_editor

HELP = "Write a LoRA adapter, our own or another's, as an edit file for apply and compose."
EPILOG = """examples:
  fastmemit import-adapter --model gpt2-xl --adapter adapter/ --save edit.safetensors
"""


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    verb.add_argument("--adapter", type=Path, required=True, metavar="DIR", help="its folder")
    verb.add_argument("--save", type=Path, required=True, metavar="FILE", help="the edit file")
    add_model(verb)


def run(args: argparse.Namespace) -> None:
    """Read, verify and save."""
    from fastmemit.sharing import load_adapter

    check_writable(args.save)
    editor = make_editor(args)
    delta = load_adapter(args.adapter, editor.model)
    delta.save(args.save)
    print(f"adapter on {len(delta.factors)} weights of {editor.name} saved as {args.save}")
